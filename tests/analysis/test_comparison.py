"""A comparison's figures are those of the runs: by arm, by budget, paired by seed, whatever order they come in."""

import io
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from mot_lora.analysis.comparison import ArmRun, ArmSummary, Budget, Comparison, comparison_csv, summarize
from mot_lora.analysis.findings import findings, verdict
from mot_lora.analysis.wording import label
from mot_lora.errors import UserError
from mot_lora.reports.comparison_tables import ROUNDS, grids
from mot_lora.reports.grid import Grid
from mot_lora.reports.tables import comparison_tables

BOTH: tuple[Budget, ...] = ("steps", "total")
ARMS = {"base": 0.27, "std:a": 0.30, "std:b": 0.33, "mtd": 0.31, "one_shot": 0.32, "linear": 0.36, "vote": 0.34}
QUESTIONS = 40


def a_run(arm: str, seed: int, last: float = 0.3, budgets: tuple[Budget, ...] = ("steps",), **changes: Any) -> ArmRun:
    """Two rounds from 0.25 through a hole of 0.1 to `last`."""
    right = round(last * QUESTIONS)
    found: dict[str, Any] = {
        "accuracy": (last,) if arm in ("base", "vote") else (0.25, 0.1, last),
        "loss": () if arm == "vote" else (2.0,) if arm == "base" else (2.0, 1.9, 1.8),
        "forgetting": {} if arm in ("base", "vote") else {"copying": (0.9, 0.85, 0.8)},
        "scores": (1.0,) * right + (0.0,) * (QUESTIONS - right),
        "branch_steps": 120,
        "tokens": 4000,
        "seconds": 9.0,
    }
    return ArmRun(arm=arm, seed=seed, budgets=budgets, **{**found, **changes})


def some_runs(seeds: int = 3, arms: dict[str, float] = ARMS) -> list[ArmRun]:
    """Every arm with every seed in both budgets; each seed has its own level, each run some noise."""
    draw = random.Random(0)
    shifts = [draw.gauss(0, 0.03) for _ in range(seeds)]
    return [
        a_run(arm, seed, round(QUESTIONS * (level + shifts[seed] + draw.gauss(0, 0.01))) / QUESTIONS, budgets=BOTH)
        for seed in range(seeds)
        for arm, level in arms.items()
    ]


def arm(comparison: Comparison, name: str, budget: int = 0) -> ArmSummary:
    return next(a for a in comparison.budgets[budget].arms if a.arm == name)


def one(comparison: Comparison, title: str) -> Grid:
    return next(g for g in grids(comparison) if g.title.startswith(title))


def cells(comparison: Comparison, title: str) -> dict[str, tuple[str, ...]]:
    return {row.name: row.cells for row in one(comparison, title).rows}


def test_the_last_round_counts_and_not_the_best() -> None:
    runs = [a_run("linear", 0, accuracy=(0.2, 0.9, 0.5)), a_run("linear", 1, accuracy=(0.2, 0.1, 0.4))]
    found = arm(summarize(runs), "linear")
    assert found.last == (0.5, 0.4)
    assert found.score is not None
    assert found.score.mean == pytest.approx(0.45)
    assert found.score.sd == pytest.approx(np.std([0.5, 0.4], ddof=1))
    assert found.score.interval == pytest.approx(stats.ttest_1samp([0.5, 0.4], 0).confidence_interval())
    assert [e.mean for e in found.by_round] == pytest.approx([0.2, 0.5, 0.45])
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0.25)
    # of each seed its lowest after the start, 0.5 and 0.1, and not the lowest of the mean curve
    assert found.lowest is not None
    assert found.lowest.mean == pytest.approx(0.3)


