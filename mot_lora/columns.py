"""What the columns of a row are called, and what they hold: texts, messages, token ids."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mot_lora.errors import UserError
from mot_lora.thought import think

Message = dict[str, str]
Cell = tuple[str, Any]
"""A column's name and a row's value in it."""

# What columns are called. Of two that mean the same, a row may fill one; which one is said in `columns` otherwise.
QUESTION = ("question", "problem", "prompt", "instruction", "query", "task")
REASONING = (
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "think",
    "cot",
    "chain_of_thought",
    "complex_cot",
    "reasoning_content",
    "reasoning_trace",
    "rationale",
    "trajectory",
    "thinking_trajectory",
    "thinking_trajectories",
    "deepseek_thinking_trajectory",
    "gemini_thinking_trajectory",
    "deepseek_reasoning",
)
RESPONSE = (
    "completion",
    "response",
    "output",
    "attempt",
    "generation",
    "generated_solution",
    "deepseek_attempt",
    "gemini_attempt",
    "deepseek_solution",
)
GOLD = ("gold", "gold_answer", "ground_truth", "expected_answer", "reference_answer", "reference", "target")
# These are the teacher's words where nothing in RESPONSE is, the first of them that is there; else the right answer.
WRITTEN = ("solution", "answer", "final_answer")
RIGHT = ("answer", "final_answer", "solution")
MESSAGES = ("messages", "conversations", "conversation")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Cells:
    """A row, where it stands, and what its columns mean where their names do not say it."""

    row: Mapping[str, Any]
    where: str
    columns: Mapping[Any, str]

    @property
    def names(self) -> dict[str, str]:
        return {str(name).strip().lower(): name for name in self.row}

    @property
    def taken(self) -> set[str]:
        """The columns that `columns` says the meaning of."""
        return set(self.columns.values())

    @property
    def listed(self) -> str:
        return ", ".join(map(str, self.row)) or "no columns"

    def lacks(self, *roles: str) -> UserError:
        """What to say of a row in which nothing fits these roles."""
        wanted = ", or ".join(f"`{r}`" for r in roles)
        return UserError(f"{self.where}: needs {wanted}; it has {self.listed}; say in `columns` which of them is which")

    def first(self, role: str, names: Sequence[str]) -> Cell | None:
        """The first of these columns that is filled, where `columns` does not name the role's."""
        if role in self.columns:
            return None
        found = [(n, self.row[self.names[n]]) for n in names if n in self.names and self.names[n] not in self.taken]
        return next((pair for pair in found if not _empty(pair[1])), None)

    def find(self, role: str, names: Sequence[str]) -> Cell | None:
        """The column of a role: the one that `columns` names, or the only filled one of `names`."""
        if role in self.columns:
            name = self.columns[role]  # which a row may leave out, as it may leave it empty
            found = [(name, self.row[name])] if name in self.row else []
        else:
            found = [(n, self.row[self.names[n]]) for n in names if n in self.names and self.names[n] not in self.taken]
        filled = [pair for pair in found if not _empty(pair[1])]
        if len(filled) > 1:
            listed = ", ".join(f"`{n}`" for n, _ in filled)
            raise UserError(
                f"{self.where}: several columns could be the {role}: {listed}; name one, e.g. "
                f"columns: {{{role}: {filled[0][0]}}}"
            )
        return filled[0] if filled else None

    def text(self, cell: Cell) -> str:
        """The text of a cell. Errors: UserError for what is no text, or text that cannot be written as UTF-8."""
        name, value = cell
        if isinstance(value, list) and len(cast("list[Any]", value)) == 1:
            value = cast("list[Any]", value)[0]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: needs text in `{name}`, not {_kind(value)}")
        if re.search("[\ud800-\udfff]", value):
            raise UserError(f"{self.where}: `{name}` holds half a character (a lone surrogate)")
        return value

    def prompt(self, cell: Cell) -> tuple[Message, ...]:
        """What stands before the completion: a question, or the messages of one."""
        value = cell[1]
        if isinstance(value, list):
            turns = self.turns(cast("list[Any]", value))
            if turns[-1]["role"] != "user":
                raise UserError(f"{self.where}: a prompt must end with the user, not with {turns[-1]['role']}")
            return self.after_system(turns)
        text = self.text(cell)
        if cell[0] == "instruction" and (more := self.find("input", ("input",))):  # Alpaca's two halves of a question
            text = f"{text}\n\n{self.text(more)}"
        return self.after_system(({"role": "user", "content": text},))

    def after_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """Turns after the system's message where a column has one and they have none."""
        system = self.find("system", ("system", "system_prompt"))
        if system and turns[0]["role"] != "system":
            return ({"role": "system", "content": self.text(system)}, *turns)
        return turns

    def completion(self, cell: Cell) -> str:
        """The teacher's words: a text, or the message of one."""
        value = cell[1]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns = self.turns(cast("list[Any]", value))
            if len(turns) != 1 or turns[0]["role"] != "assistant":
                raise UserError(f"{self.where}: `{cell[0]}` must be one message of the assistant")
            return turns[0]["content"]
        return self.text(cell)

    def messages(self, cell: Cell) -> tuple[Message, ...]:
        """A conversation that ends with a user's and then the assistant's message."""
        turns = self.turns(cast("list[Any]", cell[1]) if isinstance(cell[1], list) else [])
        roles = [t["role"] for t in turns]
        if len(set(roles) - {"system"}) == 1:
            raise UserError(f"{self.where}: a trace of one role only ({roles[-1]}): it needs a user and an assistant")
        if roles[-2:] not in (["user", "assistant"], ["tool", "assistant"]):
            raise UserError(f"{self.where}: messages must end with a user's and then an assistant's, not {roles}")
        return self.after_system(turns)

    def turns(self, value: list[Any]) -> tuple[Message, ...]:
        """Messages as {role, content}, from those and from ShareGPT's {from, value}."""
        turns: list[Message] = []
        for i, message in enumerate(value):
            if not isinstance(message, dict):
                raise UserError(f"{self.where}: message {i} must be an object with `role` and `content`")
            m = cast("dict[str, Any]", message)
            role = m.get("role", m.get("from"))
            role = ROLES.get(str(role).lower(), str(role).lower())
            if role not in ("system", "user", "assistant", "tool"):
                raise UserError(f"{self.where}: message {i} has the role `{role}`; use system, user, assistant or tool")
            content = m.get("content", m.get("value"))
            if isinstance(content, list):  # parts, of which text is the only kind here
                parts = [cast("Any", p).get("text") if isinstance(p, dict) else p for p in cast("list[Any]", content)]
                texts = [p for p in parts if isinstance(p, str)]
                content = "\n".join(texts) if len(texts) == len(parts) else None
            text = self.text((f"content of message {i} ({role})", content))
            chain = next((c for k in ("reasoning_content", "reasoning", "thinking") if (c := m.get(k))), "")
            if chain and role == "assistant":
                text = think(self.text((f"reasoning of message {i}", chain)), text)
            turns.append({"role": role, "content": think("", text) if role == "assistant" else text})
        if not turns:
            raise UserError(f"{self.where}: needs a list of messages with `role` and `content`")
        return tuple(turns)

    def integers(self, role: str) -> tuple[int, ...]:
        """A column of token ids or labels."""
        cell = self.find(role, (role,))
        value: Any = cell[1] if cell else None
        if not isinstance(value, list | tuple) or not all(type(x) is int for x in cast("list[Any]", value)):
            raise UserError(f"{self.where}: needs a list of integers in `{role}`; it has {self.listed}")
        return tuple(cast("list[int]", value))


def _empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)  # what tables have where there is no number
    return (
        value is None or (isinstance(value, str | list) and not value) or (isinstance(value, str) and value.isspace())
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty text"
    return {"NoneType": "nothing", "list": "a list", "dict": "an object", "bool": "true or false"}.get(
        type(value).__name__, type(value).__name__
    )
