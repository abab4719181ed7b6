import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import stored, true_updates
from forks import exit_status
from peft import PeftModel
from test_student import linear_layers, requantized

from mot_lora import UserError
from mot_lora.config import Config, RoundMergeConfig
from mot_lora.data.encoding import collate
from mot_lora.data.traces import Example
from mot_lora.records import Answer, EvaluationRecord, RunRecord, TrainRecord
from mot_lora.runs.distillation import Evaluate, run
from mot_lora.runs.rundir import RunDir
from mot_lora.training import branch, evaluation
from mot_lora.training.job import Job
from mot_lora.training.student import read_weight

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

MakeConfig = Callable[..., Config]


class Spied:
    """The real training and evaluation, with notes of what they were called with."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.measured: list[dict[str, torch.Tensor]] = []  # the weights, whenever the adapter was off

    def train(self, model: PeftModel, *args: Any, seed: int, **kwargs: Any) -> TrainRecord:
        self.trained.append(seed)
        return branch.train(model, *args, seed=seed, **kwargs)

    def evaluate(self, model: PeftModel, *args: Any, **kwargs: Any) -> tuple[EvaluationRecord, list[Answer]]:
        if all(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A")):
            self.measured.append({n: read_weight(layer) for n, layer in linear_layers(model).items()})
        return evaluation.evaluate(model, *args, **kwargs)


def files(folder: Path, *names: str) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for n in names for f in sorted(folder.rglob(n))}


def timeless(value: Any) -> Any:
    """A record without the seconds that things took, and the record's own checksum, which is also of those."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.endswith("seconds") and k != "sha256"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def records(folder: Path) -> dict[str, Any]:
    return {name: timeless(json.loads(content)) for name, content in files(folder, "branch.json", "round.json").items()}


def same_run(one: Path, other: Path) -> bool:
    """Whether two finished runs hold the same, but for the seconds that it took."""
    assert len(files(one, "adapter_model.safetensors")) >= 2
    names = ("adapter_model.safetensors", "adapter_config.json", "answers.jsonl", "before.answers.jsonl")
    return files(one, *names) == files(other, *names) and records(one) == records(other)


# --- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_the_student_is_always_w0_plus_the_ledger_rounded_once(
    student: Path, make_config: MakeConfig, weights: tuple[float, ...] | None
) -> None:
    config = make_config(student=str(student), merge={"weights": weights, "scale": 1.5})
    spied = Spied()
    record = run(config, train=spied.train, evaluate=spied.evaluate)
    assert [r.round for r in record.rounds] == [1, 2]
    assert [(b.round, b.teacher) for b in record.branches] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    first_a, first_b, second_a, second_b = spied.trained
    assert first_a == first_b != second_a == second_b  # one order of problems for the branches of a round
    assert len(spied.measured) == 3

    share_a, share_b = (0.5, 0.5) if weights is None else (0.75, 0.25)
    base = stored(student)
    total = {n: base[f"{n}.weight"].double() for n in spied.measured[0]}
    out = Path(config.output)
    for number, weights_now in enumerate(spied.measured):
        if number:
            a, b = (true_updates(out / f"round-{number:03d}" / t) for t in "ab")
            assert set(a) == set(total)
            assert all(bool(a[n].any() and b[n].any()) for n in total)
            total = {n: w + 1.5 * (share_a * a[n] + share_b * b[n]) for n, w in total.items()}
        off = sum(int(((weights_now[n] - requantized(w, "nf4")).abs() > 1e-6).sum()) for n, w in total.items())
        assert off <= sum(w.numel() for w in total.values()) // 1000

    first = record.rounds[0].fold
    assert 0.5 < first.survived < 1.5
    d = torch.cat([(total[n] - base[f"{n}.weight"].double()).flatten() for n in total]).norm()
    assert d > 0
    assert set(record.rounds[0].layers) == {"model.layers.0", "model.layers.1"}


