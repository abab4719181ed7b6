"""Which of a teacher's traces a run uses, and why the others are left out."""

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mot_lora.config import DataConfig, TeacherConfig
from mot_lora.data.chat import EndedError, unmarked
from mot_lora.data.encoding import encode
from mot_lora.data.generations import ENDLESS
from mot_lora.data.overlap import Overlap, normalized
from mot_lora.data.reasoning import chain_of
from mot_lora.data.rows import Row
from mot_lora.data.scoring import is_right
from mot_lora.data.tokenizer import NotEmbeddedError, check_tokens, text_of_ids
from mot_lora.data.traces import (
    IGNORE,
    NO_RIGHT,
    Example,
    Trace,
    read_traces,
    settled,
)
from mot_lora.errors import RowError, UserError
from mot_lora.merging.seeds import seed_for
from mot_lora.progress import Progress, silent

# Why a row is left out, in the words of the report; unusable rows are counted by the reason of their RowError.
TWICE = "duplicate"
SEEN = "in the evaluation"
WRONG = "wrong answer"
LONG = "too long"
NOT_DRAWN = "not drawn"
UNTAKEN = "not taken by the student's template"
RUNS_ON = "goes on after its end"
NOT_EMBEDDED = "with a token that the student does not embed"


class BadRows:
    """Rows that cannot be used: how many for each reason, and the error of the first."""

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


def all_bad(errors: Sequence[RowError]) -> UserError:
    """The error for rows of which none can be used."""
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(e.reason for e in errors).items())
    return UserError(f"{errors[0]}" + (f" (none of {len(errors)} rows can be used: {reasons})" if errors[1:] else ""))


@contextmanager
def naming_row(where: str) -> Generator[None]:
    """Turn what is wrong with a template or tokens into an error that names the row."""
    try:
        yield
    except UserError as e:
        reasons: dict[type[UserError], str] = {EndedError: RUNS_ON, NotEmbeddedError: NOT_EMBEDDED}
        raise RowError(where, str(e), reasons.get(type(e), UNTAKEN)) from e


@dataclass(frozen=True)
class Chosen:
    """A trace that is used: its place, its tokens, its question, and whether it reasons.

    marked: whether it held marks of a chat template, which were taken off.
    """

    where: str
    example: Example
    question: str
    reasons: bool
    marked: bool = False


class Selection:
    """Which of a teacher's rows are used; `left_out` counts the others by reason."""

    def __init__(
        self, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase, overlap: Overlap, max_length: int
    ) -> None:
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.overlap = overlap
        self.max_length = max_length
        self.bad = BadRows(teacher)
        self.reasons = Counter[str]()
        self.seen = set[tuple[str, str]]()

    @cached_property
    def most_characters(self) -> int:
        """A completion of more characters is too long, whatever its tokens."""
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
            raise all_bad(errors)
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
            raise all_bad(errors)
        return [chosen[i] for i in sorted(chosen)]

    def consider(self, where: str, trace: Trace | Example) -> Chosen | str:
        """A trace ready for use, or the reason why it is left out. The costliest checks come last."""
        example, found = (trace, self.decoded(trace, where)) if isinstance(trace, Example) else (None, trace)
        with naming_row(where):
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
        with naming_row(where):
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
                f"{where}: `input_ids` has a token outside the student's vocabulary of "
                f"{len(self.tokenizer)}; was it tokenized for another model?"
            )
        n = example.prompt_length
        prompt = text_of_ids(self.tokenizer, example.input_ids[:n], special=False)
        completion = text_of_ids(self.tokenizer, (y for y in example.labels if y != IGNORE))
        return Trace(({"role": "user", "content": prompt},), completion)


def draw(traces: Sequence[Trace | Example], seed: int) -> list[int]:
    """The order in which traces are drawn: by a hash of (seed, question, which one of it).

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

    A question is on the same side for every teacher, so no branch trains on what another is measured on.
    """
    train: list[Chosen] = []
    held: list[Chosen] = []
    for one in chosen:
        (held if seed_for(seed, one.question) < share * 2**63 else train).append(one)
    return train, held
