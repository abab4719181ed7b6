"""A comparison at work: real arms of the demo's student, what they share, interruptions, and the vote."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forks import exit_status
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distillation import MakeConfig, files, same_run

from mot_lora.analysis.arms import Arm, placed
from mot_lora.analysis.comparison import ArmRun
from mot_lora.analysis.experiment import borrow, compare
from mot_lora.analysis.outcomes import read_arms
from mot_lora.config import Config
from mot_lora.data.scoring import elected
from mot_lora.durable import write_lines, write_record
from mot_lora.reader import demo_path, parse_config
from mot_lora.records import Answer, BranchRecord, EvaluationRecord, FoldRecord, RoundRecord, TrainRecord
from mot_lora.runs.distillation import run
from mot_lora.runs.rundir import RunDir
from mot_lora.training import branch

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

NAMES = ["base", "std", "mtd", "one_shot", "linear", "vote"]
FOLDERS = ["std-steps", "std-steps-total", "std-story", "std-story-total", "mtd", "mtd-total", "one_shot", "linear"]


class Trained:
    """The real training, with notes of whose it was; it may be interrupted before one of them."""

    def __init__(self, stop_before: int = 0) -> None:
        self.jobs: list[tuple[str, int, str]] = []
        self.stop_before = stop_before

    def __call__(self, *args: Any, job: Any, **kwargs: Any) -> TrainRecord:
        if len(self.jobs) + 1 == self.stop_before:
            raise KeyboardInterrupt
        self.jobs.append((job.run.name, job.round, job.teacher))
        return branch.train(*args, job=job, **kwargs)


class Done(NamedTuple):
    config: Config
    out: Path
    runs: list[ArmRun]
    jobs: list[tuple[str, int, str]]
    stages: list[str]


def answers_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A comparison of two of the demo's teachers, with one seed."""
    teachers = [{"name": t, "data": str(demo_path(f"teachers/{t}.jsonl")), "samples": 10} for t in ("steps", "story")]
    tree = {
        "student": str(demo_path("student")),
        "teachers": teachers,
        "rounds": 2,
        "branch": {
            "steps": 2,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "learning_rate": 2e-3,
            "max_length": 512,
            "activation_checkpointing": False,
        },
        "lora": {"r": 4, "alpha": 8},
        "eval": {
            "data": str(demo_path("short.jsonl")),
            "limit": 4,
            "max_new_tokens": 50,
            "batch_size": 4,
            "holdout": 0.3,
        },
        "stop": {"patience": 1},
        "device": "cpu",
    }
    config, out = parse_config(tree, "test"), tmp_path_factory.mktemp("compare") / "out"
    train, stages = Trained(), list[str]()
    runs = compare(config, [0], out, NAMES, train=train, progress=lambda stage, *_, **__: stages.append(stage))
    return Done(config, out, runs, train.jobs, stages)


def of(runs: Sequence[ArmRun], arm: str, budget: Any) -> ArmRun:
    (found,) = (r for r in runs if r.arm == arm and budget in r.budgets)
    return found


# --- what was run ----------------------------------------------------------------------------------------


def test_every_arm_took_the_steps_of_its_budget(done: Done) -> None:
    assert sorted(p.name for p in (done.out / "seed-0").iterdir()) == sorted(FOLDERS)
    taken: dict[str, int] = {}
    for folder in FOLDERS:
        records = (done.out / "seed-0" / folder).glob("round-*/*/branch.json")
        taken[folder] = sum(json.loads(r.read_text())["train"]["steps"] for r in records)
    assert taken == {f: 8 if f.endswith("-total") or f in ("one_shot", "linear") else 4 for f in FOLDERS}
    for arm in placed(done.config, 0, done.out, NAMES):
        for budget in arm.budgets:
            assert of(done.runs, arm.name, budget).branch_steps == taken[arm.folder]
    assert {r.branch_steps for r in done.runs if "total" in r.budgets and r.arm not in ("base", "vote")} == {8}
    assert [of(done.runs, "vote", b).branch_steps for b in ("steps", "total")] == [8, 16]
    assert of(done.runs, "base", "total") == of(done.runs, "base", "steps")
    assert of(done.runs, "base", "total").branch_steps == 0
    # though the config would stop after a round without gain
    rounds = {r.arm: len(r.accuracy) - 1 for r in done.runs}
    assert rounds == {"base": 0, "one_shot": 1, "std:steps": 2, "std:story": 2, "mtd": 2, "linear": 2, "vote": 2}