def test_the_record_says_how_large_an_update_was(make_config: MakeConfig, qwen3: Path) -> None:
    config = make_config(rounds=1)
    fold = run(config).rounds[0].fold
    a, b = (true_updates(Path(config.output) / "round-001" / t) for t in "ab")
    base = stored(qwen3)
    flat_a, flat_b = (torch.cat([x[n].flatten() for n in sorted(a)]) for x in (a, b))
    w = torch.cat([base[f"{n}.weight"].double().flatten() for n in sorted(a)])
    assert fold.relative_norm == pytest.approx(float(((flat_a + flat_b) / 2).norm() / w.norm()), rel=1e-4)
    cosine = float(flat_a @ flat_b / flat_a.norm() / flat_b.norm())
    assert fold.cosine[0][1] == pytest.approx(cosine, rel=1e-4)
    assert fold.sign_conflict == pytest.approx(float((flat_a * flat_b < 0).double().mean()), abs=1e-3)


def test_branches_of_a_round_share_a_and_differ_between_rounds(make_config: MakeConfig) -> None:
    starts: list[dict[str, torch.Tensor]] = []

    def train(model: PeftModel, *args: Any, **kwargs: Any) -> TrainRecord:
        starts.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
        return branch.train(model, *args, **kwargs)

    run(make_config(), train=train)
    one_a, one_b, two_a, two_b = starts
    assert all(torch.equal(one_a[n], one_b[n]) and torch.equal(two_a[n], two_b[n]) for n in one_a)
    assert not any(torch.equal(one_a[n], two_a[n]) for n in one_a if "lora_A" in n)
    assert not any(p.any() for start in starts for n, p in start.items() if "lora_B" in n)


def test_the_saved_evaluation_is_that_of_the_branch_and_of_the_student(make_config: MakeConfig) -> None:
    record = run(make_config(eval={"holdout": 0.3}))
    losses = [record.before.losses["a"], *(r.evaluation.losses["a"] for r in record.rounds)]
    assert losses[0] > losses[1] > losses[2]
    for b in record.branches:
        assert b.evaluation is not None
        # a branch starts from the student before it and has learned
        assert b.evaluation.losses[b.teacher] < losses[b.round - 1]
    assert record.metric == "loss"
    assert record.before.accuracy is None
    assert record.best == 2
    assert record.stopped == "all rounds are done"


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": {"method": "ties", "density": 0.5}},
        {"merge": {"method": "dare_linear", "density": 0.5}},
        {"merge": {"method": "dare_ties", "density": 0.5, "weights": [2, 1]}, "quantization": "int8"},
        {"merge": {"method": "ties", "density": {"q_proj": 0.3, ".*": 0.6}, "scale": {"mlp.*": 2}, "space": "core"}},
        {"merge": {"method": "statistics_of_tests:median", "weights": [{"q_proj": 2, ".*": 1}, 1]}},
        {"quantization": "none", "eval": {"branches": False, "holdout": 0.2}},
    ],
)
def test_every_method_and_quantization_runs_and_resumes_to_the_same_student(
    make_config: MakeConfig, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "statistics_of_tests.py").write_text("def median(deltas, weights): return deltas.median(0).values")
    monkeypatch.syspath_prepend(str(tmp_path))
    whole, parts = (make_config(output=str(tmp_path / name), **changes) for name in ("whole", "parts"))
    record = run(whole)
    assert all(r.fold.relative_norm > 0.01 for r in record.rounds)
    run(parts.model_copy(update={"rounds": 1}))
    run(parts)
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    merge = changes.get("merge", {})
    assert [(r.method, r.density) for r in record.rounds] == 2 * [(merge.get("method", "linear"), merge.get("density"))]


def largest(deltas: torch.Tensor, _weights: Sequence[float]) -> torch.Tensor:
    """The entry of the update that is largest there."""
    return deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


def test_a_function_of_ones_own_merges_a_run_and_its_export(make_config: MakeConfig, qwen3: Path) -> None:
    config = make_config(rounds=1, quantization="none")
    config = config.model_copy(update={"merge": RoundMergeConfig(method=cast("Any", largest))})
    spied = Spied()
    record = run(config, evaluate=spied.evaluate)
    assert record.rounds[0].method == f"{__name__}:largest"
    a, b = (true_updates(Path(config.output) / "round-001" / t) for t in "ab")
    base = stored(qwen3)
    for n, weight in spied.measured[1].items():
        want = base[f"{n}.weight"].double() + largest(torch.stack([a[n], b[n]]), [1, 1])
        torch.testing.assert_close(weight.double(), want, rtol=1e-6, atol=1e-7)


