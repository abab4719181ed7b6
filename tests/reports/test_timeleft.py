"""The estimate of the time left: exact for steady work, never negative, soon over a pause, and right in mid-plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_lora.reports.timeleft import Pace, TimeLeft

KINDS = ("train", "loss", "answer")
SECONDS = {"train": 10.0, "loss": 2.0, "answer": 4.0, "fold": 1.0}


def a_plan(rounds: int, teachers: tuple[str, ...] = ("a", "b")) -> list[str]:
    plan = ["before, loss", "before, answer"]
    for n in range(1, rounds + 1):
        plan += [f"round {n}, {t}, {kind}" for t in teachers for kind in KINDS]
        plan += [f"round {n}, {kind}" for kind in ("fold", "loss", "answer")]
    return plan


def took(stage: str) -> float:
    return SECONDS[stage.rpartition(", ")[2]]


def work(left: TimeLeft, stages: list[str], now: float = 0.0, units: int = 5) -> float:
    """Stages at their steady rate, each from its start to the moment the next one begins."""
    for stage in stages:
        for done in range(units + 1):
            left.update(stage, done, units, now + took(stage) * done / units)
        now += took(stage)
    return now


@given(
    first=st.integers(0, 50),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    todo=st.integers(0, 100),
    pace=st.floats(1e-3, 1e3),
    began=st.floats(0, 1e5),
)
def test_a_steady_rate_gives_the_exact_time_wherever_the_stage_began(
    first: int, steps: list[int], todo: int, pace: float, began: float
) -> None:
    left = TimeLeft()
    done, now, total = first, began, first + sum(steps) + todo
    left.update("train", done, total, now)
    for step in steps:
        done, now = done + step, now + step * pace
        left.update("train", done, total, now)
    assert left.stage(now) == pytest.approx(todo * pace, rel=1e-6, abs=1e-6)
    assert left.run(now) is None  # there is no plan


@given(st.integers(1, 4), st.data())
def test_the_run_is_exact_anywhere_in_a_steady_plan_once_a_round_was_seen(rounds: int, data: st.DataObject) -> None:
    plan = a_plan(rounds + 1)
    at = data.draw(st.integers(len(a_plan(1)), len(plan) - 1))
    done = data.draw(st.integers(0, 5))
    left = TimeLeft(plan)
    now = work(left, plan[:at])
    for i in range(done + 1):
        left.update(plan[at], i, 5, now + took(plan[at]) * i / 5)
    now += took(plan[at]) * done / 5
    rest = took(plan[at]) * (5 - done) / 5
    assert left.stage(now) == pytest.approx(rest)  # known from its kin before its first step is done
    assert left.run(now) == pytest.approx(rest + sum(took(s) for s in plan[at + 1 :]))


def test_the_branch_is_its_training_and_its_measures() -> None:
    plan = a_plan(1)
    left = TimeLeft(plan)
    now = work(left, plan[:2])
    assert left.branch(now) is None  # before is nobody's branch
    left.update("round 1, a, train", 0, 10, now)
    left.update("round 1, a, train", 5, 10, now + 5)
    assert left.branch(now + 5) == pytest.approx(5 + 2 + 4)
    now = work(left, ["round 1, a, train", "round 1, a, loss"], now + 5)
    assert left.branch(now) == pytest.approx(4)
    left.update("round 1, fold", 1, 5, now)
    assert left.branch(now) is None


def test_the_run_is_unknown_until_each_kind_but_the_short_fold_was_seen() -> None:
    plan = a_plan(1)
    left = TimeLeft(plan)
    now = work(left, plan[:2])
    assert left.run(now) is None
    left.update("round 1, a, train", 0, 10, now)
    assert (left.stage(now), left.run(now)) == (None, None)
    left.update("round 1, a, train", 1, 10, now + 1)
    assert left.stage(now + 1) == pytest.approx(9)
    assert left.run(now + 1) == pytest.approx(9 + 6 + (10 + 6) + 6)


def test_a_run_that_goes_on_in_the_middle_of_a_branch_scales_what_it_saw() -> None:
    plan = [s for s in a_plan(2) if s.endswith("train")]
    left = TimeLeft(plan)
    left.update("load the student", 0, 1, 0.0)
    left.update("load the student", 1, 1, 70.0)
    for done in (80, 90, 100):
        left.update("round 1, b, train", done, 100, 100 + (done - 80) / 10)
    assert left.run(102.0) == pytest.approx(2 * 10)  # two branches of 100 steps at 10 a second, and not 20 steps
    left.update("round 2, a, train", 0, 100, 102.0)
    assert left.stage(102.0) == pytest.approx(10)
    assert left.run(102.0) == pytest.approx(20)


def test_a_stage_is_like_its_own_teachers_before_and_like_another_ones_only_else() -> None:
    left = TimeLeft(["round 1, a, train", "round 1, b, train", "round 2, a, train", "round 2, b, train"])
    left.update("round 1, a, train", 0, 1, 0.0)
    left.update("round 1, a, train", 1, 1, 10.0)
    assert left.run(10.0) == pytest.approx(30)
    left.update("round 1, b, train", 0, 1, 10.0)
    left.update("round 1, b, train", 1, 1, 110.0)
    assert left.run(110.0) == pytest.approx(10 + 100)
    measures = TimeLeft(["before, loss", "round 1, a, loss", "round 1, b, loss", "round 1, loss"])
    for stage, began, ended in (("before, loss", 0.0, 50.0), ("round 1, a, loss", 50.0, 57.0)):
        measures.update(stage, 0, 2, began)
        measures.update(stage, 2, 2, ended)
    assert measures.run(57.0) == pytest.approx(7 + 50)


def test_skipped_stages_are_not_waited_for() -> None:
    plan = a_plan(2)
    left = TimeLeft(plan)
    now = work(left, plan[: plan.index("round 1, loss") + 1])
    skipped = plan.index("round 2, a, answer")
    work(left, [plan[skipped]], now)
    assert left.run(now + 4) == pytest.approx(sum(took(s) for s in plan[skipped + 1 :]))


def test_a_pause_is_forgotten() -> None:
    left = TimeLeft()
    now = 0.0
    for done in range(400):
        left.update("train", done, 1000, now)
        now += 1.0 + (600.0 if done == 100 else 0.0)
        if done == 101:
            assert (left.stage(now) or 0) > 2 * 900
    assert left.stage(now) == pytest.approx(600, rel=0.02)
    assert now / 400 * 600 > 1.5 * 600  # what the mean rate of the stage would say


def test_time_runs_on_within_a_step_and_stands_still_when_the_step_is_late() -> None:
    left = TimeLeft()
    for done in (0, 2, 4):
        left.update("answer", done, 10, 10.0 * done)
    assert [left.stage(40 + late) for late in (0, 5, 20, 21, 1000)] == pytest.approx([60, 55, 40, 40, 40])


stages = st.sampled_from([*a_plan(2), "load the student", "write", "", ", ", "a, b, c, d"])
numbers = st.integers(-3, 20)
calls = st.lists(st.tuples(stages, numbers, numbers, st.floats(-5, 100)), max_size=40)


@given(calls, st.floats(-10, 1e6))
def test_whatever_comes_nothing_is_negative_and_nothing_fails(
    calls: list[tuple[str, int, int, float]], later: float
) -> None:
    left = TimeLeft(a_plan(2))
    now = 0.0
    for stage, done, total, passed in calls:  # stages go back, totals change, the clock stands still or goes back
        now += passed
        left.update(stage, done, total, now)
        for at in (now, now + later):
            for seconds in (left.stage(at), left.branch(at), left.run(at)):
                assert seconds is None or seconds >= 0


def test_a_pace_counts_only_what_it_saw_and_only_forward() -> None:
    pace = Pace()
    pace.see(1000, 0.0)
    assert (pace.seconds, pace.left(5, 1.0)) == (None, None)
    pace.see(1010, 5.0)
    pace.see(0, 6.0)
    pace.see(10, 11.0)
    assert pace.seconds == pytest.approx(0.5)
