"""eval.final: once the rounds are done, the student of one of them is asked again, with more samples, say."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from test_student import linear_layers

from mot_lora import UserError
from mot_lora.analysis.arms import arms
from mot_lora.config import Config, EvalConfig
from mot_lora.durable import read_lines
from mot_lora.records import Answer, EvaluationRecord, FinalRecord, RunRecord
from mot_lora.reports.publish import write_page
from mot_lora.reports.run_tables import memory_note, results
from mot_lora.reports.tables import table
from mot_lora.runs.distillation import run, stages
from mot_lora.runs.export import choose, model_card
from mot_lora.runs.ledger import read_state
from mot_lora.runs.rundir import RunDir
from mot_lora.training import evaluation
from mot_lora.training.student import read_weight

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

MakeConfig = Callable[..., Config]


class Graded:
    """The real evaluation with accuracies of its own, and what each student was: its weights and how it was asked."""

    def __init__(self, *accuracies: float) -> None:
        self.accuracies: Iterator[float] = iter(accuracies)
        self.asked: list[tuple[EvalConfig, int, torch.Tensor]] = []

    def __call__(
        self, model: PeftModel, tokenizer: Any, questions: Any, held_out: Any, settings: EvalConfig, **more: Any
    ) -> tuple[EvaluationRecord, list[Answer]]:
        weights = torch.cat([read_weight(layer).flatten() for layer in linear_layers(model).values()])
        self.asked.append((settings, len(questions), weights))
        record, answers = evaluation.evaluate(model, tokenizer, questions, held_out, settings, **more)
        return record.model_copy(update={"accuracy": next(self.accuracies), "interval": (0.0, 1.0)}), answers


def finals(config: Config, **final: Any) -> Config:
    return Config.model_validate({**config.model_dump(), "eval": {**config.eval.model_dump(), "final": final}})


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    plain = make_config(rounds=2)
    asked = {"data": plain.eval.data, "max_new_tokens": 4, "limit": 2, "holdout": 0.2, "branches": False}
    return plain.model_copy(update={"eval": EvalConfig.model_validate(asked)})


def test_the_best_rounds_student_is_asked_once_more(config: Config) -> None:
    config = finals(config, samples=3, temperature=0.8, limit=4, batch_size=1)
    graded, seen = Graded(0.1, 0.4, 0.3, 0.9), list[str]()
    record = run(config, evaluate=graded, progress=lambda stage, *_, **__: seen.append(stage), finished=write_page)
    assert record.best == 1
    assert record.final == FinalRecord(
        round=1,
        samples=3,
        temperature=0.8,
        top_p=1.0,
        max_new_tokens=4,
        limit=4,
        evaluation=record.final.evaluation,
        files=record.final.files,
    )
    assert (record.final.evaluation.accuracy, record.final.evaluation.questions) == (0.9, 4)
    before, first, second, last = graded.asked
    assert (last[0].samples, last[0].batch_size, last[0].limit) == (3, 1, 4)
    assert [n for _, n, _ in graded.asked] == [2, 2, 2, 4]
    assert torch.equal(last[2], first[2])  # not the student of the round that came last
    assert not torch.equal(last[2], second[2])
    assert not torch.equal(last[2], before[2])
    answers = read_lines(RunDir(Path(config.output)).final_answers, Answer)
    assert [len(a.texts) for a in answers] == [3] * 4
    assert stages(config)[-1] == "final, answer"
    worked = [s for s in dict.fromkeys(seen) if s in stages(config)]
    assert worked == stages(config)
    # where results are shown
    final = results(record).rows[-1]
    assert (final.name, final.cells[0]) == ("final: round 1, avg@3", "90.0 % (0.0 to 100.0)")
    page = (Path(config.output) / "report.html").read_text()
    assert "round 1, avg@3: 90.0 %" in page
    assert "| final: round 1, avg@3 | 90.0 %" in model_card(choose(config.output, 1), "")
    assert "final" not in model_card(choose(config.output, 2), "")
    # again, nothing is done
    again = run(config, evaluate=Graded())
    assert again == record


def test_a_finished_run_is_asked_when_it_is_said_and_again_when_something_else_is(config: Config) -> None:
    plain = run(config, evaluate=Graded(0.1, 0.2, 0.3))
    assert plain.final is None
    last = finals(config, round="last")
    graded = Graded(0.5)
    record = run(last, evaluate=graded)
    assert record.model_copy(update={"final": None}) == plain
    assert record.final is not None
    assert (record.final.round, record.final.samples, record.final.evaluation.accuracy) == (2, 1, 0.5)
    assert run(finals(config, round="last", batch_size=7), evaluate=Graded()) == record  # which changes no answer
    other = run(finals(config, round="last", max_new_tokens=3), evaluate=Graded(0.6))
    assert other.final is not None
    assert (other.final.max_new_tokens, other.final.evaluation.accuracy) == (3, 0.6)
    # a round more: it is another student
    more = run(finals(config, round="last").model_copy(update={"rounds": 3}), evaluate=Graded(0.2, 0.7))
    assert more.final is not None
    assert (more.final.round, more.final.evaluation.accuracy) == (3, 0.7)


def test_where_no_round_is_better_the_student_before_is_asked(config: Config) -> None:
    graded = Graded(0.9, 0.1, 0.2, 0.8)
    record = run(finals(config), evaluate=graded)
    assert record.final is not None
    assert (record.best, record.final.round) == (0, 0)
    assert record.final.label == "final: the student before, avg@1"
    assert torch.equal(graded.asked[3][2], graded.asked[0][2])


def test_an_interruption_in_the_end_loses_no_round(config: Config) -> None:
    config = finals(config, samples=2, temperature=1.0)

    def stop(stage: str, *_: Any, **__: Any) -> None:
        if stage == "final, answer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, evaluate=Graded(0.1, 0.2, 0.3, 0.4), progress=stop)
    rundir = RunDir(Path(config.output))
    assert rundir.final() is None
    assert read_state(rundir).line == "not running: all rounds are done, eval.final is left to do"
    record = run(config, evaluate=Graded(0.5))
    assert record.final is not None
    assert record.final.evaluation.accuracy == 0.5
    assert read_state(rundir).line == "finished: all rounds are done"


def test_what_is_damaged_is_named_set_aside_and_asked_again(config: Config) -> None:
    config = finals(config)
    run(config, evaluate=Graded(0.1, 0.2, 0.3, 0.4))
    rundir = RunDir(Path(config.output))
    rundir.final_answers.write_text("something else")
    with pytest.raises(UserError, match=r"final\.answers\.jsonl: damaged"):
        run(config)
    record = run(config, evaluate=Graded(0.5), repair=True)
    assert record.final is not None
    assert record.final.evaluation.accuracy == 0.5
    assert {p.name for p in (rundir.path / "damaged-001").iterdir()} == {"final.json", "final.answers.jsonl"}
    # what was asked of a round that is done again goes with it
    (rundir.branch(2, "a") / "adapter_model.safetensors").write_text("something else")
    record = run(config, evaluate=Graded(0.3, 0.6), repair=True)
    assert record.final is not None
    assert record.final.evaluation.accuracy == 0.6
    assert "final.json" in {p.name for p in (rundir.path / "damaged-002").iterdir()}


def test_a_comparison_leaves_it_out(config: Config) -> None:
    assert [a.config.eval.final for a in arms(finals(config), ["mtd", "linear"])] == [None] * 3


def test_a_lack_of_memory_is_told_with_the_results() -> None:
    record = RunRecord(before=EvaluationRecord(at_once={"answers": 8}), metric="loss", best=0, stopped="", final=None)
    final = FinalRecord(
        round=0,
        samples=1,
        temperature=0,
        top_p=1,
        max_new_tokens=2,
        limit=None,
        evaluation=EvaluationRecord(at_once={"traces": 2, "answers": 4}),
    )
    line = "Memory ran out while the student was measured; it went on with 4 answers and 2 traces at once."
    assert memory_note(record.model_copy(update={"final": final})) == line
    console = Console(width=120, record=True)
    console.print(table(record))
    assert "it went on with 8 answers at once." in console.export_text()
    assert memory_note(record.model_copy(update={"before": EvaluationRecord()})) == ""
