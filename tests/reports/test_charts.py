"""The figures show the records' numbers where they belong, and become SVG that a page can hold several of."""

import re
from importlib import resources
from math import inf, nan
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib import colormaps

from mot_lora.records import BranchRecord, EvaluationRecord, FoldRecord, RoundRecord, RunRecord, TrainRecord
from mot_lora.reports import figures, run_charts

LIGHT, DARK = "#ffffff", "#17171c"
HOSTILE = '<b>&"$x$ id="z" url(#z)</text>'
SVG = "{http://www.w3.org/2000/svg}"


def fold(size: float = 0.01, survived: float | None = 0.9, teachers: int = 2) -> FoldRecord:
    """Cosines of 0.1 (i + j) and conflicts of 0.05 (i + j) off the diagonal."""
    n = range(teachers)
    return FoldRecord(
        relative_norm=size,
        survived=survived,
        sign_conflict=0.3,
        cosine=tuple(tuple(1.0 if i == j else 0.1 * (i + j) for j in n) for i in n),
        opposition=tuple(tuple(0.0 if i == j else 0.05 * (i + j) for j in n) for i in n),
    )


def a_round(number: int = 1, modules: dict[str, FoldRecord] | None = None, names: tuple[str, ...] = ("a", "b")) -> Any:
    return RoundRecord(
        round=number,
        teachers=names,
        method="linear",
        weights=(1,) * len(names),
        seed=0,
        fold=fold(teachers=len(names)),
        layers={},
        modules=modules or {},
        fold_seconds=1,
        evaluation=EvaluationRecord(
            questions=9, accuracy=0.3 + number / 40, interval=(0.25, 0.85), losses={"a": 2 - number / 10}
        ),
    )


def a_branch(number: int, teacher: str, losses: tuple[float, ...] = (), accuracy: float | None = 0.4) -> BranchRecord:
    train = TrainRecord(steps=len(losses), tokens=1, loss=1, losses=losses)
    evaluation = None if accuracy is None else EvaluationRecord(accuracy=accuracy, losses={"a": accuracy})
    return BranchRecord(round=number, teacher=teacher, learning_rate=1e-4, train=train, evaluation=evaluation)


def a_run(**changes: Any) -> RunRecord:
    record = RunRecord(
        before=EvaluationRecord(questions=9, accuracy=0.3, interval=(0.2, 0.45), losses={"a": 2.0}),
        branches=(a_branch(1, "a"), a_branch(1, "b", accuracy=0.35), a_branch(2, "a", accuracy=None)),
        rounds=(a_round(1), a_round(2)),
        metric="accuracy",
        best=2,
        stopped="",
    )
    return record.model_copy(update=changes)


