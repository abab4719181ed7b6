"""Rows as trainers' own packages carry them: of LlamaFactory, TRL and ms-swift."""

import json
from typing import Any

import pytest

from mot_lora.data.traces import Trace, read_traces
from mot_lora.errors import RowError

ASKED, SAID = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}


def found(row: dict[str, Any], **columns: str) -> Any:
    ((_, one),) = read_traces(row, "row 1", columns)
    return one


def parts(role: str, *content: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "value": value} for kind, value in content], **more}


# --- LlamaFactory's second format: every content a list of {type, value} -----------------------------------


def test_calls_of_tools_are_parts() -> None:
    called = json.dumps({"name": "add", "arguments": {"a": 2, "b": 3}})
    trace = found(
        {
            "messages": [
                parts("user", ("text", "2+3?")),
                parts("assistant", ("reasoning", "I add."), ("tool_call", called), ("tool_call", f"[{called}]")),
                parts("tool", ("text", "5")),
                parts("assistant", ("reasoning", "so 5"), ("text", "5")),
            ],
            "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
        }
    )
    add = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    assert trace.prompt[1]["tool_calls"] == [add, add]
    assert trace.completion == "<think>\nso 5\n</think>\n\n5"
    assert trace.tools


@pytest.mark.parametrize("key", ["loss_weight", "loss_scale", "weight", "loss", "train"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_a_last_message_that_is_not_to_be_trained(key: str, off: Any) -> None:
    refused = found({"messages": [ASKED, {**SAID, key: off}]})
    assert isinstance(refused, RowError)
    assert refused.reason == "not to be trained on"
    for other in (1.0, True, None):
        assert isinstance(found({"messages": [{**ASKED, key: off}, {**SAID, key: other}]}), Trace)


# --- preferences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": "2+3?", "completion": "5"},
    ],
)
def test_an_answer_to_unlearn_is_left_out(row: dict[str, Any]) -> None:
    assert found({**row, "label": False}) == "marked as wrong"
    assert isinstance(found({**row, "label": True}), Trace)
    assert isinstance(found({**row, "label": None}), Trace)


def test_alpaca_with_kto_tags() -> None:
    row = {"instruction": "2+3?", "input": "", "output": "5"}
    assert found({**row, "kto_tag": False}) == "marked as wrong"
    assert isinstance(found({**row, "kto_tag": True}), Trace)


def test_a_label_of_other_rows_is_no_verdict() -> None:
    assert isinstance(found({"question": "Is 4 odd?", "response": "It is not: no.", "label": False}), Trace)
    assert isinstance(found({"messages": [ASKED, SAID], "label": 0}), Trace)


@pytest.mark.parametrize("before", [[], [ASKED, SAID]])
def test_a_pair_says_which_columns_to_name(before: list[Any]) -> None:
    row = {"conversations": [*before, ASKED], "chosen": {"from": "gpt", "value": "5"}, "rejected": {"value": "6"}}
    refused = found(row)
    assert isinstance(refused, RowError)
    assert str(refused).endswith("; if `chosen` answers them, say columns: {question: conversations, answer: chosen}")
    trace = found(row, question="conversations", answer="chosen")
    assert trace.completion == "5"
    assert trace.prompt[-1] == ASKED