def test_what_arms_share_is_done_once(done: Done) -> None:
    both = ("steps", "story")
    alone = [(f"std-{t}{end}", n, t) for t in both for end in ("", "-total") for n in (1, 2)]
    unions = [(folder, n, "union") for folder in ("mtd", "mtd-total") for n in (1, 2)]
    # the first round of the merge is that of the single teachers; of two rounds with two teachers, one round with all
    # the steps has branches as long as those of a single teacher with the budget of all
    assert Counter(done.jobs) == Counter([*alone, *unions, ("linear", 2, "steps"), ("linear", 2, "story")])
    seed = done.out / "seed-0"
    for taker, giver, teacher in (
        *(("linear", f"std-{t}", t) for t in both),
        *(("one_shot", f"std-{t}-total", t) for t in both),
    ):
        one, other = (files(seed / arm / "round-001" / teacher, "*") for arm in (taker, giver))
        assert one == other
        assert len(one) >= 4
    before = [files(seed / folder, "before.json", "before.answers.jsonl") for folder in FOLDERS]
    assert all(b == before[0] for b in before)
    assert len(before[0]) == 2
    measured = {s.split(", ")[1] for s in done.stages if ", before, " in s}
    assert measured == {"std-steps"}


def test_an_arm_that_borrowed_is_the_plain_run_of_its_config(done: Done, tmp_path: Path) -> None:
    (arm,) = (a for a in placed(done.config, 0, done.out, NAMES) if a.name == "linear")
    train = Trained()
    record = run(arm.at(tmp_path / "plain").config, train=train)
    assert len(train.jobs) == 4
    assert same_run(tmp_path / "plain", done.out / "seed-0" / "linear")
    found = of(done.runs, "linear", "total")
    assert found.accuracy == (record.before.accuracy, *(r.evaluation.accuracy for r in record.rounds))
    assert found.loss == (record.before.loss, *(r.evaluation.loss for r in record.rounds))
    answers = answers_of(tmp_path / "plain" / "round-002" / "answers.jsonl")
    assert found.scores == tuple(a["score"] for a in answers)
    assert len(found.scores) == 4
    assert found.tokens == sum(b.train.tokens for b in record.branches)


def test_the_base_is_the_student_before_every_run(done: Done) -> None:
    base = of(done.runs, "base", "steps")
    for arm in done.runs:
        assert arm.accuracy[0] == base.accuracy[0]
        assert arm.arm == "vote" or arm.loss[0] == base.loss[0]
    answers = answers_of(done.out / "seed-0" / "mtd" / "before.answers.jsonl")
    assert base.scores == tuple(a["score"] for a in answers)
    assert base.accuracy == (sum(base.scores) / 4,)
    assert (base.tokens, base.seconds) == (0, 0)
    assert base.accuracy[0] > 0


def test_the_vote_is_that_of_the_answers_on_disk(done: Done) -> None:
    for budget, end in (("steps", ""), ("total", "-total")):
        vote = of(done.runs, "vote", budget)
        for number, accuracy in enumerate(vote.accuracy):
            place = f"round-{number:03d}/answers.jsonl" if number else "before.answers.jsonl"
            both = [answers_of(done.out / "seed-0" / f"std-{t}{end}" / place) for t in ("steps", "story")]
            scores: list[float] = []
            for one, other in zip(*both, strict=True):
                assert one["question"] == other["question"]
                finals = [a["texts"][0].partition("</think>")[2].strip() for a in (one, other)]
                first = next((f for f in finals if f), "")  # of two, the first that ends counts
                scores.append(float(first == one["answer"]))
            assert accuracy == sum(scores) / 4
        assert vote.scores == tuple(scores)


