"""The weights that teachers get by held-out questions: the rules alone, and in runs in which one teacher does harm."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stored, true_updates
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distillation import MakeConfig, records, same_run
from test_student import linear_layers, requantized

from mot_lora import UserError
from mot_lora.config import Config
from mot_lora.durable import DamagedError, read_record
from mot_lora.merging.weighting import by_accuracy, greedily
from mot_lora.reader import demo_path, parse_config
from mot_lora.records import Answer, EvaluationRecord, TrainRecord
from mot_lora.runs.distillation import run
from mot_lora.runs.ledger import read_ledger
from mot_lora.runs.rundir import RunDir
from mot_lora.training import branch, evaluation
from mot_lora.training.student import read_weight

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

counts = st.integers(1, 300)


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[float], int]:
    """Accuracies of some branches on n questions."""
    n = draw(counts)
    right = draw(st.lists(st.integers(0, n), min_size=1, max_size=6))
    return [r / n for r in right], n


# --- by accuracy -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(measured())
def test_a_weight_falls_by_e_for_each_standard_error_below_the_best(case: tuple[list[float], int]) -> None:
    accuracies, n = case
    found = by_accuracy(accuracies, n)
    best = max(accuracies)
    # the variance of one answer, with one right and one wrong answer more than were seen, and of two means of n
    right, wrong = best * n + 1, (1 - best) * n + 1
    variance = right * wrong / (n + 2) ** 2
    error = math.sqrt(variance / n + variance / n)
    for a, w, why in zip(accuracies, found.weights, found.reasons, strict=True):
        assert isinstance(w, float)
        want = math.exp((a - best) / error)
        if abs(want - 0.01) > 1e-9:
            assert w == pytest.approx(want if want > 0.01 else 0, rel=1e-9)
        assert f"accuracy {a * 100:.1f}%" in why
        assert ("the best" in why.replace("below the best", "")) == (a == best) == (w == 1)
        assert a == best or f"{(best - a) / error:.1f} errors below" in why
    for (a, v), (b, w) in itertools.combinations(zip(accuracies, found.weights, strict=True), 2):
        assert (v <= w) if a <= b else (v >= w)
        assert v == w or a != b


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(measured(), st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(case: tuple[list[float], int], mix: random.Random) -> None:
    accuracies, n = case
    order = mix.sample(range(len(accuracies)), len(accuracies))
    mixed = by_accuracy([accuracies[i] for i in order], n)
    plain = by_accuracy(accuracies, n)
    assert mixed.weights == tuple(plain.weights[i] for i in order)
    assert mixed.reasons == tuple(plain.reasons[i] for i in order)


def test_more_questions_tell_branches_apart() -> None:
    weights = [by_accuracy([0.5, 0.4], n).weights[1] for n in (10, 100, 1000, 10000)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0.5
    assert weights[-1] == 0
    assert isinstance(weights[-1], float)


@pytest.mark.parametrize(("accuracies", "n"), [([1.0, 1.0], 1), ([0.0, 0.0, 0.0], 50), ([1.0, 0.0], 400), ([0.3], 7)])
def test_where_all_or_none_is_right_there_still_are_weights(accuracies: list[float], n: int) -> None:
    weights = by_accuracy(accuracies, n).weights
    assert weights == tuple(1.0 if a == max(accuracies) else 0.0 for a in accuracies)


# --- greedily --------------------------------------------------------------------------------------------


def soup(accuracies: Sequence[float], scores: Mapping[frozenset[int], float]) -> frozenset[int]:
    """A greedy soup as its paper has it: sorted by accuracy, each kept if the mean with it is not worse."""
    kept: list[int] = []
    for i in sorted(range(len(accuracies)), key=lambda i: (-accuracies[i], i)):
        if not kept or scores[frozenset([*kept, i])] >= scores[frozenset(kept)]:
            kept.append(i)
    return frozenset(kept)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), st.integers(1, 5))
def test_greedy_weights_are_those_of_a_greedy_soup(data: st.DataObject, k: int) -> None:
    sets = [frozenset(c) for r in range(1, k + 1) for c in itertools.combinations(range(k), r)]
    scores = {s: data.draw(st.integers(0, 8)) / 8 for s in sets}
    alone = [scores[frozenset([i])] for i in range(k)]
    asked: list[tuple[int, ...]] = []

    def measure(places: tuple[int, ...]) -> float:
        asked.append(places)
        return scores[frozenset(places)]

    found = greedily(alone, measure)
    want = soup(alone, scores)
    assert found.weights == tuple(1.0 if i in want else 0.0 for i in range(k))
    assert scores[want] >= max(alone)  # never worse than the best branch alone, as measured
    assert [list(places) for places in asked] == [sorted(places) for places in asked]
    assert len(asked) == len(set(asked)) == k - 1
    joined = [i for i in range(k) if found.reasons[i].startswith("joined")]
    out = [i for i in range(k) if found.reasons[i].startswith("left out")]
    (first,) = set(range(k)) - {*joined, *out}
    assert alone[first] == max(alone)
    assert found.reasons[first] == f"accuracy {alone[first]:.1%}, the best alone"
    assert {first, *joined} == want


def test_branches_are_tried_from_the_best_down() -> None:
    asked: list[tuple[int, ...]] = []

    def measure(places: tuple[int, ...]) -> float:
        asked.append(places)
        return 0.9 if places == (1, 2) else 0.1

    found = greedily([0.1, 0.7, 0.5, 0.3], measure)
    assert asked == [(1, 2), (1, 2, 3), (0, 1, 2)]
    assert found.weights == (0.0, 1.0, 1.0, 0.0)
    assert found.reasons[2] == "joined: the merge went from 70.0% to 90.0%"
    assert found.reasons[3] == "left out: the merge would go from 90.0% to 10.0%"


# --- in a run --------------------------------------------------------------------------------------------


class Asked:
    """The real evaluation, with notes of what was asked; a script says how each weighed merge did, by its branches."""

    def __init__(self, script: Mapping[str, float], stop_at: int = 0) -> None:
        self.script = script
        self.stop_at = stop_at
        self.stage = ""
        self.weighed: list[str] = []
        self.trained = 0
        self.students: list[dict[str, torch.Tensor]] = []  # the weights, whenever all else was measured

    def progress(self, stage: str, *_: Any, **__: Any) -> None:
        self.stage = stage

    def train(self, *args: Any, **kwargs: Any) -> TrainRecord:
        self.trained += 1
        return branch.train(*args, **kwargs)

    def evaluate(self, model: Any, *args: Any, **kwargs: Any) -> tuple[EvaluationRecord, list[Answer]]:
        record, answers = evaluation.evaluate(model, *args, **kwargs)
        number, what, _ = f"{self.stage}, ,".split(", ", 2)
        if what.startswith("weigh "):
            who = what.removeprefix("weigh ")
            self.weighed.append(f"{number[6:]} {who}")
            if len(self.weighed) == self.stop_at:
                raise KeyboardInterrupt
            assert [a.question for a in answers] == QUESTIONS
            return record.model_copy(update={"accuracy": self.script[who]}), answers
        self.students.append({n: read_weight(layer) for n, layer in linear_layers(model).items()})
        return record, answers

    def run(self, config: Config, **settings: Any) -> Any:
        return run(config, train=self.train, evaluate=self.evaluate, progress=self.progress, **settings)


CHEAP = {"gradient_accumulation": 1, "activation_checkpointing": False}
QUESTIONS = [f"{i} + 3 = ?" for i in range(3)]
SCRIPT = {"a": 0.5, "b": 0.25, "c": 0.75, "a+c": 0.75, "a+b+c": 0.5}
ORDER = ["a", "b", "c", "a+c", "a+b+c"]


@pytest.fixture
def three(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """A run of three teachers with questions to weigh them by."""

    def make(output: str = "run", weights: Any = "greedy", **settings: Any) -> Config:
        plain = make_config()
        teachers = [t.model_dump(exclude_unset=True) for t in plain.teachers]
        (tmp_path / "v.jsonl").write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in QUESTIONS))
        return make_config(
            teachers=[*teachers, {"name": "c", "data": [t["data"] for t in teachers]}],
            branch={"steps": 2, "warmup": 0.0, "batch_size": 1, "learning_rate": 1e-2, "max_length": 128, **CHEAP},
            merge={"weights": weights, "momentum": 0.5, "scale": 1.5},
            eval={"data": plain.eval.data, "branches": False, "max_new_tokens": 1, "holdout": 0.05}
            | {"validation": str(tmp_path / "v.jsonl")},
            output=str(tmp_path / output),
            **settings,
        )

    return make


def test_a_greedy_run_is_one_with_these_weights_given(three: Callable[..., Config], tmp_path: Path) -> None:
    greedy, given = Asked(SCRIPT), Asked(SCRIPT)
    record = greedy.run(three("greedy"))
    given.run(three("given", [1, 0, 1]))
    assert greedy.weighed == [f"{n} {who}" for n in (1, 2) for who in ORDER]
    assert given.weighed == []
    assert [r.weights for r in record.rounds] == 2 * [(1.0, 0.0, 1.0)]
    assert record.rounds[0].reasons == (
        "joined: the merge went from 75.0% to 75.0%",
        "left out: the merge would go from 75.0% to 50.0%",
        "accuracy 75.0%, the best alone",
    )
    # what was tried on the way left no trace: the same student after every round, and the same measure of each fold
    assert len(greedy.students) == len(given.students) == 3
    for one, other in zip(greedy.students, given.students, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)
    one, other = records(tmp_path / "greedy"), records(tmp_path / "given")
    assert one.keys() == other.keys()
    for name in one:
        assert {**one[name], "reasons": []} == {**other[name], "reasons": []} if "round.json" in name else True
    assert all(0.5 < r.fold.survived < 1.5 for r in record.rounds)


def test_the_ledger_is_of_the_weights_that_were_found(three: Callable[..., Config], tmp_path: Path) -> None:
    config = three(weights="validation", rounds=1)
    # of 3 questions: s = sqrt(2 * .65 * .35 / 3)
    record = Asked({"a": 0.75, "b": 0.0, "c": 0.5}).run(config)
    s = math.sqrt(2 * 0.65 * 0.35 / 3)
    want = (1.0, math.exp(-0.75 / s), math.exp(-0.25 / s))
    assert record.rounds[0].weights == pytest.approx(want)
    (merged,) = read_ledger(RunDir(tmp_path / "run"), 1)
    updates = [true_updates(tmp_path / "run" / "round-001" / t) for t in "abc"]
    for module, delta in merged:
        mean = sum(w * u[module] for w, u in zip(want, updates, strict=True)) / sum(want)
        step = 1.5 * 1.5 * mean  # the scale, and the momentum of a first round
        torch.testing.assert_close(delta.double(), step, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_interruption_while_weighing_asks_nothing_twice(three: Callable[..., Config], tmp_path: Path) -> None:
    Asked(SCRIPT).run(three("whole"))
    config, asked, trained = three("stopped"), [], 0
    for stop in (2, 3, 1, 2):  # within the branches alone, within the merges, and in the next round
        one = Asked(SCRIPT, stop)
        with pytest.raises(KeyboardInterrupt):
            one.run(config)
        assert len(one.weighed) == stop
        asked += one.weighed[:-1]  # the last was cut off
        trained += one.trained
    last = Asked(SCRIPT)
    last.run(config)
    assert asked + last.weighed == [f"{n} {who}" for n in (1, 2) for who in ORDER]
    assert trained + last.trained == 6
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    again = Asked(SCRIPT)
    again.run(config)
    assert (again.weighed, again.trained, again.students) == ([], 0, [])


def test_each_measure_is_kept_beside_the_round(three: Callable[..., Config], tmp_path: Path) -> None:
    Asked(SCRIPT).run(three(rounds=1))
    folder = tmp_path / "run" / "round-001"
    kept = {f.name: read_record(f, EvaluationRecord) for f in folder.glob("validation-*.json")}
    assert {name: r.accuracy for name, r in kept.items() if r} == {
        "validation-0.json": 0.5,
        "validation-1.json": 0.25,
        "validation-2.json": 0.75,
        "validation-0-2.json": 0.75,
        "validation-0-1-2.json": 0.5,
    }
    assert all(r and r.questions == 3 and r.losses == {} for r in kept.values())


@pytest.mark.slow
def test_a_damaged_measure_is_set_aside_with_what_was_built_on_it(three: Callable[..., Config], tmp_path: Path) -> None:
    config, damaged = three(), "validation-0.json"
    Asked(SCRIPT).run(config)
    whole, out = Path(shutil.copytree(config.output, tmp_path / "whole")), Path(config.output)
    file = out / "round-001" / damaged
    file.write_text(file.read_text().replace('"accuracy": 0.5', '"accuracy": 0.9'))
    with pytest.raises(DamagedError, match=damaged):
        Asked(SCRIPT).run(config)
    one = Asked(SCRIPT)
    one.run(config, repair=True)
    assert one.trained == 3  # the round after
    assert one.weighed == [f"{n} {who}" for n in (1, 2) for who in ORDER]
    aside = sorted(str(f.relative_to(out / "damaged-001")) for f in (out / "damaged-001").rglob("*.json"))
    assert f"round-001/{damaged}" in aside
    assert "round-001/round.json" in aside
    assert "round-002/a/branch.json" in aside
    assert "round-001/a/branch.json" not in aside
    shutil.rmtree(out / "damaged-001")
    assert same_run(whole, out)


def test_weights_are_not_found_on_the_questions_that_are_reported(three: Callable[..., Config], tmp_path: Path) -> None:
    config = three()
    with (tmp_path / "v.jsonl").open("a") as file:
        file.write('{"question": " 1  + 2 =\\n?", "answer": "3"}\n')
    with pytest.raises(UserError, match=r"v\.jsonl: 1 of its questions are in eval\.data too \(1 \+ 2 = \?") as e:
        run(config)
    assert "\n" not in str(e.value)
    assert not Path(config.output).exists()


# --- a teacher that does harm ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Config]:
    """The demo's student, a careful teacher, and one whose every chain is of other problems, trained on hard."""
    folder = tmp_path_factory.mktemp("harmed")

    def lines(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in demo_path(name).read_text().splitlines()]

    def write(name: str, rows: list[dict[str, str]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    rows, short = lines("teachers/steps.jsonl")[:40], lines("short.jsonl")
    other = [*rows[7:], *rows[:7]]
    scrambled = [
        {**row, "reasoning": wrong["reasoning"][::-1], "answer": wrong["answer"] + "1"}
        for row, wrong in zip(rows, other, strict=True)
    ]
    teachers = [
        {"name": "scrambled", "data": write("scrambled.jsonl", scrambled), "learning_rate": 2e-2},
        {"name": "careful", "data": write("careful.jsonl", rows)},
    ]
    tree = {
        "student": str(demo_path("student")),
        "teachers": teachers,
        "rounds": 1,
        "branch": {
            "steps": 4,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 1e-4,
            "max_length": 512,
            "activation_checkpointing": False,
        },
        "lora": {"r": 4, "alpha": 8},
        "eval": {
            "data": write("asked.jsonl", short[:2]),
            "validation": write("dev.jsonl", short[40:60]),
            "branches": False,
            "max_new_tokens": 60,
            "batch_size": 20,
            "holdout": 0.05,
        },
        "device": "cpu",
    }
    return lambda weights: parse_config({**tree, "merge": {"weights": weights}, "output": str(folder / weights)}, "x")


@pytest.mark.parametrize("weights", ["validation", "greedy"])
def test_a_teacher_that_does_harm_is_seen_and_left_out(harmed: Callable[[str], Config], weights: str) -> None:
    config = harmed(weights)
    students: list[dict[str, torch.Tensor]] = []

    def evaluate(model: Any, *args: Any, **kwargs: Any) -> tuple[EvaluationRecord, list[Answer]]:
        students.append({n: read_weight(layer) for n, layer in linear_layers(model).items()})
        return evaluation.evaluate(model, *args, **kwargs)

    (done,) = run(config, evaluate=evaluate).rounds
    out = Path(config.output)
    said = json.loads((out / "round-001" / "round.json").read_text())
    assert said["weights"] == [0.0, 1.0]
    bad, good = (json.loads((out / "round-001" / f"validation-{i}.json").read_text())["accuracy"] for i in (0, 1))
    assert good - bad > 0.4
    if weights == "validation":
        assert said["reasons"][1] == f"accuracy {good:.1%}, the best"
        assert said["reasons"][0].startswith(f"accuracy {bad:.1%}, ")
    else:
        both = json.loads((out / "round-001" / "validation-0-1.json").read_text())["accuracy"]
        assert both < good
        assert said["reasons"][0] == f"left out: the merge would go from {good:.1%} to {both:.1%}"
    # so the student is the careful branch alone, folded
    update = true_updates(out / "round-001" / "careful")
    base = stored(demo_path("student"))
    for n, weight in students[-1].items():
        want = requantized(base[f"{n}.weight"].double() + update[n], "nf4")
        assert ((weight - want).abs() > 1e-6).double().mean() < 1e-3
    assert done.fold.relative_norm < 0.05
