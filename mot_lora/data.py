"""Teachers' traces and evaluation questions, from JSONL to tokenized chat examples with a loss mask."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mot_lora.errors import UserError
from mot_lora.loss import IGNORE
from mot_lora.merge import seed_for


@dataclass(frozen=True)
class Trace:
    """One worked problem: the conversation up to the answer, and the answer with its chain of thought."""

    prompt: tuple[dict[str, str], ...]
    completion: str

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True)
class Question:
    """A problem to answer and the right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A tokenized trace: the first `prompt_length` tokens carry no loss."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (IGNORE,) * self.prompt_length + self.input_ids[self.prompt_length :]

    def __len__(self) -> int:
        return len(self.input_ids)


def read_traces(files: Sequence[str | Path]) -> list[Trace]:
    """Read traces from JSONL files.

    A row has `question`, `answer` and, usually, `reasoning`, or chat `messages` of which the last is the assistant's.
    The completion trained on is "<think>\\n{reasoning}\\n</think>\\n\\n{answer}"; messages are taken as they are.

    Errors: UserError, which names the file and the line.
    """
    return [_trace(row, where) for file in files for where, row in _rows(Path(file))]


def read_questions(file: str | Path, limit: int | None = None) -> list[Question]:
    """Read the questions of an evaluation: JSONL rows with `question` and `answer`.

    Errors: UserError, which names the file and the line.
    """
    questions = [
        Question(_text(row, "question", where), _text(row, "answer", where)) for where, row in _rows(Path(file))
    ]
    return questions[:limit]


def hold_out(traces: Iterable[Trace], share: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    """Split traces into those to train on and those held out, by a hash of (seed, question).

    The same question falls on the same side for every teacher, so no branch trains on what another is measured on.
    """
    train: list[Trace] = []
    held: list[Trace] = []
    for trace in traces:
        (held if seed_for(seed, trace.question) < share * 2**63 else train).append(trace)
    return train, held


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer, padding on the left for generation.

    Errors: UserError when there is none, or it has no chat template or no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: its tokenizer cannot be loaded: {str(e).splitlines()[0]}") from e
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; use the chat or instruct form of the model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[dict[str, str]]) -> str:
    """The conversation as the student reads it, up to where its answer begins."""
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> Example:
    """Tokenize a trace for training; the loss is on the completion and the end token, <think> included.

    Templates drop earlier chains of thought and mark no assistant spans, so only the prompt goes through the template.
    """
    prompt = tokenizer.encode(prompt_text(tokenizer, trace.prompt), add_special_tokens=False)
    completion = tokenizer.encode(trace.completion, add_special_tokens=False)
    return Example((*prompt, *completion, cast("int", tokenizer.eos_token_id)), len(prompt))


def encode_all(
    tokenizer: PreTrainedTokenizerBase, traces: Iterable[Trace], max_length: int
) -> tuple[list[Example], int]:
    """Tokenize traces, and leave out those over max_length tokens, which are counted."""
    examples = [encode(tokenizer, trace) for trace in traces]
    kept = [e for e in examples if len(e) <= max_length]
    return kept, len(examples) - len(kept)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch padded on the right: input_ids, attention_mask and labels, each [batch, longest] int64."""
    width = max(len(e) for e in examples)

    def padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); give a JSONL file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not text in UTF-8; give a JSONL file") from e
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"{file}:{number}: not JSON ({e})") from e
        if not isinstance(row, dict):
            raise UserError(f'{file}:{number}: a row must be an object like {{"question": ..., "answer": ...}}')
        rows.append((f"{file}:{number}", row))
    if not rows:
        raise UserError(f"{file}: holds no rows")
    return rows


def _trace(row: dict[str, Any], where: str) -> Trace:
    if "messages" in row:
        messages = row["messages"]
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else []
        if len(roles) < 2 or roles[-1] != "assistant" or roles[-2] != "user":
            raise UserError(f"{where}: `messages` must end with a user's and then an assistant's, not {roles}")
        turns = tuple({"role": m["role"], "content": _text(m, "content", where)} for m in messages)
        return Trace(turns[:-1], turns[-1]["content"])
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    reasoning = _text(row, "reasoning", where).strip() if row.get("reasoning") else ""
    return Trace(({"role": "user", "content": question},), f"<think>\n{reasoning}\n</think>\n\n{answer}")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: needs text in `{key}`; it has {', '.join(row) or 'no keys'}")
    return value