def test_one_teacher_is_plain_distillation(make_config: MakeConfig, qwen3: Path) -> None:
    config = make_config(rounds=1, quantization="none")
    config = config.model_copy(update={"teachers": config.teachers[:1]})
    spied = Spied()
    record = run(config, evaluate=spied.evaluate)
    update = true_updates(Path(config.output) / "round-001" / "a")
    base = stored(qwen3)
    for n, weight in spied.measured[1].items():
        torch.testing.assert_close(weight.double(), base[f"{n}.weight"].double() + update[n], rtol=1e-6, atol=1e-7)
    assert record.rounds[0].evaluation.losses == pytest.approx(record.branches[0].evaluation.losses, rel=1e-4)


def test_epochs_take_the_steps_that_the_data_has(make_config: MakeConfig) -> None:
    config = make_config(rounds=1, branch={"epochs": 1, "batch_size": 4, "gradient_accumulation": 1, "max_length": 128})
    record = run(config)
    held = json.loads((Path(config.output) / "round-001" / "a" / "branch.json").read_text())["train"]
    assert [b.train.steps for b in record.branches] == [held["steps"]] * 2
    assert 4 <= held["steps"] <= 6  # 24 traces, a fifth held out


def test_a_callers_own_training_takes_the_place_of_ours(make_config: MakeConfig) -> None:
    def adamw(
        model: PeftModel,
        tokenizer: Any,
        examples: Sequence[Example],
        settings: Any,
        *,
        seed: int,
        job: Job,
        progress: Any,
    ) -> TrainRecord:
        jobs.append((job.round, job.teacher))
        batch = collate(examples, tokenizer.pad_token_id)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=settings.learning_rate)
        torch.manual_seed(seed)
        losses: list[float] = []
        for step in range(5):
            loss = model.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress("own", step + 1, 5)
        assert losses[-1] < losses[0]
        return TrainRecord(steps=5, tokens=5, loss=sum(losses) / 5)

    stages: list[str] = []
    jobs: list[tuple[int, str]] = []
    record = run(make_config(rounds=1), train=adamw, progress=lambda stage, *_, **__: stages.append(stage))
    assert [b.train.steps for b in record.branches] == [5, 5]
    assert jobs == [(1, "a"), (1, "b")]
    assert stages.count("round 1, a, own") == 5
    assert record.rounds[0].evaluation.losses["a"] < record.before.losses["a"]


# --- stopping ------------------------------------------------------------------------------------


def scripted(losses: Sequence[float]) -> Evaluate:
    """The real evaluation of the student, with its losses replaced by given ones."""
    left = iter(losses)

    def evaluate(*args: Any, **kwargs: Any) -> tuple[EvaluationRecord, list[Answer]]:
        record, answers = evaluation.evaluate(*args, **kwargs)
        return record.model_copy(update={"losses": {"a": next(left)}}), answers

    return evaluate


