"""Conversations as tools write them: nulls, parts, roles, reasoning, calls of tools, conversations held as text."""

import json
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from wild import student

from mot_lora.data.chat import prompt_text
from mot_lora.data.conversation import ROLES, read_turns
from mot_lora.data.encoding import encode, segments
from mot_lora.data.rows import read_rows
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace, read_question, read_trace
from mot_lora.errors import RowError, UserError

USER, DONE = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "<think>\nso 5\n</think>\n\n5"}
KEYS = ("role", "content", "from", "value", "tool_calls", "reasoning_content", "name", "tool_call_id", "weight")


def last(*messages: Any) -> dict[str, Any]:
    return read_turns(list(messages), "row 1")[-1]


def trace(row: dict[str, Any], columns: dict[Any, str] | None = None) -> Trace:
    found = read_trace(row, "row 1", columns)
    assert isinstance(found, Trace)
    return found


def refusal(row: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as e:
        read_trace(row, "row 1")
    assert str(e.value).startswith("row 1: ")
    return e.value


# --- nulls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [None, "", " ", [], {}, float("nan"), {"name": None}, [None]])
def test_an_empty_key_is_absent(empty: Any) -> None:
    """modelscope/ms-swift#10125, castform-ai/benchmax#31: Arrow gives every message the keys of all."""
    plain = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5", "reasoning_content": "so 5"}]
    sharegpt = [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5", "thinking": "so 5"}]
    for messages in (plain, sharegpt):
        filled = [{**dict.fromkeys(KEYS, empty), **m} for m in messages]
        assert read_turns(filled, "") == (USER, DONE)


def test_merged_parquet_is_read_as_its_parts(tmp_path: Any) -> None:
    def full(**said: Any) -> dict[str, Any]:
        return {k: said.get(k) for k in KEYS[:7]}

    rows = [
        {"messages": [full(**USER), full(role="assistant", content="5", reasoning_content="so 5")]},
        {"messages": [full(**{"from": "human", "value": "2+3?"}), full(**{"from": "gpt", "value": DONE["content"]})]},
    ]
    schema = pa.schema([("messages", pa.list_(pa.struct([(k, pa.string()) for k in KEYS[:7]])))])
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "both.parquet")
    assert [trace(row) for _, row in read_rows(tmp_path / "both.parquet")] == [Trace((USER,), DONE["content"])] * 2


def test_a_list_of_messages_may_be_text_in_a_cell() -> None:
    messages = [USER, DONE, None]
    for text in (json.dumps(messages), str(messages), json.dumps([json.dumps(m) for m in (USER, DONE)])):
        assert trace({"messages": text}) == Trace((USER,), DONE["content"])
        assert trace({"conversations": text}) == Trace((USER,), DONE["content"])
    assert trace({"prompt": json.dumps([USER]), "completion": json.dumps([DONE])}) == Trace((USER,), DONE["content"])
    assert refusal({"messages": "[{'role': 'user'} {'role': 'assistant'}]"}).reason == "with unreadable messages"


# --- who speaks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [r for r, meant in ROLES.items() if meant == "tool"])
def test_what_a_tool_returns_has_many_roles(role: str) -> None:
    turns = read_turns([USER, {"role": "assistant", "content": "add"}, {"role": role, "content": "5"}, DONE], "")
    assert turns[2] == {"role": "tool", "content": "5"}


@pytest.mark.parametrize("role", ["thought", "reasoning", "thinking", "Thought", "analysis"])
def test_a_thought_of_its_own_belongs_to_what_is_said_next(role: str) -> None:
    turns = [USER, {"role": role, "content": "so 5"}, {"role": "assistant", "content": "5"}]
    assert read_turns(turns, "") == (USER, DONE)
    with pytest.raises(UserError, match="ends with a thought"):
        read_turns(turns[:2], "row 1")


def test_other_spellings_of_messages() -> None:
    assert last({"speaker": "human", "text": "q"}) == {"role": "user", "content": "q"}
    assert last({"author": {"role": "user"}, "content": {"parts": ["q"]}}) == {"role": "user", "content": "q"}
    assert read_turns([{"from": "system", "value": ""}, USER], "") == (USER,)
    assert last(USER, {"role": "tool", "content": "", "tool_call_id": "1"})["content"] == ""
    assert trace(
        {
            "contents": [
                {"role": "user", "parts": [{"text": "2+3?"}]},
                {"role": "model", "parts": [{"text": "so 5", "thought": True}, {"text": "5"}]},
            ]
        }
    ) == Trace((USER,), DONE["content"])


def test_a_message_that_is_not_to_be_trained_on_is_refused() -> None:
    for off in ({"weight": 0}, {"train": False}, {"loss": False}):
        assert refusal({"messages": [USER, {**DONE, **off}]}).reason == "not to be trained on"
    for on in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert trace({"messages": [USER, {**DONE, **on}]}).completion == DONE["content"]
    assert trace({"messages": [USER, {**DONE, "weight": 0}, USER, DONE]}).completion == DONE["content"]


def test_entries_of_a_question_and_its_answer_are_two_messages() -> None:
    """XTuner's and MOSS's conversations, LlamaFactory's history."""
    xtuner = [{"system": "Be brief.", "input": "2+3?", "output": "5"}, {"input": "And?", "output": "6"}]
    turns = trace({"conversation": xtuner}).prompt
    assert [t["role"] for t in turns] == ["system", "user", "assistant", "user"]
    assert trace({"conversation": [{"human": "2+3?", "assistant": DONE["content"]}]}) == Trace((USER,), DONE["content"])
    alpaca = {"instruction": "And?", "input": "", "output": "6", "system": "Be brief."}
    for history in ([["2+3?", "5"]], json.dumps([["2+3?", "5"]]), [USER, {"role": "assistant", "content": "5"}]):
        assert trace({**alpaca, "history": history}).prompt == turns
    assert trace({**alpaca, "history": []}).prompt == (turns[0], turns[3])
    with pytest.raises(UserError, match="must ask one thing"):
        read_question({**alpaca, "history": [["2+3?", "5"]]}, "row 1")


# --- what is thought ---------------------------------------------------------------------------------------

THOUGHT: dict[str, dict[str, Any]] = {
    "DeepSeek, vLLM": {"reasoning_content": "so 5", "content": "5"},
    "Ollama": {"thinking": "so 5", "content": "5"},
    "OpenRouter": {
        "reasoning": "so 5",
        "content": "5",
        "reasoning_details": [{"type": "reasoning.text", "text": "so 5"}],
    },
    "OpenRouter, details": {"content": "5", "reasoning_details": [{"type": "reasoning.summary", "summary": "so 5"}]},
    "Anthropic": {
        "content": [{"type": "thinking", "thinking": "so 5", "signature": "x"}, {"type": "text", "text": "5"}]
    },
    "Mistral": {
        "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so 5"}]}, {"type": "text", "text": "5"}]
    },
    "OpenAI": {
        "content": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so 5"}]},
            {"type": "output_text", "text": "5"},
        ]
    },
    "Arrow": {
        "content": [
            {"type": "thinking", "thinking": "so 5", "text": None, "image_url": None},
            {"type": "text", "thinking": None, "text": "5", "image_url": None},
        ]
    },
    "Kimi": {"content": "◁think▷so 5◁/think▷5"},
    "Magistral": {"content": "[THINK]so 5[/THINK]5"},
    "gpt-oss": {"content": "<|channel|>analysis<|message|>so 5<|end|><|start|>assistant<|channel|>final<|message|>5"},
}


