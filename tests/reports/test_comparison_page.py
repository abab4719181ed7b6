"""A comparison's page and figures say what its numbers say, whatever is missing, and ask nothing of the network."""

import re
from functools import cache
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_comparison import a_run, arm, some_runs
from test_run_page import HOSTILE, Reader, opened, section

from mot_lora.analysis.comparison import ArmRun, Comparison, summarize
from mot_lora.analysis.findings import findings
from mot_lora.reports import comparison_charts as draw
from mot_lora.reports.comparison_page import compare_page
from mot_lora.reports.comparison_tables import grids
from mot_lora.reports.figures import svg

SECTIONS = (
    "How it was compared",
    "What was found",
    "Scores",
    "Differences to the best STD",
    "Differences to MTD",
    "By round",
    "Forgetting",
    "Cost",
    "Settings",
)
ADDED = {"std:a": 0.3, "mtd": 0.3, "linear": 0.34, "linear+noisy": 0.3, "linear+repeated": 0.32, "mtd+noisy": 0.25}


@cache
def demo() -> Comparison:
    return summarize(some_runs())


@cache
def page_of(case: str) -> str:
    return demo_page() if case == "demo" else compare_page(summarize(CASES[case]))


@cache
def demo_page() -> str:
    return compare_page(demo(), "demo", {"Command": "mot-lora compare demo.yaml --seeds 0,1,2"})


CASES: dict[str, list[ArmRun]] = {
    "nothing": [],
    "the base alone": [a_run("base", 0)],
    "one seed": [a_run("mtd", 0), a_run("linear", 0)],
    "no accuracy": [a_run(name, s, accuracy=(), forgetting={}) for name in ("mtd", "linear") for s in (0, 1)],
    "identical arms": [a_run(name, s) for name in ("std:a", "linear") for s in (0, 1)],
    "an arm that diverged": [
        a_run(name, s, accuracy=(), loss=(2.0, 1.9 - s, float("inf") if name == "linear" else 1.8))
        for name in ("mtd", "linear")
        for s in (0, 1)
    ],
    "seeds apart": [a_run("mtd", 0), a_run("linear", 1)],
}