def contrast(a: str, b: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05), L1 the lighter."""

    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_formula_knows_the_ends() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("page", [LIGHT, DARK])
def test_marks_are_seen_on_light_and_on_dark(page: str) -> None:
    assert min(contrast(color, page) for color in figures.COLORS) >= 3


def test_the_first_24_teachers_look_different() -> None:
    run = a_run(branches=tuple(a_branch(1, f"t{i}") for i in range(24)))
    lines = run_charts.score_by_round(run, "accuracy").axes[0].lines[1:]
    looks = {(line.get_color(), line.get_marker()) for line in lines if str(line.get_label()).startswith("t")}
    assert len(looks) == 24


def test_the_page_has_readable_text_on_light_and_on_dark() -> None:
    css = resources.files("mot_lora").joinpath("reports/templates/page.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css)]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        colors = {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in scheme.items()}
        for text in ("ink", "soft"):
            for ground in ("page", "block"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground, colors)
    assert {schemes[0]["page"], schemes[1]["page"]} == {"#fff", DARK}


@pytest.mark.parametrize("name", ["coolwarm", "cividis", "viridis"])
def test_numbers_in_cells_are_readable(name: str) -> None:
    for i in range(101):
        color = colormaps[name](i / 100)
        text = {"black": "#000000", "white": "#ffffff"}[figures._readable(color)]
        assert contrast(text, "#" + "".join(f"{round(255 * x):02x}" for x in color[:3])) >= 4.5


def test_scores_stand_at_their_rounds() -> None:
    axes = run_charts.score_by_round(a_run(), "accuracy").axes[0]
    merged, a, b = (next(x for x in axes.lines if x.get_label() == n) for n in ("merged student", "a", "b"))
    assert list(merged.get_xdata()) == [0, 1, 2]
    assert list(merged.get_ydata()) == pytest.approx([30, 32.5, 35])
    assert list(a.get_ydata()) == pytest.approx([40])  # of round 2 nothing was measured
    assert list(b.get_ydata()) == pytest.approx([35])
    assert 0.5 < a.get_xdata()[0] < b.get_xdata()[0] < 1
    bars = [sorted(y for _, y in bar.get_segments()[0]) for bar in axes.collections]
    assert bars == [pytest.approx(ends) for ends in ([20, 45], [25, 85], [25, 85])]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["before", "1", "2\nbest"]


def test_an_interval_that_rounding_put_beside_its_mean_is_drawn() -> None:
    none_right = EvaluationRecord(accuracy=0.0, interval=(1e-17, 0.3))
    bar = run_charts.score_by_round(a_run(before=none_right), "accuracy").axes[0].collections[0]
    assert sorted(y for _, y in bar.get_segments()[0]) == pytest.approx([0, 30])


def test_losses_have_no_interval_and_no_percent() -> None:
    axes = run_charts.score_by_round(a_run(), "loss").axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([2.0, 1.9, 1.8])
    assert not axes.collections


def test_curves_go_on_across_rounds_after_the_longest_branch() -> None:
    branches = [a_branch(1, "a", (3.0, 2.0)), a_branch(1, "b", (5.0, 4.0, nan, 3.0)), a_branch(2, "a", (1.0,))]
    axes = run_charts.loss_curves(branches).axes[0]
    drawn = [(x.get_label(), list(x.get_xdata()), list(x.get_ydata())) for x in axes.lines if x.get_linestyle() != ":"]
    assert drawn[0] == ("a", [1, 2], [3, 2])
    assert drawn[1][1:] == ([5], [1])
    assert drawn[2] == ("b", [1, 2, 4], [5, 4, 3])
    assert [x.get_xdata()[0] for x in axes.lines if x.get_linestyle() == ":"] == [4.5]


def test_long_curves_are_smoothed_over_faint_values() -> None:
    saw = tuple(2.0 + (-1) ** i for i in range(60))
    faint, smooth = run_charts.loss_curves([a_branch(1, "a", saw)]).axes[0].lines
    assert faint.get_alpha() == 0.3
    assert list(faint.get_ydata()) == list(saw)
    assert all(abs(y - 2) <= 1 / 3 for y in smooth.get_ydata())
    assert smooth.get_label() == "a"


def test_very_long_curves_are_drawn_by_means() -> None:
    faint, _ = run_charts.loss_curves([a_branch(1, "a", tuple(map(float, range(3001))))]).axes[0].lines
    xs, ys = list(faint.get_xdata()), list(faint.get_ydata())
    assert len(xs) <= run_charts.STEPS
    assert (xs[0], ys[0]) == (6, 5)  # the mean of the steps 1 to 11, whose losses are 0 to 10
    assert (xs[-1], ys[-1]) == (2997, 2996)  # of 2993 to 3001, the last 9


@pytest.mark.parametrize(("what", "unit", "own"), [("cosine", 0.1, 1.0), ("opposition", 0.05, 0.0)])
def test_pairs_have_their_numbers_in_their_cells(what: Any, unit: float, own: float) -> None:
    axes = run_charts.teacher_pairs(a_round(names=("a", "b", "c")), what).axes[0]
    cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert cells == {(i, j): f"{own if i == j else unit * (i + j):.2f}" for i in range(3) for j in range(3)}
    assert axes.collections[0].get_array()[1, 2] == pytest.approx(3 * unit)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.get_ylim() == (2.5, -0.5)  # the first teacher on top


def test_many_teachers_have_no_numbers_and_no_minus_zero() -> None:
    assert not run_charts.teacher_pairs(a_round(names=tuple("abcdefg")), "cosine").axes[0].texts
    done = a_round()
    done = done.model_copy(update={"fold": done.fold.model_copy(update={"cosine": ((1.0, -0.001), (-0.001, 1.0))})})
    assert run_charts.teacher_pairs(done, "cosine").axes[0].texts[1].get_text() == "0.00"


def test_modules_go_by_layer_number_and_kind() -> None:
    names = ["m.h.10.a.q", "m.h.2.a.q", "m.h.2.b.q", "m.h.2.mlp.experts.0.up", "m.h.2.mlp.experts.7.up", "x.head"]
    layers, kinds, values = run_charts.by_layer(dict(zip(names, [10, 2, 3, 4, 6, None], strict=True)))
    assert layers == [("m.h", 2), ("m.h", 10), ("", None)]
    assert kinds == ["a.q", "b.q", "up", "head"]
    assert values == [[2, 10, None], [3, None, None], [5, None, None], [None, None, None]]


def test_stacks_of_layers_stay_apart() -> None:
    layers, kinds, values = run_charts.by_layer({"see.0.q": 1, "talk.h.0.q": 2, "see.1.q": 3, "talk.h.1.q": inf})
    assert layers == [("see", 0), ("see", 1), ("talk.h", 0), ("talk.h", 1)]
    assert (kinds, values) == (["q"], [[1, 3, 2, None]])


def test_layers_are_drawn_where_they_belong() -> None:
    modules = {f"m.h.{i}.{k}": fold(size=i + j / 10, survived=1 - i / 10) for i in range(3) for j, k in enumerate("qk")}
    axes = run_charts.layer_kinds(a_round(modules=modules), "relative_norm").axes[0]
    assert axes.collections[0].get_array().tolist() == [pytest.approx([0, 1, 2]), pytest.approx([0.1, 1.1, 2.1])]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["q", "k"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.collections[0].get_clim() == (0, 2.1)
    kept = run_charts.layer_kinds(a_round(modules=modules), "survived").axes[0].collections[0]
    assert kept.get_clim() == (0, 1)
    assert kept.get_array()[0].tolist() == pytest.approx([1, 0.9, 0.8])


@pytest.mark.parametrize("survived", [None, nan, -0.5, 3.0])
def test_layers_with_odd_values_are_drawn(survived: float | None) -> None:
    figure = run_charts.layer_kinds(
        a_round(modules={"m.h.0.q": fold(survived=survived), "head": fold(size=inf)}), "survived"
    )
    low, high = figure.axes[0].collections[0].get_clim()
    assert (low, high) == (min(0, survived or 0), max(1, survived or 0)) or survived != survived
    figures.svg(figure, "f", "")


def test_names_that_look_alike_get_numbers() -> None:
    names = [f"a-teacher-of-{i}-forty-characters-in-all" for i in range(3)]
    assert len(set(figures.short_names(names))) == 3
    assert max(map(len, figures.short_names(names))) <= 17


def drawn(names: tuple[str, ...], rounds: int, layers: int, steps: int) -> dict[str, Any]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {f"model.layers.{i}.{k}": fold(0.001 * i) for i in range(layers) for k in kinds}
    done = tuple(a_round(n, {**modules, "lm_head": fold()}, names) for n in range(1, rounds + 1))
    losses = tuple(2 - i / max(1, steps) for i in range(steps))
    branches = tuple(a_branch(n, t, losses) for n in range(1, rounds + 1) for t in names)
    run = a_run(branches=branches, rounds=done, best=rounds)
    out = {
        "accuracy": run_charts.score_by_round(run, "accuracy"),
        "loss": run_charts.score_by_round(run, "loss"),
        "steps": run_charts.loss_curves(branches),
    }
    for r in done[-1:]:
        out["cosine"], out["conflict"] = (
            run_charts.teacher_pairs(r, "cosine"),
            run_charts.teacher_pairs(r, "opposition"),
        )
        out["norm"] = run_charts.layer_kinds(r, "relative_norm")
        out["survived"] = run_charts.layer_kinds(r, "survived")
    return out


SIZES = {
    "hostile": ((HOSTILE, "\u5e2b \N{GRINNING FACE}"), 2, 3, 30),
    "nothing": ((), 0, 0, 0),
    "tiny": (("a",), 1, 1, 1),
    "large": (tuple(f"teacher-{i}-with-a-name-of-forty-characters" for i in range(6)), 20, 36, 100),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_svg_is_whole_and_asks_for_nothing(size: str) -> None:
    ids: list[str] = []
    for name, figure in drawn(*SIZES[size]).items():
        text = figures.svg(figure, name, f"about {HOSTILE}")
        root = ElementTree.fromstring(text)
        assert (root.get("role"), root.get("aria-label")) == ("img", f"about {HOSTILE}")
        own = [e.get("id", "") for e in root.iter() if e.get("id")]
        assert all(i.startswith(f"{name}-") for i in own)
        references = [e.get("href", "") for e in root.iter() if "href" in e.attrib]
        references += [r for e in root.iter() for v in e.attrib.values() if v != root.get("aria-label")
                       for r in re.findall(r"url\((.*?)\)", v)]  # fmt: skip
        assert {r.removeprefix("#") for r in references} <= set(own)
        assert not root.findall(f".//{SVG}image")  # drawn in vectors
        assert not re.search(r"<style|<metadata|DejaVu|<script", text)
        assert figures.INK not in text
        assert "currentColor" in text
        width = float(root.get("viewBox", "").split()[2])
        for e in root.iter(f"{SVG}text"):
            found = re.search(r"font-size: ([\d.]+)px", e.get("style", ""))
            assert found, "text as text, with its size"
            assert float(found[1]) * 358 / width >= 10, "readable on a phone"
        ids += own
    assert len(ids) == len(set(ids))


def test_names_are_text_in_the_svg_as_they_are() -> None:
    text = figures.svg(run_charts.loss_curves([a_branch(1, "a$b$<i>&", (1.0, 2.0))]), "f", "")
    assert "a$b$<i>&" in [e.text for e in ElementTree.fromstring(text).iter(f"{SVG}text")]


def test_the_same_figure_gives_the_same_bytes() -> None:
    one, two = (drawn(*SIZES["tiny"]) for _ in range(2))
    for name in one:
        first = figures.svg(one[name], name, "x")
        assert first == figures.svg(two[name], name, "x")
