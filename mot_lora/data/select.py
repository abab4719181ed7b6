"""What a run reads: each teacher's traces, chosen and tokenized, and the questions of the evaluation."""

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from mot_lora.config import Config, DataConfig, TeacherConfig
from mot_lora.data.cells import has
from mot_lora.data.chat import (
    EndedError,
    NotEmbeddedError,
    check_tokens,
    encode,
    prompt_text,
    segments,
    token_ids,
    turn_record,
    unmarked,
    unmarked_prompt,
)
from mot_lora.data.overlap import Overlap, normalized
from mot_lora.data.reasoning import chain_of
from mot_lora.data.rows import Row, read_rows, source_name
from mot_lora.data.scoring import is_right
from mot_lora.data.traces import (
    ENDLESS,
    IGNORE,
    NO_RIGHT,
    Example,
    Question,
    Trace,
    read_question,
    read_traces,
    settled,
)
from mot_lora.errors import RowError, UserError
from mot_lora.merging.methods import seed_for
from mot_lora.progress import Progress, silent
from mot_lora.records import DataRecord, TeacherDataRecord

# Why a row is left out, as people read it; what cannot be used at all is counted by the reason of its RowError.
TWICE = "duplicate"
SEEN = "in the evaluation"
WRONG = "wrong answer"
LONG = "too long"
NOT_DRAWN = "not drawn"
UNTAKEN = "not taken by the student's template"
RUNS_ON = "goes on after its end"
NOT_EMBEDDED = "with a token that the student does not embed"


@dataclass(frozen=True)
class Data:
    """Everything that the loop reads: examples by teacher, the questions that it reports on, what became of the rows,
    a fingerprint of each source, and the questions for finding weights, for watching what is forgotten, and of the end.
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
    bad, e = Bad(config.eval), config.eval
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
        choice = Choice(member, tokenizer, overlap, config.branch.max_length)
        traces = [t for source in member.sources for t in choice.read(_read(member, source, fingerprints, choice.bad))]
        picked = choice.pick(traces, config.seed, progress)
        rows, left_out = rows + len(picked) + choice.left_out.total(), left_out + choice.left_out
        chosen += picked
        first = {**choice.bad.first, **first}
    return Drawn(rows, left_out, first, *hold_out(chosen, config.eval.holdout, config.seed))


class Bad:
    """Rows that cannot be used: how many for each reason, and what is wrong with the first of them."""

    def __init__(self, settings: DataConfig) -> None:
        self.stop = settings.on_bad_row == "stop"
        self.counts = Counter[str]()
        self.first: dict[str, str] = {}

    def add(self, error: RowError) -> None:
        """Errors: the error itself, where bad rows stop the work."""
        if self.stop:
            raise error
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, str(error))


def _all_bad(errors: Sequence[RowError]) -> UserError:
    """What to say of rows of which none can be used."""
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(e.reason for e in errors).items())
    return UserError(f"{errors[0]}" + (f" (none of {len(errors)} rows can be used: {reasons})" if errors[1:] else ""))


def _read_questions(
    config: Config, tokenizer: PreTrainedTokenizerBase, fingerprints: dict[str, str], bad: Bad
) -> list[list[Question]]:
    """The questions of the evaluation, those for finding weights, and each set to watch for what is forgotten."""
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
            raise _all_bad(errors)
        return found

    asked = [read(how, source) if source else [] for how, source in sets]
    both = {normalized(q.question) for q in asked[0]} & {normalized(q.question) for q in asked[1]}
    if both:
        raise UserError(
            f"{e.validation}: {len(both)} of its questions are in eval.data too ({next(iter(both))[:60]}...); weights "
            "must be found on other questions than those that are reported"
        )
    return asked


def _asked(tokenizer: PreTrainedTokenizerBase, question: Question, where: str) -> Question:
    """A question as it can be asked: in the words of the user alone, where it holds the template's marks already."""
    with _of_row(where):
        prompt = unmarked_prompt(tokenizer, [{"role": "user", "content": question.question}])
        if len(prompt) == 1:
            question = replace(question, question=prompt[0]["content"])
        check_tokens(tokenizer, token_ids(tokenizer, prompt_text(tokenizer, question.prompt)))
    return question


@contextmanager
def _of_row(where: str) -> Generator[None]:
    """Say of which row it is that the template or the tokens are wrong."""
    try:
        yield
    except UserError as e:
        reasons = {EndedError: RUNS_ON, NotEmbeddedError: NOT_EMBEDDED}
        raise RowError(where, str(e), reasons.get(type(e), UNTAKEN)) from e


@dataclass(frozen=True)
class Chosen:
    """A trace that is used: where it stood, its tokens, its question, and whether it reasons.

    marked: whether it held marks of a chat template, which were taken off.
    """

    where: str
    example: Example
    question: str
    reasons: bool
    marked: bool = False