def test_other_tasks_the_loss_and_the_cost_are_means_over_seeds() -> None:
    runs = [
        a_run("mtd", s, forgetting={"x": (0.9, 0.95, 0.7 - s / 10)}, loss=(3.0, 1.0 + s), branch_steps=100 + 50 * s)
        for s in (0, 1)
    ]
    found = arm(summarize(runs), "mtd")
    changes = found.forgetting["x"]
    assert changes.mean == pytest.approx(-0.25)
    assert changes.interval == pytest.approx(stats.ttest_1samp([-0.2, -0.3], 0).confidence_interval())
    assert found.loss is not None
    assert found.loss.mean == 1.5
    assert (found.branch_steps, found.tokens, found.seconds) == (125, 4000, 9)


def test_differences_are_paired_by_seed_and_question() -> None:
    draw = random.Random(3)
    scores = {
        (a, s): tuple(float(draw.random() < p) for _ in range(QUESTIONS))
        for a, p in (("std:a", 0.3), ("mtd", 0.4), ("linear", 0.6))
        for s in range(4)
    }
    runs = [a_run(a, s, scores=x, accuracy=(0.2, float(np.mean(x)))) for (a, s), x in scores.items()]
    for to, found in (("std:a", arm(summarize(runs), "linear").to_std), ("mtd", arm(summarize(runs), "linear").to_mtd)):
        ours, theirs = ([scores[a, s] for s in range(4)] for a in ("linear", to))
        over_seeds = stats.ttest_rel(np.mean(ours, axis=1), np.mean(theirs, axis=1))
        over_questions = stats.ttest_rel(np.mean(ours, axis=0), np.mean(theirs, axis=0))
        assert found is not None
        assert found.to == to
        assert found.seeds.p == pytest.approx(over_seeds.pvalue)
        assert found.seeds.interval == pytest.approx(over_seeds.confidence_interval())
        assert found.questions is not None
        assert found.questions.interval == pytest.approx(over_questions.confidence_interval())
        assert found.seeds.mean == pytest.approx(found.questions.mean)


def test_the_best_single_teacher_is_found_afterwards_in_each_budget() -> None:
    runs = [a_run("std:a", 0, 0.3), a_run("std:b", 0, 0.4), a_run("linear", 0, 0.9)]
    runs += [a_run("std:a", 0, 0.5, budgets=("total",)), a_run("std:b", 0, 0.4, budgets=("total",))]
    found = summarize(runs)
    assert [b.best_std for b in found.budgets] == ["std:b", "std:a"]
    assert arm(found, "std:b").to_std is None
    assert arm(found, "std:a").to_std is not None
    lower = [r.model_copy(update={"accuracy": (), "loss": r.accuracy}) for r in runs]
    assert [b.best_std for b in summarize(lower).budgets] == ["std:a", "std:b"]


def test_p_are_adjusted_over_the_arms_of_one_table() -> None:
    found = summarize(some_runs())
    for budget in found.budgets:
        compared = [d for a in budget.arms if (d := a.to_mtd)]
        assert len(compared) == len(ARMS) - 1
        smallest = min(compared, key=lambda d: d.seeds.p or 0)
        assert smallest.seeds.p is not None
        assert smallest.holm == pytest.approx(min(1, smallest.seeds.p * len(compared)))
        assert all(d.holm is not None and d.seeds.p is not None and d.holm >= d.seeds.p for d in compared)


def test_the_base_belongs_to_both_budgets() -> None:
    runs = [a_run("base", 0, 0.2), a_run("mtd", 0), a_run("mtd", 0, budgets=("total",))]
    assert [[a.arm for a in b.arms] for b in summarize(runs).budgets] == [["base", "mtd"]] * 2
    assert [b.budget for b in summarize(runs[:2]).budgets] == ["steps"]


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(draw: random.Random) -> None:
    runs = some_runs(seeds=2)
    shuffled = draw.sample(runs, len(runs))
    assert summarize(shuffled) == summarize(runs)
    assert comparison_csv(shuffled) == comparison_csv(runs)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5), st.integers(0, 20))
