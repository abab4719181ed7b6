"""What a student must not forget: other questions, asked before and after every round; and the stages that say so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mot_lora import stages, table
from mot_lora.config import Config
from mot_lora.records import Answer, EvaluationRecord
from mot_lora.reports.publish import read_page
from mot_lora.reports.run_page import report
from mot_lora.reports.run_tables import results
from mot_lora.runs.distillation import run
from mot_lora.runs.rundir import RunDir
from mot_lora.training import evaluation

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

MakeConfig = Callable[..., Config]


def questions(folder: Path, name: str, count: int, first: int) -> str:
    path = folder / f"{name}.jsonl"
    rows = ({"question": f"{name} {i} + {first} = ?", "answer": str(i + first)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def watching(make_config: MakeConfig, folder: Path, **settings: Any) -> Config:
    plain = make_config()
    watched = {"sums": questions(folder, "sums", 3, 5), "gym": "reasoning_gym:chain_sum:2"}
    return make_config(
        **{
            "eval": {
                "data": plain.eval.data,
                "validation": questions(folder, "validation", 2, 3),
                "forgetting": watched,
                "max_new_tokens": 2,
                "holdout": 0.2,
            },
            "branch": {**plain.branch.model_dump(exclude_none=True), "steps": 1},
            **settings,
        }
    )


def test_other_questions_are_asked_before_and_after_every_round(make_config: MakeConfig, tmp_path: Path) -> None:
    asked: list[tuple[str, int, int]] = []
    stage = ""

    def progress(name: str, *_: Any, **__: Any) -> None:
        nonlocal stage
        stage = name

    def evaluate(
        model: Any, tokenizer: Any, asking: Any, held_out: Any, *rest: Any, **more: Any
    ) -> tuple[EvaluationRecord, list[Answer]]:
        record, answers = evaluation.evaluate(model, tokenizer, asking, held_out, *rest, **more)
        asked.append((stage, len(asking), len(held_out)))
        # as if so many were right: another number each time
        return record.model_copy(update={"accuracy": len(asked) / 100, "interval": (0.0, 1.0)}), answers

    record = run(watching(make_config, tmp_path), evaluate=evaluate, progress=progress)
    counts = {"sums": 3, "gym": 2}
    found = [record.before, *(r.evaluation for r in record.rounds)]
    at = 0
    for number, measured in enumerate(found):
        at += 2 if number else 0  # the branches, who are asked nothing else
        head = f"round {number}" if number else "before"
        assert asked[at] == (f"{head}, answer", 4, 2)
        assert measured.accuracy == (at + 1) / 100
        for name, count in counts.items():
            at += 1
            assert asked[at] == (f"{head}, {name}, answer", count, 0)
            assert measured.forgetting[name] == (at + 1) / 100
        at += 1
        assert measured.seconds > 0
    assert at == len(asked)

    names, rows = results(record).columns, results(record).rows
    assert names[3:5] == ("sums, %", "gym, %")
    merged = [row.cells for row in rows if row.kind == "merged"]
    assert [c[2:4] for c in merged] == [
        (f"{e.forgetting['sums'] * 100:.1f}", f"{e.forgetting['gym'] * 100:.1f}") for e in found
    ]
    assert all(len(row.cells) == len(names) - 1 for row in rows)
    assert [str(c.header) for c in table(record).columns] == list(names)
    page = report(read_page(RunDir(tmp_path / "run")))
    assert all(f">{c}<" in page for c in ("sums, %", "gym, %", merged[-1][2]))


def test_the_real_count_of_right_answers_is_what_is_recorded(make_config: MakeConfig, tmp_path: Path) -> None:
    kept: list[list[Answer]] = []

    def evaluate(*args: Any, **kwargs: Any) -> tuple[EvaluationRecord, list[Answer]]:
        record, answers = evaluation.evaluate(*args, **kwargs)
        if answers and answers[0].question.startswith("sums"):
            kept.append(answers)
        return record, answers

    record = run(watching(make_config, tmp_path, rounds=1), evaluate=evaluate)
    for measured, answers in zip((record.before, record.rounds[0].evaluation), kept, strict=True):
        right = sum(a.texts[0].strip() == a.answer for a in answers)
        assert measured.forgetting["sums"] == right / 3


def test_every_stage_that_is_seen_was_announced(make_config: MakeConfig, tmp_path: Path) -> None:
    seen: dict[str, None] = {}
    config = watching(make_config, tmp_path, merge={"weights": "validation"})
    run(config, progress=lambda stage, *_, **__: seen.setdefault(stage))
    assert [s for s in seen if not s.startswith(("read ", "load "))] == stages(config)


def test_what_only_a_comparison_reads_may_change_between_two_calls(make_config: MakeConfig, tmp_path: Path) -> None:
    config = watching(make_config, tmp_path, rounds=1)
    run(config)
    noisy = {"noisy": {"name": "noisy", "data": config.teachers[0].data}}
    record = run(Config.model_validate({**config.model_dump(), "compare": noisy}))
    assert record.stopped == "all rounds are done"