@pytest.mark.parametrize("case", ["demo", *CASES])
def test_the_page_is_whole_and_needs_no_network(case: str) -> None:
    page = page_of(case)
    reader = Reader(page)
    fetched = [v for k, v in reader.attributes if k in ("src", "href", "srcset", "xlink:href") and v[:1] != "#"]
    assert fetched == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", page)
    assert "script" not in reader.tags
    ids = [v for k, v in reader.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert tuple(title for h, title in reader.headings if h == "h2") == SECTIONS
    assert not re.search(r"\b(None|nan)\b", reader.text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in reader.attributes


def test_the_same_comparison_gives_the_same_bytes() -> None:
    runs = [a_run(name, s, 0.3 + s / 50) for name in ("std:a", "linear+noisy") for s in (0, 1)]
    assert compare_page(summarize(runs)) == compare_page(summarize(runs[::-1]))


def test_the_tables_are_the_terminal_s() -> None:
    shown = [row for row in Reader(demo_page()).rows if row]
    expected = [row for g in grids(demo()) for row in (list(g.columns), *([r.name, *r.cells] for r in g.rows))]
    assert sorted(shown) == sorted(expected)


def test_the_protocol_comes_before_the_findings_and_the_findings_before_the_tables() -> None:
    page = demo_page()
    how = section(page, "How it was compared").text
    assert "every arm runs all of its rounds" in how
    assert "No round is picked" in how
    assert "chosen afterwards on the same questions. That favours STD" in how
    assert "cannot go below 0.25 with 3 seeds" in how
    assert "Branch-steps with the same total branch-steps: 120 an arm." in how
    found = section(page, "What was found").text
    assert found.split("\n")[1:-1] == [*findings(demo())]
    assert page.index("How it was compared") < page.index("What was found") < page.index("<table")


def test_the_head_has_the_size_of_it() -> None:
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", demo_page()))
    assert facts == {
        "Arms": "7",
        "Seeds": "0, 1, 2",
        "Rounds": "2",
        "Questions": "40 held out",
        "Measured by": "accuracy",
    }


def test_what_is_missing_is_said() -> None:
    runs = [a_run("mtd", s) for s in range(3)] + [a_run("linear", 1)]
    how = section(compare_page(summarize(runs)), "How it was compared").text
    assert "Not finished, with the same steps per branch: MoT linear (seeds 0 and 2). All figures are of what" in how
    assert "Not finished" not in demo_page()


def test_a_loss_is_said_to_be_better_when_lower() -> None:
    page = page_of("no accuracy")
    assert "arms are compared by the held-out loss, and lower is better" in section(page, "How it was compared").text
    assert "Left is better." in section(page, "Scores").text
    assert "Left of 0 is better" in section(page, "Differences to MTD").text


def test_figures_tell_their_numbers_to_a_screen_reader() -> None:
    labels = "\n".join(v for k, v in Reader(demo_page()).attributes if k == "aria-label")
    score, to = arm(demo(), "linear").score, arm(demo(), "linear").to_mtd
    assert score is not None
    assert score.interval is not None
    assert to is not None
    low, high = score.interval
    assert f"MoT linear {100 * score.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" in labels
    assert f"Differences to MTD (union) in points: base {100 * arm_mean('base'):+.1f}" in labels
    assert re.search(r"Scores by round: .*MoT linear 25\.0 10\.0 3", labels)
    assert "Change on copying in points: STD a -10.0" in labels


def arm_mean(name: str) -> float:
    to = arm(demo(), name).to_mtd
    assert to is not None
    return to.seeds.mean


def test_names_are_never_markup() -> None:
    names = (f"std:{HOSTILE}", "mtd", HOSTILE)
    runs = [
        a_run(name, s, 0.3 + i / 10 + s**i / 50, forgetting={HOSTILE: (0.9, 0.8)})
        for i, name in enumerate(names)
        for s in (0, 1)
    ]
    page = compare_page(summarize(runs), HOSTILE, {HOSTILE: HOSTILE})
    reader = Reader(page)
    assert not {"script", "img"} & set(reader.tags)
    assert not {"onerror", "src"} & {k for k, _ in reader.attributes}
    assert reader.text.count(HOSTILE) >= 12


def test_points_stand_at_their_values() -> None:
    runs = [a_run("mtd", 0, 0.30), a_run("mtd", 1, 0.34), a_run("linear", 0, 0.41), a_run("linear", 1, 0.43)]
    comparison = summarize(runs)
    axes = draw.scores(comparison, comparison.budgets[0]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["MTD (union)", "MoT linear"]
    points = [sorted(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert points == [pytest.approx([30, 34]), pytest.approx([41, 43])]
    means = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert means == pytest.approx([32, 42])
    score = arm(comparison, "mtd").score
    assert score is not None
    assert score.interval is not None
    bar = sorted(x for x, _ in axes.collections[0].get_segments()[0])
    assert bar == pytest.approx([100 * x for x in score.interval])
    low, high = axes.get_xlim()
    assert low < bar[0] < bar[1] < high


def test_differences_stand_around_0_with_both_intervals() -> None:
    comparison = demo()
    axes = draw.differences(comparison, comparison.budgets[0], "mtd").axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert "MTD (union)" not in names
    assert axes.lines[0].get_xdata() == [0, 0]
    bars = [sorted(x for x, _ in c.get_segments()[0]) for c in axes.collections]
    expected = []
    for a in comparison.budgets[0].arms:
        if a.to_mtd and a.to_mtd.questions:
            expected += [[100 * x for x in e.interval or ()] for e in (a.to_mtd.seeds, a.to_mtd.questions)]
    assert bars == [pytest.approx(e) for e in expected]


def test_budgets_share_an_axis() -> None:
    runs = [a_run("mtd", s, 0.3 + s / 50) for s in (0, 1)]
    runs += [a_run("mtd", s, 0.7 + s / 50, budgets=("total",)) for s in (0, 1)]
    comparison = summarize(runs)
    limits = [draw.scores(comparison, b).axes[0].get_xlim() for b in comparison.budgets]
    assert limits[0] == limits[1]
    assert limits[0][0] < 30 < 72 < limits[0][1]


def test_every_trained_arm_has_a_panel_with_its_band() -> None:
    comparison = demo()
    panels = [a for a in draw.rounds(comparison, comparison.budgets[0]).axes if a.get_visible()]
    assert [a.get_title(loc="left") for a in panels] == [
        "STD a",
        "STD b",
        "MTD (union)",
        "one-shot merge",
        "MoT linear",
    ]
    linear = arm(comparison, "linear").by_round
    assert list(panels[-1].lines[-1].get_ydata()) == pytest.approx([100 * e.mean for e in linear])
    interval = linear[-1].interval
    assert interval is not None
    band = panels[-1].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((10, max(25, 100 * interval[1])))


def test_gain_and_forgetting_are_the_two_axes() -> None:
    runs = [a_run("mtd", s, accuracy=(0.2, 0.3 + s / 50), forgetting={"x": (0.9, 0.7 + s / 50)}) for s in (0, 1)]
    comparison = summarize([*runs, a_run("base", 0, forgetting={"x": (0.9,)})])
    axes = draw.forgetting(comparison, comparison.budgets[0], "x").axes[0]
    marks = [(x.get_xdata()[0], x.get_ydata()[0]) for x in axes.lines if x.get_marker() not in ("None", "")]
    assert marks == [pytest.approx((11, -19))]


def test_arms_look_different() -> None:
    names = ["base", "std:a", "std:b", "std:c", "mtd", "one_shot", "linear", "ties", "dare_linear", "dare_ties", "vote"]
    names += ["validation", "greedy", "mine", "linear+noisy", "linear+repeated", "ties+noisy", "mtd+noisy"]
    arms = summarize([a_run(name, 0) for name in names]).budgets[0].arms
    looks = [tuple(draw.look(name, arms).values()) for name in names]
    assert len(set(looks)) == len(names)
    assert draw.look("linear+noisy", arms)["marker"] == draw.look("linear", arms)["marker"]


def test_figures_become_svg_with_text() -> None:
    comparison = summarize(some_runs(seeds=2, arms=ADDED))
    budget = comparison.budgets[0]
    for drawn in (
        draw.scores(comparison, budget),
        draw.differences(comparison, budget, "std"),
        draw.rounds(comparison, budget),
        draw.forgetting(comparison, budget, "copying"),
    ):
        root = ElementTree.fromstring(svg(drawn, "x", "a figure"))
        text = " ".join("".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text"))
        assert "MoT linear" in text
        assert "noisy" in text


def test_a_browser_opens_the_page_and_it_does_not_scroll_sideways(tmp_path: Path) -> None:
    arms = {f"std:a-teacher-with-a-name-of-forty-characters-{i}": 0.3 + i / 30 for i in range(2)} | {"linear": 0.3}
    page = compare_page(summarize(some_runs(seeds=2, arms=arms)), "n" * 99, {"Command": "v" * 500})
    dom, console = opened(page, tmp_path)
    assert console == []
    assert dom.count("<figure>") == page.count("<figure>") == 8
    frames = "".join(f'<iframe width="{w}" height="900" style="border: 0" srcdoc="{escape(page)}"></iframe>'
                     for w in (320, 1280))  # fmt: skip
    measure = """<script>onload = () => {
        for (const frame of document.querySelectorAll("iframe")) {
            const page = frame.contentDocument;
            for (const part of page.querySelectorAll("details")) part.open = true;
            frame.title = [frame.contentWindow.innerWidth, page.documentElement.scrollWidth];
        }
    }</script>"""
    dom, _ = opened(f"<!doctype html><html><body>{frames}{measure}</body></html>", tmp_path)
    widths = [(int(inner), int(needed)) for inner, needed in re.findall(r' title="(\d+),(\d+)"', dom)]
    assert [inner for inner, _ in widths] == [320, 1280]
    assert all(needed <= inner for inner, needed in widths), widths