class Choice:
    """Which of a teacher's rows are used; `left_out` counts the others by reason."""

    def __init__(
        self, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase, overlap: Overlap, max_length: int
    ) -> None:
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.overlap = overlap
        self.max_length = max_length
        self.bad = Bad(teacher)
        self.reasons = Counter[str]()
        self.seen = set[tuple[str, str]]()

    @cached_property
    def most_characters(self) -> int:
        """More than so many are too long, whatever their tokens."""
        return self.max_length * max(map(len, cast("dict[str, int]", cast("Any", self.tokenizer).get_vocab())))

    @property
    def left_out(self) -> Counter[str]:
        """How many rows are left out, by reason."""
        return self.reasons + self.bad.counts

    def read(self, rows: list[Row]) -> list[tuple[str, Trace | Example]]:
        """The traces of a source's rows. Errors: UserError where not one row can be used."""
        traces: list[tuple[str, Trace | Example]] = []
        errors: list[RowError] = []
        columns = settled([row for _, row in rows], self.teacher.columns)
        for where, row in rows:
            for place, found in read_traces(row, where, columns):
                if isinstance(found, RowError):
                    self.bad.add(found)
                    errors.append(found)
                elif isinstance(found, str):
                    self.reasons[found] += 1
                else:
                    traces.append((place, found))
        if errors and not traces:
            raise _all_bad(errors)
        return traces

    def choose(self, rows: list[Row], seed: int, progress: Progress = silent) -> list[Chosen]:
        """The rows of one source that are used."""
        return self.pick(self.read(rows), seed, progress)

    def pick(self, traces: list[tuple[str, Trace | Example]], seed: int, progress: Progress = silent) -> list[Chosen]:
        """The traces that are used, in their order; of `samples` drawn by the seed, each that can be used counts."""
        order = list(range(len(traces)))
        errors: list[RowError] = []
        if self.teacher.samples is not None:
            order = draw([t for _, t in traces], seed if self.teacher.seed is None else self.teacher.seed)
        chosen: dict[int, Chosen] = {}
        for done, i in enumerate(order):
            if len(chosen) == self.teacher.samples:
                self.reasons[NOT_DRAWN] = len(order) - done
                break
            try:
                result = self.consider(*traces[i])
            except RowError as e:
                self.bad.add(e)
                errors.append(e)
                continue
            if isinstance(result, Chosen):
                chosen[i] = result
            else:
                self.reasons[result] += 1
            if done % 100 == 99:
                progress(f"read {self.teacher.name}", done + 1, len(order))
        if errors and len(errors) == len(traces):
            raise _all_bad(errors)
        return [chosen[i] for i in sorted(chosen)]

    def consider(self, where: str, trace: Trace | Example) -> Chosen | str:
        """A trace ready for use, or the reason why it is left out. What costs most is asked last."""
        example, found = (trace, self.decoded(trace, where)) if isinstance(trace, Example) else (None, trace)
        with _of_row(where):
            trace = found if example else unmarked(self.tokenizer, found)
        said = "\n".join(m["content"] + str(m.get("tool_calls", "")) for m in trace.prompt)
        key = (normalized(said), trace.completion.strip())
        if key in self.seen:
            return TWICE
        self.seen.add(key)
        if trace.question in self.overlap:
            return SEEN
        chain = chain_of(trace.completion)
        if chain is None:
            return ENDLESS
        if example is None and len(trace.completion) > self.most_characters:
            return LONG
        with _of_row(where):
            example = example or encode(self.tokenizer, trace)
            check_tokens(self.tokenizer, example.input_ids)
        if len(example) > self.max_length:
            return LONG
        if self.teacher.verified_only:
            if trace.gold is None:
                raise RowError(
                    where,
                    "`verified_only` needs the right answer beside the teacher's; name its column, e.g. "
                    "columns: {gold: expected_answer}",
                    NO_RIGHT,
                )
            if not is_right(trace.completion, trace.right_answers):
                return WRONG
        return Chosen(where, example, trace.question, bool(chain), trace != found)

    def decoded(self, example: Example, where: str) -> Trace:
        """A row of tokens as text: its question is what stands before the first trained token."""
        if not all(0 <= token < len(self.tokenizer) for token in example.input_ids):
            raise UserError(
                f"{where}: `input_ids` has a token that the student's vocabulary of "
                f"{len(self.tokenizer)} has not; was it tokenized for another model?"
            )
        n = example.prompt_length
        prompt = cast("str", self.tokenizer.decode(list(example.input_ids[:n]), skip_special_tokens=True))
        trained = [y for y in example.labels if y != IGNORE]
        completion = cast("str", self.tokenizer.decode(trained, skip_special_tokens=False))
        return Trace(({"role": "user", "content": prompt},), completion)


def draw(traces: Sequence[Trace | Example], seed: int) -> list[int]:
    """The order in which traces are drawn: by a hash of (seed, question, the how manieth of it).

    So teachers of the same questions draw the same ones, and one more row leaves the others' order as it was.
    """
    met = Counter[str]()
    keys: list[int] = []
    for trace in traces:
        question = normalized(trace.question) if isinstance(trace, Trace) else str(trace.input_ids)
        met[question] += 1
        keys.append(seed_for(seed, question, met[question]))
    return sorted(range(len(traces)), key=lambda i: keys[i])


def hold_out(chosen: Iterable[Chosen], share: float, seed: int) -> tuple[list[Chosen], list[Chosen]]:
    """Split traces into those to train on and those held out, by a hash of (seed, question).

    The same question falls on the same side for every teacher, so no branch trains on what another is measured on.
    """
    train: list[Chosen] = []
    held: list[Chosen] = []
    for one in chosen:
        (held if seed_for(seed, one.question) < share * 2**63 else train).append(one)
    return train, held


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of what rows hold, whatever the format that they lie in."""
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _read(settings: DataConfig, source: str, fingerprints: dict[str, str], bad: Bad) -> list[Row]:
    spoiled: list[RowError] = []
    rows = read_rows(source, settings.split, settings.subset, spoiled)
    for error in spoiled:
        bad.add(error)
    for role, column in settings.columns.items():
        if not any(has(row, column) for _, row in rows):
            names = ", ".join(dict.fromkeys(str(name) for _, row in rows for name in row))
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
