"""A conversation as people write it: who says a message, and what it says, thinks and calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mot_lora.data.cells import as_list, as_object, as_text, first_filled, is_broken, is_empty, unpacked, without_nulls
from mot_lora.data.reasoning import think
from mot_lora.errors import RowError

Message = dict[str, Any]
"""`role` and `content`, and where there are any `tool_calls`, `name`, `tool_call_id`: what chat templates read."""

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "llm": "assistant",
    "agent": "assistant",
    "developer": "system",
    "system_prompt": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "environment": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
THINKS = ("thought", "thoughts", "thinking", "think", "reasoning", "analysis")  # a chain in a message of its own
CALLS = ("function_call", "tool_call")  # of whom the whole message is a call

ROLE = ("role", "from", "speaker", "author")
CONTENT = ("content", "value", "parts", "text", "message")
CHAIN = ("reasoning_content", "reasoning", "thinking", "thought", "think_content", "reasoning_details")
CALL = ("tool_calls", "function_call")
ALSO = ("name", "tool_call_id")
# one entry for both: XTuner, MOSS, Belle
ASKED, SAID = ("input", "human", "user", "question", "prompt"), ("output", "assistant", "gpt", "answer", "response")
# false and 0 are equal
UNTRAINED = ("weight", "loss_weight", "loss_scale", "train", "training", "trainable", "loss")
TEXT_PARTS = ("text", "input_text", "output_text")
CALL_PARTS = ("tool_use", "tool_call", "function_call", "functionCall")
CHAIN_PARTS = ("thinking", "reasoning", "reasoning_content", "thought", "summary_text", "redacted_thinking")
# what a part without a `type` is, by its keys
TYPED = ("image", "image_url", "audio", "video", "file", "inlineData", "fileData", "functionCall", "functionResponse")

ORDER, UNREADABLE, CALLING = "with messages out of order", "with unreadable messages", "answering with a call"


def read_turns(value: Any, where: str) -> tuple[Message, ...]:
    """Messages as templates read them: from {role, content}, ShareGPT's {from, value}, Gemini's {role, parts}.

    A null value counts as absent. Reasoning beside an assistant's words, or in a message before them, is put in
    <think>. Tool calls stay, their arguments as objects.

    Errors: RowError for what is no message, or no text.

    >>> read_turns([{"from": "human", "value": "2?"}, {"from": "gpt", "value": "2", "reasoning": "so 2"}], "row 1")[1]
    {'role': 'assistant', 'content': '<think>\\nso 2\\n</think>\\n\\n2'}
    """
    messages = as_list(value)
    if not messages:
        raise RowError(where, "needs a list of messages with `role` and `content`", UNREADABLE)
    turns: list[Message] = []
    thought = ""  # what was thought in a message of its own
    for i, one in enumerate([m for entry in messages for m in _of_pair(entry)]):
        if is_empty(one):
            continue
        if (message := as_object(one)) is None:
            raise RowError(where, f"message {i} must be an object with `role` and `content`", UNREADABLE)
        reader = Reader(message, i, where)
        if reader.said in THINKS:
            thought = reader.content().strip()
            continue
        turns += reader.turns(thought)
        thought = ""
    if thought:
        raise RowError(where, "ends with a thought and no answer", ORDER)
    return tuple(turns)


def _of_pair(value: Any) -> list[Any]:
    """The messages of an entry that holds a question and its answer, as XTuner and LlamaFactory's history have it."""
    pair, message = as_list(value), as_object(value) or {}
    if pair and len(pair) == 2 and all(isinstance(text, str) for text in pair):
        return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked, said = first_filled(message, ASKED), first_filled(message, SAID)
    if said is None or not isinstance(asked, str | None) or any(key in message for key in ROLE):
        return [value]
    every = (("system", message.get("system")), ("user", asked), ("assistant", said))
    return [{"role": role, "content": text} for role, text in every if not is_empty(text)]


def is_untrained(value: Any) -> bool:
    """Whether the last of these messages is one that its row says not to train on, as axolotl and OpenAI have it."""
    last = as_object((as_list(value) or [None])[-1]) or {}
    return any(last.get(key) == 0 for key in UNTRAINED)


def is_conversation(value: Any) -> bool:
    """Whether a cell is a list of messages, not of texts."""
    first = as_object((as_list(value) or [None])[0]) or {}
    return any(key in first for key in ROLE) and any(key in first for key in (*CONTENT, *CALL))