def test_a_level_that_both_arms_share_is_no_difference(pairs: list[tuple[int, int]], shift: int) -> None:
    def difference(first: str, second: str, by: int) -> tuple[float, Any]:
        found = summarize(
            [a_run(first, s, (x + by) / 64) for s, (x, _) in enumerate(pairs)]
            + [a_run(second, s, (y + by) / 64) for s, (_, y) in enumerate(pairs)]
        )
        to = arm(found, "linear").to_mtd
        assert to is not None
        return to.seeds.mean, to.seeds.p

    mean, p = difference("linear", "mtd", 0)
    assert difference("linear", "mtd", shift) == (mean, p)
    assert difference("mtd", "linear", 0) == (-mean, p)


def test_an_arm_that_wins_on_every_seed_is_found() -> None:
    draw = random.Random(5)
    runs = []
    for seed in range(5):
        level = draw.gauss(0.3, 0.1)  # seeds differ by more than arms: only pairs show it
        runs += [a_run("mtd", seed, level), a_run("std:a", seed, level + 0.002 * draw.random())]
        runs += [a_run("linear", seed, level + 0.05 + 0.002 * draw.random())]
    found = summarize(runs)
    to = arm(found, "linear").to_mtd
    assert to is not None
    assert verdict(to, "accuracy") == "better"
    assert to.holm is not None
    assert to.holm < 0.001
    assert to.seeds.sign_flip == 0.0625
    assert "better than MTD (union): STD a +0.2 and MoT linear +5.1 points; worse: none." in findings(found)[2]
    assert "p is below 0.05 for all of these." in findings(found)[2]
    linear, mtd = arm(found, "linear").score, arm(found, "mtd").score
    assert linear is not None
    assert linear.interval is not None
    assert mtd is not None
    assert linear.interval[0] < mtd.mean  # the intervals of the means do not show it


def test_what_falls_the_other_way_is_said_too() -> None:
    worse = [a_run("mtd", s, 0.5 + s / 50) for s in range(4)] + [a_run("linear", s, 0.3 + s / 49) for s in range(4)]
    steps = findings(summarize(worse))
    assert steps[0].endswith(
        "the means over seeds go from 33.1\N{NO-BREAK SPACE}% (MoT linear) to 53.0\N{NO-BREAK SPACE}% (MTD (union))."
    )
    assert steps[1] == "With the same steps per branch, no single teacher was run to compare with."
    assert "better than MTD (union): none; worse: MoT linear -19.9 points." in steps[2]
    level = [a_run("mtd", s, 0.5) for s in range(4)] + [a_run("linear", s, 0.5 + (-1) ** s / 50) for s in range(4)]
    text = findings(summarize(level))[2]
    assert "better than MTD (union): none; worse: none." in text
    assert "Not distinguishable from MTD (union): MoT linear." in text
    half = stats.ttest_1samp([0.02, -0.02] * 2, 0).confidence_interval().high * 100
    assert f"The intervals reach {half:.1f} points to either side" in text


def test_findings_say_where_questions_disagree_with_seeds() -> None:
    runs = [a_run("mtd", s, 0.5) for s in range(4)] + [a_run("linear", s, 0.52 + s / 1000) for s in range(4)]
    text = findings(summarize(runs))[2]  # one question more of 40 are right, so other questions might show nothing
    assert "The interval over questions says the same for none of these." in text


def test_missing_seeds_are_named_and_only_pairs_are_compared() -> None:
    runs = [a_run("mtd", s, 0.3 + s / 20) for s in range(4)] + [a_run("linear", s, 0.4) for s in (1, 2)]
    found = summarize([*runs, a_run("base", 0, 0.2)])
    assert found.seeds == (0, 1, 2, 3)
    assert found.budgets[0].missing == (("base", 1), ("base", 2), ("base", 3), ("linear", 0), ("linear", 3))
    to = arm(found, "linear").to_mtd
    assert to is not None
    assert to.seeds.n == 2
    assert to.seeds.mean == pytest.approx(0.4 - np.mean([0.35, 0.4]))
    apart = summarize([a_run("mtd", 0), a_run("linear", 1)])
    assert arm(apart, "linear").to_mtd is None
    assert "no other arm shares a seed with MTD (union)" in findings(apart)[2]


