"""A row by the meaning of its columns: question, answer, chain of thought, right answer, token ids.

A table of our own: datasets and trl rename the columns that a user names; here those in use are known by name, and
each row is read by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from mot_lora.data.cells import (
    as_list,
    as_object,
    as_text,
    at,
    first_filled,
    first_names,
    has,
    is_broken,
    is_empty,
    kind,
    passages,
    unpacked,
    without_nulls,
)
from mot_lora.data.choices import Choices, find_choices
from mot_lora.data.column_names import (
    CALLED,
    CONTEXT,
    DESIRED,
    ELSE_QUESTION,
    GOLD,
    MEDIA,
    MESSAGES,
    NESTED,
    NO_CHAIN,
    PREFERRED,
    QUESTION,
    REASONING,
    RESPONSE,
    RIGHT,
    SYSTEM,
    TOOLS,
    WRITTEN,
)
from mot_lora.data.conversation import CALLING, ORDER, Message, is_conversation, is_untrained, read_turns, text_of
from mot_lora.errors import RowError

Cell = tuple[str, Any]
"""A column's name and a row's value in it."""

NO_QUESTION, NO_RESPONSE, NO_RIGHT = "without a question", "without an answer", "without a right answer"
NO_TEXT, SEVERAL, MORE = "without text", "with several columns that fit", "with more than text"


@dataclass(frozen=True)
class RowReader:
    """A row, where it stands, and what its columns mean where their names do not say it."""

    row: Mapping[str, Any]
    where: str
    columns: Mapping[Any, str]

    @cached_property
    def names(self) -> dict[str, str]:
        return {str(name).strip().lower(): name for name in self.row}

    @property
    def taken(self) -> set[str]:
        """The columns whose meaning `columns` says."""
        return set(self.columns.values())

    @property
    def listed(self) -> str:
        return first_names(self.row)

    @cached_property
    def filled(self) -> dict[str, Any]:
        """The filled columns whose meaning `columns` does not say, by their names in lower case."""
        free = ((n, self.row[name]) for n, name in self.names.items() if name not in self.taken)
        return {n: value for n, value in free if not is_empty(value)}

    def error(self, message: str, reason: str) -> RowError:
        return RowError(self.where, message, reason)

    def lacks(self, role: str, names: Sequence[str], wanted: Sequence[str], reason: str) -> RowError:
        """The error for a row in which nothing fits a role: its column is empty, or there is none."""
        free = [self.names[n] for n in names if n in self.names and self.names[n] not in self.taken]
        own = [self.columns[role]] if role in self.columns else free
        if empty := [name for name in own if has(self.row, name)]:
            return self.error(f"nothing in {', '.join(f'`{name}`' for name in empty)}", reason)
        needs = ", or ".join(f"`{name}`" for name in wanted)
        return self.error(f"needs {needs}; it has {self.listed}; say in `columns` which column is which", reason)

    def named(self, role: str) -> Cell | None:
        """The column that `columns` names for a role, where it is filled: a row may leave it out or leave it empty."""
        value = at(self.row, self.columns[role]) if role in self.columns else None
        return None if is_empty(value) else (self.columns[role], value)

    def first(self, role: str, names: Sequence[str]) -> Cell | None:
        """The first of these columns that is filled, where `columns` does not name the role's."""
        if role in self.columns:
            return None
        return next(((n, self.filled[n]) for n in names if n in self.filled), None)

    def find(self, role: str, names: Sequence[str]) -> Cell | None:
        """The column of a role: the one that `columns` names, or the only filled one of `names`."""
        if role in self.columns:
            return self.named(role)
        found = [(n, self.filled[n]) for n in names if n in self.filled]
        if len(found) > 1:
            listed = ", ".join(f"`{n}`" for n, _ in found)
            raise self.error(
                f"several columns could be the {role}: {listed}; name one, e.g. columns: {{{role}: {found[0][0]}}}",
                SEVERAL,
            )
        return found[0] if found else None

    def text(self, cell: Cell) -> str:
        """The text of a cell. Errors: RowError for what is no text, or text that cannot be written as UTF-8."""
        name, value = cell
        text = as_text(value)
        if text is None:
            raise self.error(f"needs text in `{name}`, not {kind(value)}", NO_TEXT)
        if is_broken(text):
            raise self.error(f"`{name}` holds half a character (a lone surrogate)", NO_TEXT)
        return text

    # ------------------------------------------------------------------------------------------ the question

    def question(self) -> Cell | None:
        return self.find("question", QUESTION) or self.first("question", ELSE_QUESTION)

    def prompt(self, cell: Cell, choices: Choices | None) -> tuple[Message, ...]:
        """What stands before the completion: a question with its context and options, or the messages of one."""
        if is_conversation(cell[1]):
            turns = read_turns(cell[1], self.where)
            if not turns or turns[-1]["role"] not in ("user", "tool"):
                last = turns[-1]["role"] if turns else "nothing"
                raise self.error(f"a prompt must end with the user, not with {last}", ORDER)
        else:
            text = self.text(cell)
            # Alpaca's two halves of a question
            more = self.first("input", ("input",)) if cell[0] not in ("input", "inputs") else None
            text = f"{text}\n\n{self.text(more)}" if more else text
            history = self.first("history", ("history",))  # LlamaFactory's earlier turns
            turns = (
                *(read_turns(history[1], self.where) if history else ()),
                {"role": "user", "content": self.about(text)},
            )
        return self.after_system(self.with_choices(turns, choices))

    def about(self, question: str) -> str:
        """A question after what it is about, where it does not hold that already."""
        cell = self.named("context") or self.first("context", CONTEXT)
        if not cell or cell[0] == self.columns.get("question"):
            return question
        context = "\n\n".join(filter(None, (p.strip() for p in passages(cell[1]))))
        if not context:
            raise self.error(f"needs text in `{cell[0]}`, not {kind(cell[1])}", NO_TEXT)
        return question if context in question else f"{context}\n\n{question}"

    def with_choices(self, turns: tuple[Message, ...], choices: Choices | None) -> tuple[Message, ...]:
        if choices is None or turns[-1]["role"] != "user":
            return turns
        return (*turns[:-1], {**turns[-1], "content": choices.asked(turns[-1]["content"])})

    def choices(self, *besides: str) -> Choices | None:
        """The options of the row; the columns `besides` do not say which of them is right."""
        named = self.named("choices")
        row = {n: value for n, value in self.filled.items() if self.names[n] not in besides}
        gold = self.named("gold")
        return find_choices(row, self.where, named and named[1], gold and gold[1])

    def after_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """Turns with the system's message from a column, where they have none themselves."""
        system = self.find("system", SYSTEM)
        if system and turns[0]["role"] != "system":
            return ({"role": "system", "content": self.text(system)}, *turns)
        return turns

    def tools(self) -> tuple[Any, ...]:
        """The tools that the row offers, as templates take them."""
        cell = self.named("tools") or self.first("tools", TOOLS)
        if cell is None:
            return ()
        listed = as_list(cell[1])
        tools = [as_object(tool) for tool in ([cell[1]] if listed is None else listed)]
        if None in tools:
            raise self.error(f"needs a list of objects in `{cell[0]}`, not {kind(cell[1])}", MORE)
        return tuple(map(without_nulls, tools))

    def refuse_more_than_text(self) -> None:
        """Errors: RowError for a row of pictures or sound, or with a call of a tool beside its messages."""
        if media := next((n for n in self.filled if MEDIA.fullmatch(n)), None):
            raise self.error(
                f"`{media}` is filled, but the student reads text only; drop the column to use the text alone", MORE
            )
        if called := next((n for n in CALLED if n in self.filled), None):
            raise self.error(f"answers with `{called}`, but a trace must end with text", CALLING)

    # --------------------------------------------------------------------------------------------- the answer

    def written(self) -> Cell | None:
        """The teacher's words."""
        content = ("content",)  # an API's word for the answer
        names = RESPONSE + content * ("reasoning_content" in self.filled)
        return self.find("answer", names) or self.first("answer", WRITTEN + content)

    def reasoning(self) -> Cell | None:
        if "reasoning" in self.columns:
            return self.named("reasoning")
        chains = {n: v for n, v in self.filled.items() if str(v).strip().lower() not in NO_CHAIN}
        found = [n for n in REASONING if n in chains]
        if len(found) == 2 and "reasoning_details" in found:  # OpenRouter says the same twice
            found.remove("reasoning_details")
        return (found[0], chains[found[0]]) if len(found) == 1 else self.find("reasoning", [*found])

    def messages(self, cell: Cell, choices: Choices | None) -> tuple[Message, ...]:
        """A conversation that ends with a user's and then the assistant's message."""
        turns = read_turns(cell[1], self.where)
        roles = [t["role"] for t in turns]
        if len(set(roles) - {"system"}) == 1:
            one = f"a trace of one role only ({roles[-1]}): it needs a user and an assistant"
            raise self.error(one + self.answered_elsewhere(cell, roles), ORDER)
        if roles[-2:] not in (["user", "assistant"], ["tool", "assistant"]):
            two = f"messages must end with a user's and then an assistant's, not {roles}"
            raise self.error(two + self.answered_elsewhere(cell, roles), ORDER)
        if "tool_calls" in turns[-1]:
            raise self.error("the last message calls a tool, but a trace must end with text", CALLING)
        if is_untrained(cell[1]):
            raise self.error("its last message is marked as not to be trained on", "not to be trained on")
        return (*self.after_system(self.with_choices(turns[:-1], choices)), turns[-1])

    def answered_elsewhere(self, cell: Cell, roles: Sequence[str]) -> str:
        """What to say where messages are but the question, and another column may hold the answer to them."""
        others = [n for n in (*PREFERRED, *RESPONSE) if n in self.filled]
        if roles[-1:] != ["user"] or not others or "question" in self.columns:
            return ""
        return f"; if `{others[0]}` answers them, say columns: {{question: {cell[0]}, answer: {others[0]}}}"

    def is_undesired(self) -> bool:
        """Whether the row says that its answer is one to unlearn, as the rows of KTO do."""
        if not self.filled.keys() & {*MESSAGES, "completion", "kto_tag"}:
            return False  # a label of other rows may be a right answer
        return any(self.filled.get(n) is False for n in DESIRED)

    def completion(self, cell: Cell) -> str:
        """The teacher's words: a text, or the message of one."""
        value = cell[1]
        if (inner := as_object(value)) and not isinstance(value, str):
            value = [inner] if is_conversation([inner]) else text_of(inner)
        if is_conversation(value):
            turns = read_turns(value, self.where)
            if len(turns) != 1 or turns[0]["role"] != "assistant" or "tool_calls" in turns[0]:
                raise self.error(f"`{cell[0]}` must be one message of the assistant, with text", ORDER)
            return turns[0]["content"]
        return self.text((cell[0], value))

    # ------------------------------------------------------------------------------------------- right answers

    def gold(self, *besides: str) -> Cell | None:
        """The right answer, but for columns in which something else is."""
        names = [n for n in RIGHT if self.names.get(n) not in besides]
        return self.find("gold", GOLD) or self.first("gold", names) or self.nested_gold()

    def nested_gold(self) -> Cell | None:
        """The right answer within a cell, where no column has one."""
        if "gold" in self.columns:
            return None
        found = [(name, at(self.filled, name)) for name in NESTED]
        found += [
            ("info", at({"": m}, ".info.reference_answer")) for m in as_list(first_filled(self.filled, MESSAGES)) or ()
        ]
        return next((cell for cell in found if not is_empty(cell[1])), None)

    def integers(self, role: str) -> tuple[int, ...]:
        """A column of token ids or labels."""
        cell = self.find(role, (role,))
        value: Any = unpacked(cell[1]) if cell else None
        if not isinstance(value, list | tuple) or not all(type(x) is int for x in cast("list[Any]", value)):
            raise self.error(f"needs a list of integers in `{role}`; it has {self.listed}", "without token ids")
        return tuple(cast("list[int]", value))