@pytest.mark.parametrize("by", THOUGHT)
def test_reasoning_is_found_wherever_an_api_puts_it(by: str) -> None:
    found = trace({"messages": [USER, {"role": "assistant", **THOUGHT[by]}]}).completion
    assert "".join(found.split()) == "<think>so5</think>5"


def test_more_than_text_is_refused_by_its_name() -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": "x"}},
        {"image": "x"},
        {"type": "input_audio", "data": "x"},
    ):
        row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, part]}, DONE]}
        error = refusal(row)
        assert error.reason == "with more than text"
        assert f"`{part.get('type', 'image')}`" in str(error)


@pytest.mark.parametrize("name", ["image", "images", "image_1", "image_path", "audio", "video", "videos"])
def test_a_row_of_pictures_or_sound_is_refused_by_its_column(name: str) -> None:
    row = {"question": "q", "answer": "5", "messages": None}
    for read in (read_trace, read_question):
        with pytest.raises(RowError, match=f"`{name}` is filled, but the student reads text only") as e:
            read({**row, name: {"bytes": b"x", "path": None}}, "row 1")
        assert e.value.reason == "with more than text"
        for empty in (None, [], "", {"bytes": None, "path": None}):
            read({**row, name: empty}, "row 1")


# --- what is called ----------------------------------------------------------------------------------------

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLS: dict[str, dict[str, Any]] = {
    "OpenAI": {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]},
    "transformers": {"tool_calls": [ADD]},
    "Arrow": {
        "tool_calls": [
            {
                "type": "function",
                "index": None,
                "function": {"name": "add", "arguments": {"a": 2, "b": 3, "city": None}},
            }
        ]
    },
    "text in a cell": {"tool_calls": json.dumps([ADD])},
    "bare": {"tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}]},
    "of old": {"function_call": {"name": "add", "arguments": '{"a": 2, "b": 3}'}},
    "Anthropic": {"content": [{"type": "tool_use", "name": "add", "input": {"a": 2, "b": 3}}]},
    "Gemini": {"parts": [{"functionCall": {"name": "add", "args": {"a": 2, "b": 3}}}]},
    "glaive": {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
    "ToolACE": {"role": "tool_call", "content": '[{"name": "add", "parameters": {"a": 2, "b": 3}}]'},
}


@pytest.mark.parametrize("by", CALLS)
@pytest.mark.parametrize("words", [None, "", "I add."])
def test_a_call_is_kept_as_templates_read_it(by: str, words: str | None) -> None:
    """hiyouga/LlamaFactory#2529."""
    own = {"content", "parts", "role"} & {*CALLS[by]}
    turn = last(USER, {"role": "assistant", **({} if own else {"content": words}), **CALLS[by]})
    assert turn == {"role": "assistant", "content": "" if own else words or "", "tool_calls": [ADD]}


def test_what_anthropics_tools_return_stands_before_what_the_user_says() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "5"}]}
    turns = read_turns([USER, {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}], "")
    assert turns[1:] == ({"role": "tool", "content": "5", "tool_call_id": "1"}, {"role": "user", "content": "And?"})