def test_one_seed_has_scores_and_no_certainty() -> None:
    found = summarize([a_run("mtd", 7, 0.3), a_run("linear", 7, 0.4)])
    to = arm(found, "linear").to_mtd
    assert to is not None
    assert to.seeds.mean == pytest.approx(0.1)
    assert (to.seeds.interval, to.seeds.p, to.holm) == (None, None, None)
    assert to.questions is not None
    assert to.questions.interval is not None  # the questions are many
    assert "Without an interval (one seed, or differences all alike): MoT linear." in findings(found)[2]
    assert cells(found, "difference to MTD")["MoT linear"][:3] == ("1", "+10.0", "-")


def test_identical_arms_do_not_differ() -> None:
    runs = [a_run(name, s, 0.3 + s / 20) for name in ("mtd", "linear") for s in range(3)]
    to = arm(summarize(runs), "linear").to_mtd
    assert to is not None
    assert (to.seeds.mean, to.seeds.p, to.seeds.sign_flip, to.holm) == (0, 1, 1, 1)
    assert verdict(to, "accuracy") == "open"


def test_without_accuracy_the_loss_decides_and_lower_is_better() -> None:
    runs = [a_run("mtd", s, accuracy=(), scores=(), loss=(2.0, 2.5 + s / 10, 1.5 + s / 10)) for s in range(3)]
    runs += [a_run("linear", s, accuracy=(), scores=(), loss=(2.0, 1.6, 1.2 + s / 9)) for s in range(3)]
    found = summarize(runs)
    assert found.metric == "loss"
    linear, mtd = arm(found, "linear"), arm(found, "mtd")
    assert linear.to_mtd is not None
    assert linear.to_mtd.seeds.mean == pytest.approx(-0.3 + 1 / 9 - 0.1)
    assert linear.to_mtd.questions is None
    assert verdict(linear.to_mtd, "loss") == "better"
    assert mtd.lowest is not None
    assert mtd.lowest.mean == pytest.approx(2.6)  # the highest loss is the worst
    assert one(found, "held-out loss, the same steps").columns[5] == "highest\non the way"
    assert cells(found, "difference to MTD")["MoT linear"][1] == "-0.289"


def test_an_arm_measured_otherwise_is_kept_without_a_score() -> None:
    found = summarize([a_run("mtd", 0), a_run("linear", 0, accuracy=())])
    assert found.metric == "accuracy"
    assert arm(found, "linear").score is None
    assert arm(found, "linear").to_mtd is None
    assert cells(found, "accuracy, the same steps")["MoT linear"] == ("0", "-", "-", "-", "-", "1.800")


def test_questions_that_are_not_the_same_are_not_paired() -> None:
    runs = [a_run("mtd", 0), a_run("linear", 0, scores=(1.0,) * 7)]
    to = arm(summarize(runs), "linear").to_mtd
    assert to is not None
    assert to.questions is None


def test_a_run_is_there_once() -> None:
    with pytest.raises(UserError, match=r"linear: two runs have seed 1 and the budget total"):
        summarize([a_run("linear", 1, budgets=BOTH), a_run("linear", 1, budgets=("total",))])


def test_nothing_is_a_comparison_of_nothing() -> None:
    found = summarize([])
    assert (found.budgets, grids(found), findings(found)) == ((), [], [])


def test_a_comparison_reads_back_from_json() -> None:
    found = summarize(some_runs())
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    astray = summarize([a_run("mtd", s, accuracy=(), loss=(2.0, float("inf"))) for s in (0, 1)])
    assert Comparison.model_validate_json(astray.model_dump_json()) == astray


