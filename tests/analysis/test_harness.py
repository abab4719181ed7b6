"""lm-eval on a run's student: its own scores, nothing of its chatter, results that are kept."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mot_lora import UserError, evaluate_run, export
from mot_lora.analysis.harness import HarnessRecord, Score, TaskRecord
from mot_lora.reader import demo_path, parse_config
from mot_lora.records import Record
from mot_lora.runs.distillation import run

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

ROWS = 16
CHATTER = """
import logging, sys, warnings

def question(doc):
    print("chatter"), print("chatter", file=sys.stderr), warnings.warn("chatter"), logging.error("chatter")
    return doc["question"]
"""


def rows_of(file: str, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(demo_path(file)).read_text().splitlines()[:count]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the demo student, which has learned enough to answer otherwise than before."""
    folder = tmp_path_factory.mktemp("made")
    teachers = [
        {"name": name, "data": write(folder / f"{name}.jsonl", rows_of(f"teachers/{name}.jsonl", 80))}
        for name in ("steps", "story")
    ]
    tree = {
        "student": str(demo_path("student")),
        "teachers": teachers,
        "rounds": 1,
        "branch": {"steps": 5, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 1e-3, "max_length": 512},
        "lora": {"r": 8, "alpha": 16},
        "eval": {"branches": False, "holdout": 0.05},
        "stop": {"metric": "loss"},
        "device": "cpu",
        "output": str(folder / "run"),
    }
    assert run(parse_config(tree, "test")).best == 1
    return folder / "run"


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs" / "run"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own: answers that are generated, and choices by their likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = rows_of("heldout.jsonl", ROWS)
    choices = [
        {"question": q["question"], "choices": [str(int(q["answer"]) + d) for d in (1, 0, -2)], "gold": 1}
        for q in questions
    ]

    def task(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
        data = {"data_files": {"test": write(folder / f"{name}.jsonl", rows)}, "cache_dir": str(folder / "cache")}
        said = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said).replace("'!function ask'", "!function ask.question"))

    last = [{"function": "regex", "regex_pattern": r"(-?\d+)", "group_select": -1}, {"function": "take_first"}]
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "!function ask",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 120, "do_sample": False},
        "filter_list": [{"name": "last", "filter": last}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "ask.py").write_text(CHATTER)
    task("chains", questions, **generated)
    task(
        "choices",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    for name, data in (("absent", "nobody/nothing"), ("gone", str(folder / "gone"))):
        task(name, [], **{**generated, "dataset_path": data, "doc_to_text": "{{question}}"})
    return folder


def lm_evals_own(model: Any, tasks: Path, names: list[str], **settings: Any) -> dict[str, dict[str, Score]]:
    """What lm-eval says when it is called by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        said = simple_evaluate(
            model="hf" if isinstance(model, dict) else model,
            model_args=model if isinstance(model, dict) else None,
            tasks=names,
            batch_size=8,
            device="cpu",
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            **{"apply_chat_template": True, **settings},
        )
    assert said
    names_of = {
        "chains": {"exact_match,last": "exact_match,last"},
        "choices": {"acc,none": "acc", "acc_norm,none": "acc_norm"},
    }
    return {
        name: {
            ours: Score(value=row[theirs], stderr=row[theirs.replace(",", "_stderr,")])
            for theirs, ours in names_of[name].items()
        }
        for name, row in said["results"].items()
    }


def test_scores_are_lm_evals_own_of_the_export_and_of_the_base(finished: Path, tasks: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mot-lora"), "eval", str(finished), "--tasks", "chains, choices"]
    command += ["--include-path", str(tasks), "--base", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    # the stages, and no word from any library, task or program that they start
    stage = r"(write|(student|base), (answer|likelihood))  \d+/\d+(  left .*)?"
    assert all(re.fullmatch(stage, s) for s in done.stderr.splitlines()), done.stderr
    assert [f.name for f in finished.parent.iterdir()] == ["run"]

    assert said.pop("run") == str(finished)
    record = HarnessRecord.model_validate(said)
    kept = json.loads((finished / "eval" / "round-001.json").read_text())
    assert kept == {**said, "sha256": kept["sha256"]}
    export(finished, tmp_path / "out")
    student = lm_evals_own({"pretrained": str(tmp_path / "out")}, tasks, ["chains", "choices"])
    base = lm_evals_own({"pretrained": str(demo_path("student"))}, tasks, ["chains", "choices"])
    assert [r.task for r in record.results] == ["chains", "choices"]
    for r in record.results:
        assert (r.scores, r.base) == (student[r.task], base[r.task])
        assert (r.questions, r.weights, r.shots) == (ROWS, "bfloat16", 0)
    assert student != base


def test_settings_are_lm_evals_own(finished: Path, tasks: Path, tmp_path: Path) -> None:
    ours = evaluate_run(finished, ["choices"], num_fewshot=2, limit=10, chat_template=False, include_path=tasks)
    export(finished, tmp_path / "out")
    settings = {"num_fewshot": 2, "limit": 10, "apply_chat_template": False}
    assert (
        ours.results[0].scores
        == lm_evals_own({"pretrained": str(tmp_path / "out")}, tasks, ["choices"], **settings)["choices"]
    )
    assert ours.results[0].settings == "bfloat16, 2-shot, no chat template"
    short = evaluate_run(finished, ["chains"], max_new_tokens=1, limit=4, include_path=tasks)
    assert short.results[1].scores["exact_match,last"].value == 0


def test_quantized_is_the_student_in_nf4_in_memory(
    finished: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr("mot_lora.analysis.harness.export", lambda *a, **_: written.append(a))
    ours = evaluate_run(finished, ["chains", "choices"], quantized=True, base=True, limit=6, include_path=tasks)
    assert not written

    export(finished, tmp_path / "exact", dtype=torch.float32)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM
    for folder, got in (
        (tmp_path / "exact", [r.scores for r in ours.results]),
        (demo_path("student"), [r.base for r in ours.results]),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32)
        lm = HFLM(pretrained=model, tokenizer=str(folder), batch_size=8)
        assert got == list(lm_evals_own(lm, tasks, ["chains", "choices"], limit=6).values())
    assert {r.weights for r in ours.results} == {"nf4"}


def test_results_are_kept(finished: Path, tasks: Path, call: Any) -> None:
    base = ("eval", finished, "--include-path", tasks, "--tasks")
    assert call(*base, "choices", "--limit", 4, "--base")[0] == 0
    status, out, err = call(*base, "choices", "--limit", 4)  # without --base: what is known of it stays
    assert (status, err) == (0, "")
    assert "change" in out
    status, out, err = call(*base, "choices", "--limit", 6)
    assert (status, err) == (0, "")
    for text in ("the student after round 1", "acc_norm", "first 4", "first 6", " ± "):
        assert text in out
    file = finished / "eval" / "round-001.json"
    said = json.loads(file.read_text())
    assert [(r["task"], r["limit"], r["base"] is None) for r in said["results"]] == [
        ("choices", 4, False),
        ("choices", 6, True),
    ]

    # the round was made again since: another student
    record = finished / "round-001" / "round.json"
    changed = {**json.loads(record.read_text()), "fold_seconds": 9.0}
    from mot_lora.durable import write_record
    from mot_lora.records import RoundRecord

    write_record(record, RoundRecord.model_validate({k: v for k, v in changed.items() if k != "sha256"}))
    assert [r.limit for r in evaluate_run(finished, ["choices"], limit=2, include_path=tasks).results] == [2]
    assert json.loads((file.parent / "round-001.json-2").read_text()) == said


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143), UserError("x"), RuntimeError("y")])
def test_nothing_is_left_beside_the_run_whatever_happens(finished: Path, tasks: Path, interrupt: BaseException) -> None:
    seen: list[str] = []

    def progress(stage: str, *_counts: Any, **_numbers: Any) -> None:
        if stage == "student, likelihood":
            seen.extend(f.name for f in finished.parent.iterdir())
            raise interrupt

    with pytest.raises(type(interrupt)):
        evaluate_run(finished, ["choices"], include_path=tasks, progress=progress)
    assert len(seen) == 2
    assert [f.name for f in finished.parent.iterdir()] == ["run"]
    assert not (finished / "eval").exists()


def test_mistakes_are_one_line(finished: Path, tasks: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: Any) -> str:
        return refused(call("eval", finished, "--include-path", tasks, *arguments))

    assert said("--tasks", "gsm8kk,chains") == "`gsm8kk` is not a task of lm-eval; did you mean gsm8k, gsm8k_cot?"
    for name in ("absent", "gone"):
        assert said("--tasks", name, "--json").startswith(f"task `{name}`: its data cannot be loaded (")
    assert "no task is given" in said("--tasks", ",")
    assert said("--tasks", "chains", "--round", 2).endswith("round 2 is not finished; finished rounds: 1")
    status, _, err = call("eval", finished, "--include-path", tasks, "--tasks", "chains", "--max-new-tokens", 4000)
    assert (status, err.count("\n")) == (2, 1)
    assert "requested max tokens to generate (4000)" in err
    assert "no such folder" in refused(call("eval", finished, "--tasks", "chains", "--include-path", tasks / "no"))
    assert "not a run" in refused(call("eval", tasks, "--tasks", "chains"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert said("--tasks", "chains").endswith("pip install 'mot-lora[eval]'")
    assert [f.name for f in finished.parent.iterdir()] == ["run"]


def test_a_task_that_runs_the_students_code_is_refused(
    finished: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.task import ConfigurableTask
    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(UserError, match="task `chains`: runs code that the student writes"):
        evaluate_run(finished, ["chains"], include_path=tasks)


def test_out_of_memory_says_what_to_lower(finished: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mot_lora.analysis.harness._simple_evaluate", full)
    with pytest.raises(UserError, match="lower --batch-size 3, or measure --quantized"):
        evaluate_run(finished, ["choices"], batch_size=3, include_path=tasks)


def test_a_record_takes_new_results_in_the_place_of_the_same_measurement() -> None:
    def result(task: str, value: float, limit: int | None = None, base: float | None = None) -> TaskRecord:
        return TaskRecord(
            task=task,
            weights="nf4",
            chat_template=True,
            shots=0,
            limit=limit,
            max_new_tokens=None,
            questions=9,
            scores={"acc": Score(value=value)},
            base=None if base is None else {"acc": Score(value=base)},
            lm_eval="0",
        )

    record = HarnessRecord(round=1, student="s").including([result("a", 0.1, base=0.5), result("b", 0.2)])
    record = record.including([result("a", 0.3), result("a", 0.4, limit=5)])
    got = [(r.task, r.limit, r.scores["acc"].value, r.base and r.base["acc"].value) for r in record.results]
    assert got == [("a", None, 0.3, 0.5), ("b", None, 0.2, None), ("a", 5, 0.4, None)]
    assert isinstance(record, Record)