class Reader:
    """One message of a row."""

    def __init__(self, message: Mapping[str, Any], number: int, where: str) -> None:
        self.message = {k: v for k, v in message.items() if not is_empty(v)}
        self.number = number
        self.where = where
        said = first_filled(self.message, ROLE)
        author = as_object(said)
        self.said = str(first_filled(author, ("role", "name")) if author else said).strip().lower()

    def error(self, message: str, reason: str = UNREADABLE) -> RowError:
        return RowError(self.where, message, reason)

    @property
    def role(self) -> str:
        role = ROLES.get(self.said, self.said)
        if role not in ("system", "user", "assistant", "tool"):
            said = f"the role `{role}`" if role != "none" else "no role"
            raise self.error(f"message {self.number} has {said}; use system, user, assistant or tool")
        return role

    def turns(self, thought: str) -> list[Message]:
        """Its words as one message, after those of tool results, which Anthropic puts among a user's words."""
        role, parts = self.role, self.parts()
        text = "\n".join(t for kind, t in parts if kind == "text")
        chain = thought or "\n".join(t for kind, t in parts if kind == "chain") or self.chain()
        calls = [*self.calls(), *(t for kind, t in parts if kind == "call")]
        results: list[Message] = [t for kind, t in parts if kind == "result"]
        if self.said in CALLS and (called := self.whole_call(text)):
            text, calls = "", called
        if is_broken(text + chain):
            raise self.error(f"message {self.number} holds half a character (a lone surrogate)", "without text")
        if role == "system" and not text.strip():
            return []
        if not text.strip() and not calls and not results and role != "tool":
            raise self.error(f"needs text in `content of message {self.number} ({role})`, not nothing", "without text")
        if role == "assistant":
            text = think(chain, text) if chain or text.strip() else ""
        if calls and role != "assistant":
            raise self.error(f"message {self.number} ({role}) calls a tool, which only the assistant does")
        turn: Message = {"role": role, "content": text} | ({"tool_calls": calls} if calls else {})
        turn |= {k: self.message[k] for k in ALSO if k in self.message}
        return [*results, *([turn] if text.strip() or calls or not results else [])]

    def content(self) -> str:
        return "\n".join(t for kind, t in self.parts() if kind in ("text", "chain"))

    def parts(self) -> list[tuple[str, Any]]:
        """What the content is made of, in its order: texts, chains, calls of tools and what those returned."""
        content = first_filled(self.message, CONTENT)
        if isinstance(content, str | int | float):
            return [("text", as_text(content))]
        inner = as_object(content)
        parts = as_list(content) or as_list((inner or {}).get("parts")) or ([inner] if inner else [])
        return [part for p in parts if not is_empty(p) for part in self.part(p)]

    def part(self, part: Any) -> list[tuple[str, Any]]:
        if isinstance(part, str):
            return [("text", part)]
        if (found := as_object(part)) is None:
            raise self.error(f"content of message {self.number} holds neither text nor parts", "without text")
        filled = {k: v for k, v in found.items() if not is_empty(v)}
        kind = str(filled.get("type", next((k for k in TYPED if k in filled), "text")))
        if kind in CALL_PARTS:
            called = first_filled(filled, ("functionCall", "value")) or filled
            return [("call", self.call(c)) for c in as_list(called) or [called]]
        if kind in ("tool_result", "functionResponse"):
            return [("result", self.result(as_object(filled.get("functionResponse")) or filled))]
        if kind.split(".")[0] in CHAIN_PARTS:
            return [("chain", text_of(filled))]
        if kind not in TEXT_PARTS or not (text := text_of(filled)):
            raise self.error(
                f"content of message {self.number} ({self.said}) holds a part of type `{kind}`; the student reads text",
                "with more than text",
            )
        return [("chain" if filled.get("thought") is True else "text", text)]

    def chain(self) -> str:
        return text_of(first_filled(self.message, CHAIN)) if self.role == "assistant" else ""

    def calls(self) -> list[Any]:
        called = first_filled(self.message, CALL)
        return [self.call(c) for c in as_list(called) or [called] if not is_empty(c)]

    def whole_call(self, text: str) -> list[Any]:
        """The calls that a message of role function_call consists of; none where its text is not such a call."""
        called = as_object(text)
        return [self.call(c) for c in as_list(text) or ([called] if called else [])]

    def call(self, value: Any) -> dict[str, Any]:
        """A call of a tool, its arguments as an object, for templates write those as JSON themselves."""
        call = as_object(without_nulls(unpacked(value))) or {}
        inner = call.get("function", call)
        named = {"name": inner} if isinstance(inner, str) else as_object(inner) or {}
        name = named.get("name")
        if not isinstance(name, str):
            raise self.error(f"message {self.number} calls a tool without `name`")
        call = {**call, **named}
        arguments = unpacked(first_filled(call, ("arguments", "args", "parameters", "input")))
        found: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
        return found | ({"id": call["id"]} if "id" in call else {})

    def result(self, said: dict[str, Any]) -> Message:
        """What a tool returned, as a message of its own."""
        found = first_filled(said, ("content", "response", "output"))
        turn: Message = {"role": "tool", "content": text_of(found) or as_text(found) or ""}
        if "tool_use_id" in said:
            turn["tool_call_id"] = said["tool_use_id"]
        return turn | ({"name": said["name"]} if "name" in said else {})


def with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages whose calls have their arguments as JSON, for templates that put them between other texts (DeepSeek)."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function: dict[str, Any] = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": [*map(written, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]


def tool_names(messages: Sequence[Message], tools: Sequence[Any]) -> list[str]:
    """What the tools are called that messages call or that are offered, as far as those say it."""
    called = [call for message in messages for call in message.get("tool_calls", ())]
    every = [as_object(tool) or {} for tool in (*called, *tools)]
    names = [(as_object(tool.get("function")) or tool).get("name") for tool in every]
    return [name for name in names if isinstance(name, str)]


def text_of(value: Any) -> str:
    """All text of a part, or of a list of parts: Mistral's and OpenRouter's reasoning is nested so."""
    if isinstance(value, str):
        return value
    if listed := as_list(value):
        return "\n".join(filter(None, map(text_of, listed)))
    part = as_object(value)
    return text_of(first_filled(part, ("text", *CHAIN, "content", "summary", "value"))) if part else ""