def test_the_same_call_again_does_nothing(done: Done) -> None:
    names = ("branch.json", "round.json", "before.json", "*.safetensors", "answers.jsonl")
    before = {f: f.stat().st_mtime_ns for n in names for f in done.out.rglob(n)}
    train, stages = Trained(), list[str]()
    again = compare(done.config, [0], done.out, NAMES, train=train, progress=lambda s, *_, **__: stages.append(s))
    assert again == done.runs
    assert train.jobs == []
    assert not [s for s in stages if not s.split(", ")[-1].startswith("read ")]
    assert {f: f.stat().st_mtime_ns for n in names for f in done.out.rglob(n)} == before


def test_arms_that_are_not_finished_are_left_out(done: Done, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done.out, tmp_path / "out"))
    assert read_arms(done.config, [0, 5], out, NAMES) == done.runs
    (out / "seed-0" / "linear" / "round-002" / "round.json").unlink()
    found = read_arms(done.config, [0], out, NAMES)
    assert found == [r for r in done.runs if r.arm != "linear"]
    # a vote needs all its voters
    shutil.rmtree(out / "seed-0" / "std-story")
    found = read_arms(done.config, [0], out, NAMES)
    left = {("linear", "steps"), ("std:story", "steps"), ("vote", "steps")}
    assert found == [r for r in done.runs if (r.arm, r.budgets[0]) not in left]
    assert read_arms(done.config, [0], out, ["mtd"]) == [r for r in done.runs if r.arm == "mtd"]
    assert read_arms(done.config, [0], tmp_path / "nothing", NAMES) == []


# --- what is not shared ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(make_config: MakeConfig) -> Callable[..., Config]:
    """A comparison of two teachers on a tiny student."""

    def make(**settings: Any) -> Config:
        steps = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_length": 128}
        plain = {"data": make_config().eval.data, "limit": 1, "max_new_tokens": 1, "holdout": 0.1}
        return make_config(
            **{"branch": {**steps, "activation_checkpointing": False}, "eval": plain, "rounds": 1, **settings}
        )

    return make


@pytest.mark.slow
def test_another_seed_borrows_nothing(tiny: Callable[..., Config], tmp_path: Path) -> None:
    train = Trained()
    runs = compare(tiny(), [3, 4], tmp_path / "out", ["std", "linear"], ["steps"], train=train)
    assert train.jobs == 2 * [("std-a", 1, "a"), ("std-b", 1, "b")]
    assert [(r.seed, r.arm) for r in runs] == [(s, a) for s in (3, 4) for a in ("std:a", "std:b", "linear")]
    three, four = (files(tmp_path / "out" / f"seed-{s}" / "linear", "*.safetensors") for s in (3, 4))
    assert three.keys() == four.keys()
    assert not any(three[name] == four[name] for name in three)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "measured", "trained"),
    [
        ({}, 0, []),
        ({"lora": {"r": 2, "alpha": 8}}, 0, ["a", "b"]),  # the student before has no adapter
        ({"seed": 1}, 1, ["a", "b"]),
        ({"quantization": "none"}, 1, ["a", "b"]),
        ({"eval": {"holdout": 0.3}}, 1, ["a", "b"]),
        ("b.jsonl", 1, ["a", "b"]),
    ],
    ids=str,
)
def test_only_what_comes_out_the_same_is_borrowed(
    tiny: Callable[..., Config], tmp_path: Path, change: Any, measured: int, trained: list[str]
) -> None:
    compare(tiny(), [0], tmp_path / "out", ["std"], ["steps"])
    others = [RunDir(tmp_path / "out" / "seed-0" / f"std-{t}") for t in "ab"]
    config = tiny()
    if change == "b.jsonl":
        with Path(config.teachers[1].sources[0]).open("a") as file:
            file.write('{"question": "one more", "answer": "1"}\n')
    else:
        config = tiny(**change)
    (arm,) = placed(config, config.seed, tmp_path / "other", ["linear"])
    train, stages = Trained(), set[str]()
    run(
        arm.config,
        train=train,
        progress=lambda s, *_, **__: stages.add(s),
        started=lambda _: borrow(arm.config, others),
    )
    assert [t for _, _, t in train.jobs] == trained
    assert len({s for s in stages if s == "before, loss"}) == measured