def test_patience_stops_and_the_best_round_is_told(make_config: MakeConfig) -> None:
    config = make_config(
        rounds=9,
        stop={"metric": "loss", "patience": 2},
        eval={"branches": False, "holdout": 0.2},
        branch={"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "max_length": 128},
    )
    record = run(config, evaluate=scripted([3.0, 2.5, 1.0, 1.0, 2.0]))
    assert [r.round for r in record.rounds] == [1, 2, 3, 4]
    assert record.best == 2
    assert record.stopped == "loss has not improved for 2 rounds"
    # with more patience the same run goes on
    patient = config.model_copy(update={"rounds": 5, "stop": config.stop.model_copy(update={"patience": 3})})
    later = run(patient, evaluate=scripted([0.5]))
    assert later.rounds[:4] == record.rounds
    assert (later.best, len(later.rounds), later.stopped) == (5, 5, "all rounds are done")


# --- resuming ------------------------------------------------------------------------------------


@pytest.fixture
def never_stopped(make_config: MakeConfig, tmp_path: Path) -> tuple[Path, RunRecord]:
    return tmp_path / "whole", run(make_config(output=str(tmp_path / "whole")))


def test_a_run_stopped_anywhere_ends_as_one_never_stopped(
    make_config: MakeConfig, never_stopped: tuple[Path, RunRecord], tmp_path: Path
) -> None:
    whole, record = never_stopped
    for number, r in enumerate(record.rounds, 1):
        path = whole / f"round-{number:03d}"
        assert RunDir(whole).round_record(number) == r
        assert sorted(f.name for f in path.iterdir()) == ["a", "answers.jsonl", "b", "round.json"]
        lines = (path / "answers.jsonl").read_text().splitlines()
        assert [json.loads(line)["question"] for line in lines] == [f"{i} + 2 = ?" for i in range(4)]

    config = make_config(output=str(tmp_path / "stopped"))
    out = Path(config.output)
    stops = ["before, answer", "round 1, b, train", "round 1, fold", "round 2, a, answer", "round 2, answer"]
    finished: dict[Path, tuple[int, bytes]] = {}
    trained = 0
    for stop in [*stops, None]:

        def progress(stage: str, done: int, total: int, *_: str, stop: str | None = stop, **__: Any) -> None:
            if stage == stop and done == total:
                raise KeyboardInterrupt

        spied = Spied()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                run(config, train=spied.train, progress=progress)
            assert not list(out.rglob("*.partial"))
        else:
            run(config, train=spied.train)
        trained += len(spied.trained)
        for file, was in finished.items():
            assert (file.stat().st_mtime_ns, file.read_bytes()) == was
        finished |= {
            f: (f.stat().st_mtime_ns, f.read_bytes())
            for done in out.rglob("branch.json")
            for f in done.parent.iterdir()
        }
    assert trained == 4 + 2  # only the branches that the stops cut off were trained again
    assert same_run(whole, out)


def killed(config: Config) -> None:
    """Run until a branch of the second round is trained, and be killed there."""

    def progress(stage: str, *_: Any, **__: Any) -> None:
        if stage == "round 2, b, train":
            os.kill(os.getpid(), signal.SIGKILL)

    run(config, progress=progress)


def test_a_killed_run_ends_as_one_never_stopped(
    make_config: MakeConfig, never_stopped: tuple[Path, RunRecord], tmp_path: Path
) -> None:
    whole, _ = never_stopped
    config = make_config(output=str(tmp_path / "killed"))
    assert exit_status(killed, config) == -signal.SIGKILL
    spied = Spied()
    run(config, train=spied.train)
    assert len(spied.trained) == 1
    assert same_run(whole, Path(config.output))


def test_a_finished_run_is_not_touched_and_loads_no_model(make_config: MakeConfig) -> None:
    config = make_config(rounds=1)
    first = run(config)
    out = Path(config.output)
    before = {f: f.stat().st_mtime_ns for f in (out / "round-001").rglob("*")}
    stages: list[str] = []
    spied = Spied()
    again = run(
        config, train=spied.train, evaluate=spied.evaluate, progress=lambda stage, *_, **__: stages.append(stage)
    )
    assert again == first
    assert {stage.split()[0] for stage in stages} <= {"read"}
    assert (spied.trained, spied.measured) == ([], [])
    assert {f: f.stat().st_mtime_ns for f in (out / "round-001").rglob("*")} == before
    more = run(config.model_copy(update={"rounds": 2}), train=spied.train)
    assert len(spied.trained) == 2
    assert more.rounds[0] == first.rounds[0]


def test_a_damaged_adapter_of_a_finished_round_is_named(make_config: MakeConfig) -> None:
    config = make_config(rounds=1)
    run(config)
    weights = Path(config.output) / "round-001" / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="adapter_model"):
        run(config.model_copy(update={"rounds": 2}))


# --- what can be known before the work begins ----------------------------------------------------


def test_mistakes_are_found_before_anything_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    teachers = make_config().teachers
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases: list[tuple[Mapping[str, Any], str]] = [
        ({"student": str(tmp_path)}, r"no config\.json"),
        ({"teachers": [{"name": "a", "data": str(tmp_path / "absent")}]}, "absent: no such file"),
        ({"teachers": [{"name": "a", "data": str(empty)}]}, "holds no rows"),
        ({"branch": {"max_length": 5}}, r"teacher `a`: no traces to train on: 24 too long; branch\.max_length is 5"),
        ({"eval": {"holdout": 1e-9}}, r"teacher `a`: no traces held out"),
        ({"eval": {"data": teachers[0].data + "x"}}, r"a\.jsonlx: no such file"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "no CUDA GPU"))
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            run(make_config(**changes))
        assert not (tmp_path / "run").exists()


def test_changed_data_is_refused_on_resume(make_config: MakeConfig) -> None:
    config = make_config(rounds=1)
    run(config)
    file = Path(config.teachers[1].sources[0])
    file.write_text(file.read_text() + '{"question": "new", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl has changed"):
        run(config)
