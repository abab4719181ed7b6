"""What a run reads: each teacher's traces, selected and tokenized, and the questions of the evaluation."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mot_lora.config import Config, DataConfig, TeacherConfig
from mot_lora.data.cells import first_names, has
from mot_lora.data.chat import prompt_text, turn_record, unmarked_prompt
from mot_lora.data.encoding import segments
from mot_lora.data.overlap import Overlap, normalized
from mot_lora.data.records import DataRecord, TeacherDataRecord
from mot_lora.data.rows import Row, read_rows, source_name
from mot_lora.data.select import LONG, BadRows, Chosen, Selection, all_bad, hold_out, naming_row
from mot_lora.data.tokenizer import check_tokens, token_ids
from mot_lora.data.traces import (
    Example,
    Question,
    read_question,
)
from mot_lora.errors import RowError, UserError
from mot_lora.progress import Progress, silent


@dataclass(frozen=True)
class Data:
    """Everything that a run reads: examples by teacher, the questions of the evaluation, what became of the rows, a
    fingerprint of each source, and the questions for weights, for what is forgotten, and for the last evaluation.
    """

    train: dict[str, list[Example]]
    held_out: dict[str, list[Example]]
    questions: list[Question]
    record: DataRecord
    fingerprints: dict[str, str]
    validation: list[Question]
    forgetting: dict[str, list[Question]]
    final: list[Question]

    @property
    def lengths(self) -> dict[str, list[int]]:
        """The tokens of each trace that is trained on, by teacher."""
        return {name: [len(e) for e in examples] for name, examples in self.train.items()}


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent) -> Data:
    """Read, choose and tokenize everything that a run trains on and measures.

    Errors: UserError for rows that fit nothing, and for a teacher of whom nothing is left.

    >>> load_data(config, load_tokenizer(checkpoint.path)).record.teachers[0].used  # doctest: +SKIP
    900
    """
    fingerprints: dict[str, str] = {}
    bad, e = BadRows(config.eval), config.eval
    asked = _read_questions(config, tokenizer, fingerprints, bad)
    overlap = Overlap((q.question for questions in asked[:2] for q in questions), e.overlap)

    def draw_from(teacher: TeacherConfig) -> Drawn:
        return _draw(teacher, config, tokenizer, overlap, fingerprints, progress)

    drawn = {t.name: draw_from(t) for t in config.teachers}
    measured = {t.name: drawn[t.name] if t in config.teachers else draw_from(t) for t in e.traces or config.teachers}
    records: list[TeacherDataRecord] = []
    for teacher in config.teachers:
        rows, left_out, bad_rows, kept, held = drawn[teacher.name]
        _check(config, teacher, left_out, kept, held)
        lengths = [len(c.example) for c in kept]
        longest = max(kept, key=lambda c: len(c.example))
        records.append(
            TeacherDataRecord(
                teacher=teacher.name,
                sources=teacher.sources,
                rows=rows,
                used=len(kept),
                held_out=len(held),
                left_out=dict(left_out),
                bad=bad_rows,
                without_reasoning=sum(not c.reasons for c in kept),
                marked=sum(c.marked for c in kept),
                median_tokens=round(median(lengths)),
                longest_tokens=len(longest.example),
                longest_row=longest.where,
                tokens=sum(lengths),
                sample=segments(tokenizer, kept[0].example),
            )
        )
    questions, validation, *forgetting = (found[: e.limit] for found in asked)
    return Data(
        train={t.name: [c.example for c in drawn[t.name].kept] for t in config.teachers},
        held_out={name: [c.example for c in d.held] for name, d in measured.items()},
        questions=questions,
        record=DataRecord(
            teachers=tuple(records),
            questions=len(questions),
            left_out=dict(bad.counts),
            bad=bad.first,
            turn=turn_record(tokenizer),
        ),
        fingerprints=fingerprints,
        validation=validation,
        forgetting=dict(zip(e.forgetting, forgetting, strict=True)),
        final=asked[0][: e.at_last.limit] if e.final else [],
    )


class Drawn(NamedTuple):
    """A teacher's rows: how many there are, why some are left out, the first that cannot be used for each reason, and
    the traces to train on and to measure.
    """

    rows: int
    left_out: Counter[str]
    bad: dict[str, str]
    kept: list["Chosen"]
    held: list["Chosen"]


def _draw(
    teacher: TeacherConfig,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    overlap: Overlap,
    fingerprints: dict[str, str],
    progress: Progress,
) -> Drawn:
    rows, left_out, first, chosen = 0, Counter[str](), dict[str, str](), list[Chosen]()
    for member in teacher.members:
        selection = Selection(member, tokenizer, overlap, config.branch.max_length)
        traces = [
            t for source in member.sources for t in selection.read(_read(member, source, fingerprints, selection.bad))
        ]
        picked = selection.pick(traces, config.seed, progress)
        rows, left_out = rows + len(picked) + selection.left_out.total(), left_out + selection.left_out
        chosen += picked
        first = {**selection.bad.first, **first}
    return Drawn(rows, left_out, first, *hold_out(chosen, config.eval.holdout, config.seed))


def _read_questions(
    config: Config, tokenizer: PreTrainedTokenizerBase, fingerprints: dict[str, str], bad: BadRows
) -> list[list[Question]]:
    """The questions of the evaluation, those for weights, and each set that measures what is forgotten."""
    e = config.eval
    plain = DataConfig()
    sets = [(e, e.data), (plain, e.validation), *((plain, source) for source in e.forgetting.values())]

    def read(how: DataConfig, source: str) -> list[Question]:
        found: list[Question] = []
        errors: list[RowError] = []
        for where, row in _read(how, source, fingerprints, bad):
            try:
                found.append(_asked(tokenizer, read_question(row, where, how.columns), where))
            except RowError as error:
                bad.add(error)
                errors.append(error)
        if not found:
            raise all_bad(errors)
        return found

    asked = [read(how, source) if source else [] for how, source in sets]
    both = {normalized(q.question) for q in asked[0]} & {normalized(q.question) for q in asked[1]}
    if both:
        raise UserError(
            f"{e.validation}: {len(both)} of its questions are in eval.data too ({next(iter(both))[:60]}...); find "
            "weights with other questions than those that are reported"
        )
    return asked


def _asked(tokenizer: PreTrainedTokenizerBase, question: Question, where: str) -> Question:
    """A question in the user's words alone, where it holds the template's marks already, and checked to be askable."""
    with naming_row(where):
        prompt = unmarked_prompt(tokenizer, [{"role": "user", "content": question.question}])
        if len(prompt) == 1:
            question = replace(question, question=prompt[0]["content"])
        check_tokens(tokenizer, token_ids(tokenizer, prompt_text(tokenizer, question.prompt)))
    return question


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the contents of rows, the same in every file format."""
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _read(settings: DataConfig, source: str, fingerprints: dict[str, str], bad: BadRows) -> list[Row]:
    spoiled: list[RowError] = []
    rows = read_rows(source, settings.split, settings.subset, spoiled)
    for error in spoiled:
        bad.add(error)
    for role, column in settings.columns.items():
        if not any(has(row, column) for _, row in rows):
            names = first_names(dict.fromkeys(name for _, row in rows for name in row))
            raise UserError(f"{source}: `columns` takes {role} from `{column}`, but it has {names}")
    fingerprints[source_name(source, settings.subset, settings.split)] = fingerprint(rows)
    return rows


def _check(
    config: Config, teacher: TeacherConfig, left_out: Counter[str], kept: list[Chosen], held: list[Chosen]
) -> None:
    reasons = ", ".join(f"{n} {why}" for why, n in left_out.items()) or "its rows are all held out"
    if not kept:
        hint = f"; branch.max_length is {config.branch.max_length}" if left_out[LONG] else ""
        raise UserError(f"teacher `{teacher.name}`: no traces to train on: {reasons}{hint}")
    if config.metric == "loss" and not held:
        raise UserError(f"teacher `{teacher.name}`: no traces held out to measure; raise eval.holdout")