def test_the_csv_has_a_line_for_each_arm_budget_and_seed() -> None:
    runs = some_runs()
    frame = pd.read_csv(io.StringIO(comparison_csv(runs)))
    assert len(frame) == 2 * len(runs)
    assert not frame.duplicated(["arm", "budget", "seed"]).any()
    means = frame[frame.budget == "total"].groupby("arm").accuracy.mean()
    for name in ARMS:
        score = arm(summarize(runs), name, 1).score
        assert score is not None
        assert means[name] == pytest.approx(score.mean)
    mtd = frame[(frame.arm == "mtd") & (frame.budget == "steps") & (frame.seed == 0)].iloc[0]
    assert (mtd.accuracy_0, mtd.accuracy_1, mtd.accuracy_2) == (0.25, 0.1, mtd.accuracy)
    assert (mtd.loss, mtd.loss_0, mtd.forgetting_copying_2, mtd.questions) == (1.8, 2.0, 0.8, QUESTIONS)
    vote = frame[frame.arm == "vote"]
    assert vote.accuracy.notna().all()
    assert vote[["accuracy_0", "loss", "loss_0"]].isna().all(axis=None)  # a vote has no rounds


def test_the_csv_holds_any_name() -> None:
    frame = pd.read_csv(io.StringIO(comparison_csv([a_run('std:a,"b"\n', 0)])))
    assert frame.arm[0] == 'std:a,"b"\n'


def test_arms_have_names_for_people() -> None:
    found = ["base", "std:hasty", "mtd+noisy", "linear+repeated", "vote", "my-own", "odd+one", "std"]
    assert list(map(label, found)) == [
        "base", "STD hasty", "MTD (union) + noisy teacher", "MoT linear + repeated teacher",
        "vote of the STD students", "my-own", "odd+one", "STD",
    ]  # fmt: skip


def test_results_are_in_their_columns() -> None:
    runs = [a_run("std:a", s, x) for s, x in enumerate((0.25, 0.30, 0.35))] + [a_run("base", s, 0.2) for s in range(3)]
    grid = one(summarize(runs), "accuracy, the same steps per branch")
    assert grid.columns == (
        "arm",
        "seeds",
        "accuracy, %",
        "sd",
        "95 % interval",
        "lowest\non the way",
        "held-out\nloss",
    )
    assert {row.name: row.cells for row in grid.rows} == {
        "base": ("3", "20.0", "0.0", "-", "-", "2.000"),
        "STD a (best STD)": ("3", "30.0", "5.0", "17.6 to 42.4", "10.0", "1.800"),
    }
    assert cells(summarize(runs), "cost")["STD a"] == ("120", "4,000", "9")
    assert cells(summarize(runs), "gain, and change on other tasks")["STD a"] == ("+5.0 (-7.4 to +17.4)", "-10.0")


def test_of_many_rounds_some_are_shown_and_the_last_always() -> None:
    many = tuple(i / 100 for i in range(42))
    grid = one(summarize([a_run("mtd", 0, accuracy=many)]), "accuracy by round")
    assert len(grid.columns) <= ROUNDS + 2
    assert (grid.columns[1], grid.columns[-1]) == ("before", "round 41")
    assert grid.rows[0].cells[-1] == "41.0"


def test_a_vote_has_no_rounds() -> None:
    rows = cells(summarize(some_runs()), "accuracy by round")
    assert "vote of the STD students" not in rows
    assert rows["base"][1:] == ("", "")


def test_every_cell_is_seen_in_110_columns() -> None:
    sets = {f"a set of tasks {i}": (0.9, 0.5 + i / 10) for i in range(5)}
    runs = [r.model_copy(update={"forgetting": sets}) for r in some_runs(arms={**ARMS, "validation+noisy": 0.3})]
    found = summarize([r.model_copy(update={"seconds": 123456.0, "tokens": 10**10}) for r in runs])
    out = io.StringIO()
    console = Console(file=out, width=110)
    for table in comparison_tables(found):
        console.print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 110
    for grid in grids(found):
        for name, row, _ in grid.rows:
            assert any(name.split()[-1] in line and all(cell in line for cell in row) for line in lines), (name, row)