# --- interrupted -----------------------------------------------------------------------------------------

ARMS = ["mtd", "linear"]  # mtd, mtd-total, linear


def test_an_interrupted_comparison_goes_on_where_it_stopped(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(rounds=2)
    whole, first, second = Trained(), Trained(stop_before=6), Trained()
    runs = compare(config, [0], tmp_path / "whole", ARMS, train=whole)
    with pytest.raises(KeyboardInterrupt):
        compare(config, [0], tmp_path / "parts", ARMS, train=first)
    assert [f for f, _, _ in first.jobs] == ["mtd", "mtd", "mtd-total", "mtd-total", "linear"]
    assert [r.arm for r in read_arms(config, [0], tmp_path / "parts", ARMS)] == ["mtd", "mtd"]
    again = compare(config, [0], tmp_path / "parts", ARMS, train=second)
    assert first.jobs + second.jobs == whole.jobs
    assert [timeless(r) for r in again] == [timeless(r) for r in runs]
    for folder in ("mtd", "mtd-total", "linear"):
        assert same_run(tmp_path / "whole" / "seed-0" / folder, tmp_path / "parts" / "seed-0" / folder)


def timeless(arm: ArmRun) -> ArmRun:
    return arm.model_copy(update={"seconds": 0.0})


def killed(config: Config, out: Path) -> None:
    """Compare until a branch of the last arm is trained, and be killed there."""

    def progress(stage: str, done: int, *_: Any, **__: Any) -> None:
        if stage == "seed 0, linear, round 1, b, train" and done:
            os.kill(os.getpid(), signal.SIGKILL)

    compare(config, [0], out, ARMS, progress=progress)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_stopped(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(rounds=2)
    assert exit_status(killed, config, tmp_path / "parts") == -signal.SIGKILL
    train = Trained()
    again = compare(config, [0], tmp_path / "parts", ARMS, train=train)
    assert train.jobs == [("linear", 1, "b"), ("linear", 2, "a"), ("linear", 2, "b")]
    whole = compare(config, [0], tmp_path / "whole", ARMS)
    assert [timeless(r) for r in again] == [timeless(r) for r in whole]
    for folder in ("mtd", "mtd-total", "linear"):
        assert same_run(tmp_path / "whole" / "seed-0" / folder, tmp_path / "parts" / "seed-0" / folder)


# --- the vote --------------------------------------------------------------------------------------------


def plant(arm: Arm, answers: Sequence[Answer]) -> None:
    """A finished run of one round whose student answers so, without a student."""
    (teacher,) = arm.config.teachers
    rundir = RunDir(Path(arm.config.output))
    rundir.begin(arm.config, {"versions": {"mot-lora": "0"}, "inputs": {}})
    before = EvaluationRecord(questions=len(answers), accuracy=0.0, interval=(0.0, 1.0))
    write_record(rundir.path / "before.json", before)
    write_lines(rundir.before_answers, [a.model_copy(update={"texts": ("<think>",) * len(a.texts)}) for a in answers])
    train = TrainRecord(steps=10, tokens=100, loss=1.0)
    write_record(
        rundir.branch(1, teacher.name) / "branch.json",
        BranchRecord(round=1, teacher=teacher.name, learning_rate=1.0, train=train),
    )
    fold = FoldRecord(relative_norm=0.0, survived=1.0, sign_conflict=0.0, cosine=(), opposition=())
    record = RoundRecord(
        round=1,
        teachers=(teacher.name,),
        method="linear",
        weights=(1.0,),
        seed=0,
        fold=fold,
        layers={},
        modules={},
        fold_seconds=0.0,
        evaluation=before,
    )
    write_lines(rundir.round(1) / "answers.jsonl", answers)
    write_record(rundir.round(1) / "round.json", record)


CASES: list[tuple[str, list[list[str]], float]] = [
    # what is right, each sample's ballot by a, b, c; the score
    ("7", [["7", "8", "7"]], 1),
    ("7", [["8", "7", "8"]], 0),
    ("7", [["8", "7", "7"]], 1),  # though the first is wrong
    ("7", [["7", "8", "9"]], 1),  # of a tie, the first
    ("7", [["8", "7", "9"]], 0),
    ("1/2", [["0.3", "0.5", "1/2"]], 1),  # the same, differently written
    ("0.5", [["1/3", "\\boxed{\\frac{1}{2}}", "0.5"]], 1),
    ("7", [["<think>8", "<think>8", "<think>so</think> 7"]], 1),  # what never ends does not vote
    ("7", [["<think>7", "<think>7", "<think>so</think> 8"]], 0),
    ("7", [["<think>7", "<think>7", "<think>7"]], 0),
    ("7", [["", "7", "</think>"]], 1),
    ("yes", [["no", "Yes", "yes"]], 1),
    ("7", [["7", "7", "8"], ["8", "8", "7"]], 0.5),  # sample by sample
    ("7", [["7", "8", "8"], ["8", "7", "7"], ["7", "7", "7"], ["8", "9", "7"]], 0.5),
]


def test_the_most_frequent_answer_of_the_single_teachers_counts(tmp_path: Path) -> None:
    teachers = [{"name": t, "data": f"{t}.jsonl"} for t in "abc"]
    tree = {"student": "s", "teachers": teachers, "rounds": 1, "eval": {"data": "q.jsonl"}}
    config = parse_config({**tree, "compare": {"noisy": {"name": "noisy", "data": "n.jsonl"}}}, "test")
    names = ["std", "noisy", "vote"]
    for arm in placed(config, 0, tmp_path, names):
        if arm.name.startswith("std") and "steps" in arm.budgets:
            name = arm.config.teachers[0].name
            texts = [
                tuple(b["abc".index(name)] if name != "noisy" else gold for b in ballots) for gold, ballots, _ in CASES
            ]
            plant(
                arm,
                [
                    Answer(question=f"question {i}", answer=gold, texts=t, score=0.0)
                    for i, ((gold, _, _), t) in enumerate(zip(CASES, texts, strict=True))
                ],
            )
    runs = read_arms(config, [0], tmp_path, names)
    (vote,) = (r for r in runs if r.arm == "vote")  # in the other budget no voter is finished
    assert {r.arm for r in runs} == {"std:a", "std:b", "std:c", "std:noisy", "vote"}
    assert dict(enumerate(vote.scores)) == {i: score for i, (_, _, score) in enumerate(CASES)}
    # the noisy teacher's student is right everywhere, and has no part in it
    assert vote.accuracy == (0.0, pytest.approx(sum(s for _, _, s in CASES) / len(CASES)))
    assert (vote.budgets, vote.branch_steps, vote.tokens) == (("steps",), 30, 300)


FORMS = [
    ["7", "7.0", "<think>3 + 4</think> 7", "\\boxed{7}"],
    ["1/2", "0.5", "<think>.5</think>\n\n$\\frac{1}{2}$"],
    ["-3", "<think></think>-3.0"],
    ["12", "12.00"],
    ["<think>7", "", "</think>"],  # no votes
]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data(), st.randoms(use_true_random=False))
def test_the_order_of_voters_does_not_move_a_majority(data: st.DataObject, mix: random.Random) -> None:
    winner = data.draw(st.integers(0, 3))
    others = data.draw(st.lists(st.integers(0, 4).filter(lambda i: i != winner), max_size=4))
    count = sum(i != 4 for i in others) + 1  # a strict majority of those that vote
    voters = [winner] * count + others
    texts = [data.draw(st.sampled_from(FORMS[i])) for i in voters]
    for _ in range(2):
        order = mix.sample(range(len(texts)), len(texts))
        assert elected([texts[i] for i in order]) in FORMS[winner]