def called(**answer: Any) -> list[dict[str, Any]]:
    asked = {"role": "assistant", "content": None, "tool_calls": [ADD]}
    return [USER, asked, {"role": "tool", "content": "5", "name": "add", "tool_call_id": "1"}, {**DONE, **answer}]


def test_a_trace_that_ends_in_a_call_is_refused_with_the_reason() -> None:
    assert refusal({"messages": [USER, {**DONE, "tool_calls": [ADD]}]}).reason == "answering with a call"
    assert refusal({"question": "q", "answer": "a", "tool_calls": [ADD]}).reason == "answering with a call"
    harmony = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
    assert refusal({"question": "q", "response": harmony}).reason == "answering with a call"
    assert trace({"messages": called()}).question == "2+3?"


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"a": {}}}}]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for t in m.tool_calls or [] %}<tool_call>{{ t.function.name }}({{ t.function.arguments | tojson }})</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_and_tools_are_rendered_or_the_template_is_said_to_leave_them_out(tmp_path: Any) -> None:
    student(tmp_path / "tools", template=TEMPLATE)
    student(tmp_path / "plain")
    tools, plain = load_tokenizer(tmp_path / "tools"), load_tokenizer(tmp_path / "plain")
    for column in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        found = trace({"messages": called(), "tools": column})
        text = "".join(s.text for s in segments(tools, encode(tools, found)) if not s.trained)
        assert text.startswith("add: adds\n")
        assert '<tool_call>add({"a": 2, "b": 3})</tool_call>' in text
        with pytest.raises(UserError, match="template leaves out the tool `add`"):
            encode(plain, found)
    offered = trace({"messages": [USER, DONE], "tools": TOOLS})
    assert prompt_text(tools, offered.prompt, offered.tools).startswith("add: adds\n")
    with pytest.raises(UserError, match="template leaves out the tool `add`"):
        encode(plain, offered)
    assert trace({"messages": [USER, DONE], "tools": "[]"}).tools == ()


def test_a_template_that_joins_arguments_as_text_gets_them_as_json(tmp_path: Any) -> None:
    """As DeepSeek's templates do."""
    student(
        tmp_path,
        template=TEMPLATE.replace("{{ t.function.arguments | tojson }}", "{{ '<' + t.function.arguments + '>' }}"),
    )
    found = trace({"messages": called()})
    assert '<tool_call>add(<{"a": 2, "b": 3}>)</tool_call>' in prompt_text(load_tokenizer(tmp_path), found.prompt)
