"""Rows as traces: every form and name of columns, where <think> stands, and the shapes of well-known datasets."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_lora.data.column_names import GOLD, MESSAGES, QUESTION, REASONING, RESPONSE, WRITTEN
from mot_lora.data.conversation import ROLES
from mot_lora.data.gold import final_part
from mot_lora.data.reasoning import chain_of, opens_chain, think
from mot_lora.data.traces import IGNORE, Example, Question, Trace, batches, read_question, read_trace
from mot_lora.errors import UserError

WHOLE = "<think>\nso 2\n</think>\n\n2"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def trace_of(row: Mapping[str, Any], columns: dict[Any, str] | None = None) -> Trace:
    trace = read_trace(row, "row 1", columns)
    assert isinstance(trace, Trace)
    return trace


def message_of(row: Any, columns: dict[Any, str] | None = None, read: Any = read_trace) -> str:
    with pytest.raises(UserError) as e:
        read(row, "row 1", columns)
    assert str(e.value).startswith("row 1: ")
    assert not re.search(r"[\r\n]", str(e.value))
    return str(e.value)


# --- one trace in every form ---------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "question": {"question": "1 + 1?", "reasoning": "so 2", "answer": "2"},
    "wrapped": {"question": "1 + 1?", "answer": WHOLE},
    "wrapped twice": {"question": "1 + 1?", "reasoning": "so 2", "answer": WHOLE},
    "wrapped reasoning": {"question": "1 + 1?", "reasoning": "<think>\nso 2\n</think>", "answer": "2"},
    "spaces around": {"question": "1 + 1?", "reasoning": "\n so 2 \n", "answer": "2"},
    "begun by the template": {"question": "1 + 1?", "answer": "so 2\n</think>\n\n2"},
    "a number": {"question": "1 + 1?", "reasoning": "so 2", "answer": 2},
    "a list of one": {"question": "1 + 1?", "reasoning": ["so 2"], "answer": ["2"]},
    "texts": {"prompt": "1 + 1?", "completion": WHOLE},
    "conversational": {"prompt": [user("1 + 1?")], "completion": [assistant(WHOLE)]},
    "half conversational": {"prompt": [user("1 + 1?")], "completion": WHOLE},
    "messages": {"messages": [user("1 + 1?"), assistant(WHOLE)]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": WHOLE}]},
    "reasoning in a message": {"messages": [user("1 + 1?"), {**assistant("2"), "reasoning_content": "so 2"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}, assistant(WHOLE)]},
    "parts that are texts": {"messages": [user("1 + 1?"), {"role": "assistant", "content": [WHOLE]}]},
    "upper case": {" Question": "1 + 1?", "REASONING ": "so 2", "Answer": "2"},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_trace_in_every_form_is_the_same_trace(form: str) -> None:
    assert trace_of(FORMS[form]) == Trace((user("1 + 1?"),), WHOLE)


@pytest.mark.parametrize("question", QUESTION)
@pytest.mark.parametrize("shout", [str, str.upper])
def test_every_name_of_a_question_is_known(question: str, shout: Any) -> None:
    assert trace_of({shout(question): "1 + 1?", "answer": WHOLE}).question == "1 + 1?"
    assert read_question({shout(question): "1 + 1?", "answer": "2"}, "") == Question("1 + 1?", "2")


@pytest.mark.parametrize("reasoning", REASONING)
@pytest.mark.parametrize("answer", [*RESPONSE, *WRITTEN])
def test_every_name_of_reasoning_and_answer_is_known(reasoning: str, answer: str) -> None:
    row = {"problem": "1 + 1?", reasoning: "so 2", answer: "2"}
    assert trace_of(row) == Trace((user("1 + 1?"),), WHOLE)
    assert trace_of({k.title(): v for k, v in row.items()}) == trace_of(row)


@pytest.mark.parametrize("gold", GOLD)
@pytest.mark.parametrize("answer", [*RESPONSE, *WRITTEN])
def test_every_name_of_the_right_answer_is_known(gold: str, answer: str) -> None:
    row = {"question": "1 + 1?", answer: "It is 2.", gold: "2"}
    assert trace_of(row) == Trace((user("1 + 1?"),), "It is 2.", "2")
    assert read_question(row, "") == Question("1 + 1?", "2")


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("right", ["answer", "final_answer", "solution"])
def test_the_right_answer_beside_messages_is_known(name: str, right: str) -> None:
    row = {name: [user("1 + 1?"), assistant(WHOLE)], right: 2}
    assert trace_of(row) == Trace((user("1 + 1?"),), WHOLE, "2")
    assert trace_of({**row, "expected_answer": "3"}).gold == "3"  # what is called so comes first


@pytest.mark.parametrize("response", RESPONSE)
def test_beside_a_response_the_answer_is_the_right_one(response: str) -> None:
    row = {"problem": "q", response: "so it is 3", "answer": "4", "solution": "long"}
    assert trace_of(row) == Trace((user("q"),), "so it is 3", "4")
    assert trace_of({"problem": "q", "solution": "so it is 3", "answer": "4"}) == Trace((user("q"),), "so it is 3", "4")
    assert trace_of({"problem": "q", "answer": "4"}) == Trace((user("q"),), "4", None)


@pytest.mark.parametrize("empty", [None, "", " \n", [], float("nan")])
def test_an_empty_cell_is_as_if_it_were_not_there(empty: Any) -> None:
    row = {"question": "q", "problem": empty, "thinking": empty, "completion": empty, "answer": "2", "gold": empty}
    row |= {"messages": empty, "input_ids": empty, "system": empty}
    assert trace_of(row) == Trace((user("q"),), "2")
    assert trace_of(row, {"reasoning": "thinking"}) == Trace((user("q"),), "2")
    assert read_question(row, "") == Question("q", "2")


def test_a_row_without_reasoning_is_as_it_is() -> None:
    assert trace_of({"question": "q", "answer": 7}).completion == "7"
    assert trace_of({"messages": [user("q"), assistant("7")]}).completion == "7"


# --- conversations -------------------------------------------------------------------------------------


def test_the_last_turn_is_the_answer_and_the_question_is_before_it() -> None:
    turns = [system("Be brief."), user("1 + 1 = ?"), assistant("2"), user("And 2 + 2?")]
    trace = trace_of({"messages": [*turns, assistant("<think>x</think>4")]})
    assert trace == Trace(tuple(turns), "<think>x</think>4")
    assert trace.question == "And 2 + 2?"


@pytest.mark.parametrize(
    ("role", "meant"), [*ROLES.items(), ("USER", "user"), ("Assistant", "assistant"), ("tool", "tool")]
)
def test_every_name_of_a_role_is_known(role: str, meant: str) -> None:
    turn = {"from": role, "value": "x"}
    turns = [turn, user("q"), assistant("a")] if meant != "user" else [turn, assistant("a"), user("q"), assistant("a")]
    assert trace_of({"conversations": turns}).prompt[0] == {"role": meant, "content": "x"}


def test_what_a_tool_said_may_stand_before_the_answer() -> None:
    turns = [user("q"), assistant("calculate(1 + 1)"), {"role": "tool", "content": "2", "name": "calculate"}]
    assert trace_of({"messages": [*turns, assistant("2")]}).prompt == tuple(turns)


def test_reasoning_beside_the_content_of_any_turn_becomes_its_chain() -> None:
    turns = [user("q"), {**assistant("1"), "thinking": "r"}, user("p"), {**assistant("2"), "reasoning": "s"}]
    trace = trace_of({"messages": turns})
    assert trace.prompt[1]["content"] == "<think>\nr\n</think>\n\n1"
    assert trace.completion == "<think>\ns\n</think>\n\n2"
    # of a user it is none of ours
    assert trace_of({"messages": [{**user("q"), "reasoning": "r"}, assistant("2")]}).prompt == (user("q"),)


def test_parts_of_text_are_joined_and_pictures_are_refused() -> None:
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": "1?"}]
    assert trace_of({"prompt": [{"role": "user", "content": parts}], "completion": "2"}).question == "1 +\n1?"
    picture = {"type": "image", "image": "x.png"}
    row = {"messages": [{"role": "user", "content": [*parts, picture]}, assistant("2")]}
    assert message_of(row).endswith("holds a part of type `image`; the student reads text")


@pytest.mark.parametrize("name", ["system", "system_prompt", "System"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "2"},
        {"prompt": [user("q")], "completion": "2"},
        {"prompt": "q", "completion": [assistant("2")]},
        {"messages": [user("q"), assistant("2")]},
    ],
)
def test_a_column_of_system_prompts_comes_first(row: dict[str, Any], name: str) -> None:
    assert trace_of({**row, name: "Be brief."}).prompt == (system("Be brief."), user("q"))
    assert trace_of({**row, "rules": "Be brief."}, {"system": "rules"}).prompt == (system("Be brief."), user("q"))
    for own in ("messages", "prompt"):
        if isinstance(row.get(own), list):
            trace = trace_of({**row, own: [system("Own."), *row[own]], name: "Be brief."})
            assert trace.prompt == (system("Own."), user("q"))


# --- columns that are named ----------------------------------------------------------------------------


def test_columns_say_what_a_column_means() -> None:
    row = {"Frage": "q", "Gedanken": "r", "Antwort": "2", "richtig": "3", "Regeln": "s"}
    columns: dict[Any, str] = {"question": "Frage", "reasoning": "Gedanken", "answer": "Antwort", "gold": "richtig"}
    trace = Trace((system("s"), user("q")), "<think>\nr\n</think>\n\n2", "3")
    assert trace_of(row, {**columns, "system": "Regeln"}) == trace
    assert read_question(row, "", columns) == Question("q", "3")
    turns = [user("q"), assistant("2")]
    assert trace_of({"chat": turns, "x": 1}, {"messages": "chat"}) == Trace((user("q"),), "2")
    assert read_trace({"a": [1, 2], "b": [IGNORE, 2]}, "", {"input_ids": "a", "labels": "b"}).prompt_length == 1


def test_a_named_column_settles_which_of_two_is_meant() -> None:
    row = {"question": "q", "prompt": "p", "answer": "2", "thinking": "r", "cot": "s", "output": "o", "response": "x"}
    assert message_of(row).startswith("row 1: several columns could be the question: `question`, `prompt`; name one")
    columns: dict[Any, str] = {"question": "prompt"}
    assert "several columns could be the answer: `response`, `output`" in message_of(row, columns)
    columns["answer"] = "output"
    assert message_of(row, columns).endswith(
        "several columns could be the reasoning: `thinking`, `cot`; name one, e.g. columns: {reasoning: thinking}"
    )
    columns["reasoning"] = "cot"
    assert trace_of(row, columns) == Trace((user("p"),), "<think>\ns\n</think>\n\no", "2")


def test_a_column_has_one_meaning() -> None:
    # `task` is a name of a question; named as the right answer, it is no question too
    row = {"question": "q", "task": "3", "answer": "2"}
    assert trace_of(row, {"gold": "task"}) == Trace((user("q"),), "2", "3")
    # what the teacher wrote is not also what it is judged by, nor the other way around
    for name in ("solution", "answer", "Answer", "final_answer"):
        assert trace_of({"question": "q", name: "2"}, {"answer": name}).gold is None
    assert trace_of({"question": "q", "solution": "so 2", "answer": "2"}, {"answer": "solution"}).gold == "2"
    assert trace_of({"question": "q", "solution": "so 2", "answer": "2"}, {"gold": "answer"}).completion == "so 2"
    assert "needs `answer (completion, response, ...)`" in message_of(
        {"question": "q", "answer": "2"}, {"gold": "answer"}
    )


def test_a_row_may_leave_out_a_named_column_that_it_may_leave_empty() -> None:
    assert trace_of({"question": "q", "answer": "2"}, {"reasoning": "cot"}).completion == "2"
    assert "needs `answer" in message_of({"question": "q", "answer": "2"}, {"answer": "reply"})


def test_token_ids_beside_messages_wait_until_they_are_asked_for() -> None:
    row = {"messages": [user("q"), assistant("2")], "input_ids": [1, 2], "labels": [IGNORE, 2]}
    assert read_trace(row, "") == Example((1, 2), (IGNORE, 2))
    assert trace_of(row, {"messages": "messages"}) == Trace((user("q"),), "2")


# --- token ids -----------------------------------------------------------------------------------------


def test_token_ids_and_labels_are_an_example() -> None:
    example = read_trace({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "attention_mask": [1] * 4}, "")
    assert isinstance(example, Example)
    assert (example.input_ids, example.labels, example.prompt_length) == ((5, 6, 7, 8), (-100, 6, -100, 8), 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1, 2]}, "needs a list of integers in `labels`; it has input_ids"),
        ({"input_ids": "1 2", "labels": [1]}, "needs a list of integers in `input_ids`"),
        ({"input_ids": [1.0], "labels": [1]}, "needs a list of integers in `input_ids`"),
        ({"input_ids": [True], "labels": [1]}, "needs a list of integers in `input_ids`"),
        ({"input_ids": [1, 2], "labels": [2]}, "`labels` must be as long as `input_ids`, and equal to it or -100"),
        (
            {"input_ids": [1, 2], "labels": [-100, 3]},
            "`labels` must be as long as `input_ids`, and equal to it or -100",
        ),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token of `labels` is trained: all are -100"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no token of `labels` is trained"),  # nothing predicts the first
    ],
)
def test_a_mistake_in_token_ids_is_named(row: dict[str, Any], said: str) -> None:
    assert said in message_of(row)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.data())
def test_an_example_after_a_prompt_trains_all_the_rest(ids: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(ids) - 1))
    example = Example.after(tuple(ids), n)
    assert (example.prompt_length, len(example), list(example.labels)) == (n, len(ids), [IGNORE] * n + ids[n:])
    assert read_trace({"input_ids": ids, "labels": list(example.labels)}, "") == example


# --- <think> -------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text, text)
def test_a_chain_is_wrapped_once_and_found_again(reasoning: str, answer: str) -> None:
    whole = think(reasoning, answer)
    assert chain_of(whole) == reasoning.strip()
    assert think(reasoning, whole) == whole
    assert think("", whole) == whole
    assert think(f"<think>{reasoning}</think>", answer) == whole
    assert whole.endswith(answer)
    assert (whole == answer) == (not reasoning.strip())


@pytest.mark.parametrize(
    ("completion", "chain"),
    [
        ("<think>a</think>b", "a"),
        ("<think>\n\n</think>\n\nb", ""),
        ("b", ""),
        ("", ""),
        ("<think>a", None),
        ("<think>a<think>b", None),
        ("<think>a</think>b<think>c</think>d", "a"),
        ("</think> no <think>", None),
    ],
)
def test_the_chain_of_a_completion(completion: str, chain: str | None) -> None:
    assert chain_of(completion) == chain


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("x<think>", True), ("x<think>\n", True), ("<think> \n", True), ("<think>\n\n</think>\n\n", False), ("x", False)],
)
def test_a_prompt_that_opens_a_chain_is_told(prompt: str, opens: bool) -> None:
    assert opens_chain(prompt) is opens


# --- right answers and questions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "right"),
    [("42", "42"), ("6 * 7\n#### 42", "42"), ("#### 1\n#### 2 ", "2"), (" 1/2 ", "1/2"), ("# 3", "# 3"), ("####", "")],
)
def test_the_right_answer_stands_after_the_mark_of_gsm8k(written: str, right: str) -> None:
    assert final_part(written) == right
    row = {"question": "q", "completion": "c", "answer": written}
    assert trace_of(row).gold == (right or None)
    if right:
        assert read_question(row, "") == Question("q", right)
    else:
        assert "`answer` has nothing after ####" in message_of(row, read=read_question)


def test_right_answers_may_be_numbers_or_in_a_list() -> None:
    assert trace_of({"question": "q", "completion": "c", "gold": 0.5}).gold == "0.5"
    assert trace_of({"question": "q", "completion": "c", "gold": ["\\frac{1}{2}"]}).gold == "\\frac{1}{2}"
    assert trace_of({"question": "q", "completion": "c", "gold": {"a": 1}}).gold is None
    assert read_question({"question": "q", "final_answer": ["7"]}, "") == Question("q", "7")
    assert read_question({"question": "q", "answer": 7}, "") == Question("q", "7")


def test_a_question_may_be_messages_of_which_one_is_the_users() -> None:
    after = read_question({"prompt": [system("s"), user("q")], "answer": "2"}, "")
    assert after == Question("q", "2", before=(system("s"),))
    assert after.prompt == (system("s"), user("q"))
    assert read_question({"messages": [user("q")], "answer": "2"}, "") == Question("q", "2")
    two = {"prompt": [user("q"), assistant("a"), user("p")], "answer": "2"}
    assert "`prompt` must ask one thing, not hold 2 turns of a user" in message_of(two, read=read_question)
    assert "must end with the user, not with assistant" in message_of(
        {"prompt": [user("q"), assistant("a")], "answer": "2"}, read=read_question
    )


def test_what_is_named_as_an_answer_is_the_right_one_of_a_question() -> None:
    row = {"question": "q", "answer": "2", "mine": "3", "gold": "4"}
    assert read_question(row, "", {"answer": "mine"}) == Question("q", "3")
    assert read_question(row, "", {"gold": "mine"}) == Question("q", "3")
    assert read_question(row, "") == Question("q", "4")


# --- mistakes ------------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "needs `question`, or `messages`; it has no columns; say in `columns` which column is which"),
    ({"text": "x", "id": 1}, "needs `question`, or `messages`; it has text, id; say in `columns`"),
    ({"a\nb": "x"}, "it has a b; say"),
    ({"question": "q"}, "needs `answer (completion, response, ...)`, or `messages`; it has question"),
    ({"answer": "a"}, "needs `question`, or `messages`; it has answer"),
    ({"question": " ", "answer": "a"}, "nothing in `question`"),
    ({"question": "q", "answer": None, "Response": ""}, "nothing in `Response`, `answer`"),
    ({"question": {"a": 1}, "answer": "a"}, "needs text in `question`, not an object"),
    ({"question": "q", "answer": ["a", "b"]}, "needs text in `answer`, not a list"),
    ({"question": "q", "answer": "a", "reasoning": ["a", "b"]}, "needs text in `reasoning`, not a list"),
    ({"question": "q", "answer": "a", "system": 1.5, "system_prompt": "x"}, "several columns could be the system"),
    ({"question": "q", "answer": "a\ud800"}, "`answer` holds half a character (a lone surrogate)"),
    ({"question": b"q", "answer": "a"}, "needs text in `question`, not bytes"),
    ({"messages": "hi"}, "needs a list of messages with `role` and `content`"),
    ({"messages": [], "conversations": []}, "nothing in `messages`, `conversations`"),
    ({"messages": ["hi"]}, "message 0 must be an object with `role` and `content`"),
    ({"messages": [user("q")]}, "a trace of one role only (user): it needs a user and an assistant"),
    ({"messages": [system("s"), assistant("a")]}, "a trace of one role only (assistant)"),
    ({"messages": [assistant("a"), assistant("b")]}, "a trace of one role only (assistant)"),
    ({"messages": [system("s")]}, "messages must end with a user's and then an assistant's, not ['system']"),
    ({"messages": [assistant("a"), user("q")]}, "messages must end with a user's and then an assistant's"),
    ({"messages": [user("q"), assistant("a"), assistant("b")]}, "messages must end with a user's"),
    ({"messages": [user("q"), {"role": "assistant", "content": None}]}, "message 1 (assistant)`, not nothing"),
    ({"messages": [user("q"), {"role": "judge", "content": "x"}]}, "message 1 has the role `judge`; use system, user"),
    ({"messages": [{"content": "x"}, assistant("a")]}, "message 0 has no role; use system, user"),
    ({"messages": [user("q"), assistant("a")], "conversations": [user("q")]}, "several columns could be the messages"),
    ({"prompt": [assistant("a")], "completion": "c"}, "a prompt must end with the user, not with assistant"),
    ({"prompt": "q", "completion": [user("q")]}, "`completion` must be one message of the assistant"),
    ({"prompt": "q", "completion": [assistant("a"), assistant("b")]}, "`completion` must be one message"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "needs `answer (completion, response, ...)`"),
]


@pytest.mark.parametrize(("row", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_row_that_fits_nothing_says_what_it_has(row: dict[str, Any], said: str) -> None:
    assert said in message_of(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q"}, "needs `answer (solution, gold, ...)`; it has question"),
        ({"answer": "2"}, "needs `question`; it has answer"),
        ({"question": "q", "gold": "1", "target": "2"}, "several columns could be the gold: `gold`, `target`"),
        ({"question": "q", "answer": b"1"}, "`answer` holds no right answer: bytes"),
        ({"question": "q", "answer": None}, "nothing in `answer`"),
    ],
)
def test_a_question_that_fits_nothing_says_what_it_has(row: dict[str, Any], said: str) -> None:
    assert said in message_of(row, read=read_question)


# --- well-known datasets, a row of each as it is on the Hub ----------------------------------------------

S1K: dict[str, Any] = {  # simplescaling/s1K-1.1
    "solution": "The answer is $128$.",
    "question": "Find the last three digits of $2^{7}$.",
    "cot_type": "math",
    "source_type": "AI-MO/NuminaMath-CoT/aops_forum",
    "metadata": "{}",
    "gemini_thinking_trajectory": "Gemini thinks.",
    "gemini_attempt": "It is 128.",
    "deepseek_thinking_trajectory": "DeepSeek thinks.",
    "deepseek_attempt": "\\boxed{128}",
    "gemini_grade": "Yes",
    "gemini_grade_reason": "same",
    "deepseek_grade": "Yes",
    "deepseek_grade_reason": "same",
}
OPENR1: dict[str, Any] = {  # open-r1/OpenR1-Math-220k
    "problem": "How fast?",
    "solution": "## Solution. Then $v=4$ km/h.",
    "answer": "4",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "586fd646",
    "is_reasoning_complete": [True, True],
    "generations": ["<think>\na\n</think>\n\n\\boxed{4}", "<think>\nb\n</think>\n\n\\boxed{4}"],
    "correctness_math_verify": [True, False],
    "correctness_llama": None,
    "finish_reasons": None,
    "correctness_count": 1,
    "messages": [user("How fast?"), assistant("<think>\na\n</think>\n\n\\boxed{4}")],
}
THOUGHTS: dict[str, Any] = {  # open-thoughts/OpenThoughts-114k, bespokelabs/Bespoke-Stratos-17k
    "system": "Your role as an assistant involves thoroughly exploring questions.",
    "conversations": [
        {"from": "user", "value": "Return your final response within \\boxed{}. 1 + 1?"},
        {"from": "assistant", "value": "<|begin_of_thought|>\n\nso\n\n<|end_of_thought|>\n\n\\boxed{2}"},
    ],
}


def test_s1k_has_two_teachers_of_which_one_is_named() -> None:
    assert "several columns could be the answer: `deepseek_attempt`, `gemini_attempt`" in message_of(S1K)
    columns: dict[Any, str] = {"answer": "deepseek_attempt"}
    said = (
        "could be the reasoning: `deepseek_thinking_trajectory`, `gemini_thinking_trajectory`; name one, e.g. columns:"
    )
    assert said in message_of(S1K, columns)
    for who, chain, answer in (
        ("deepseek", "DeepSeek thinks.", "\\boxed{128}"),
        ("gemini", "Gemini thinks.", "It is 128."),
    ):
        trace = trace_of(S1K, {"reasoning": f"{who}_thinking_trajectory", "answer": f"{who}_attempt"})
        assert trace == Trace((user(S1K["question"]),), think(chain, answer), "The answer is $128$.")


def test_openr1_math_is_its_messages_with_its_answer() -> None:
    assert trace_of(OPENR1) == Trace((user("How fast?"),), "<think>\na\n</think>\n\n\\boxed{4}", "4")
    assert read_question({k: v for k, v in OPENR1.items() if k != "messages"}, "") == Question("How fast?", "4")


def test_openthoughts_is_its_conversation_after_its_system_prompt() -> None:
    trace = trace_of(THOUGHTS)
    assert trace.prompt == (system(THOUGHTS["system"]), user("Return your final response within \\boxed{}. 1 + 1?"))
    assert trace.completion == "<think>\n\nso\n\n</think>\n\n\\boxed{2}"
    marked = "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>"
    assert trace_of({"question": "q", "answer": marked}).completion == "<think>a</think>b"


KNOWN: dict[str, tuple[dict[str, Any], Trace]] = {
    "openai/gsm8k": (
        {"question": "6 boxes of 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
        Trace((user("6 boxes of 7?"),), "6 * 7 = <<6*7=42>>42\n#### 42"),
    ),
    "nvidia/OpenMathReasoning": (
        {
            "expected_answer": "10",
            "problem_type": "has_answer_extracted",
            "problem_source": "aops_c4_high_school_math",
            "generation_model": "DeepSeek-R1",
            "pass_rate_72b_tir": "0.9",
            "problem": "Given x?",
            "generated_solution": "<think>\nok\n</think>\n\n\\boxed{10}",
            "inference_mode": "cot",
            "used_in_kaggle": True,
        },
        Trace((user("Given x?"),), "<think>\nok\n</think>\n\n\\boxed{10}", "10"),
    ),
    "AI-MO/NuminaMath-CoT": (
        {
            "source": "synthetic_math",
            "problem": "x?",
            "solution": "So \\boxed{3}",
            "messages": [user("x?"), assistant("So \\boxed{3}")],
        },
        Trace((user("x?"),), "So \\boxed{3}"),  # its solution is the teacher's own text
    ),
    "tatsu-lab/alpaca": (
        {
            "instruction": "Identify the odd one out.",
            "input": "Twitter, Instagram, Telegram",
            "output": "Telegram",
            "text": "Below is an instruction ...",
        },
        Trace((user("Identify the odd one out.\n\nTwitter, Instagram, Telegram"),), "Telegram"),
    ),
    "tatsu-lab/alpaca without input": (
        {"instruction": "Give three tips.", "input": "", "output": "1. 2. 3.", "text": "Below is ..."},
        Trace((user("Give three tips."),), "1. 2. 3."),
    ),
    "FreedomIntelligence/medical-o1-reasoning-SFT": (
        {"Question": "Which vein?", "Complex_CoT": "Let me see.", "Response": "The first."},
        Trace((user("Which vein?"),), "<think>\nLet me see.\n</think>\n\nThe first."),
    ),
    "glaiveai/reasoning-v1-20m": (
        {"prompt": "Why?", "response": "<think>\nHm.\n</think>\n\nSo."},
        Trace((user("Why?"),), "<think>\nHm.\n</think>\n\nSo."),
    ),
    "simplescaling/s1K": (
        {
            "solution": "128",
            "question": "2^7?",
            "cot_type": "math",
            "source_type": "x",
            "metadata": "{}",
            "cot": None,
            "thinking_trajectories": ["doubling"],
            "attempt": "It is 128.",
        },
        Trace((user("2^7?"),), "<think>\ndoubling\n</think>\n\nIt is 128.", "128"),
    ),
    "GAIR/LIMO": (
        {"question": "x?", "solution": "<think>\nlong\n</think>\n\n3", "answer": "3"},
        Trace((user("x?"),), "<think>\nlong\n</think>\n\n3", "3"),
    ),
    "trl-lib conversational": (
        {"prompt": [user("Sky?")], "completion": [assistant("Blue.")]},
        Trace((user("Sky?"),), "Blue."),
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "a", "prompt_id": "x", "messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        Trace((user("a"), assistant("b"), user("c")), "d"),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rows_of_well_known_datasets_are_what_they_are_meant_to_be(name: str) -> None:
    row, trace = KNOWN[name]
    assert trace_of(row) == trace


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q", "answer": "6 * 7\n#### 42"}, "42"),  # openai/gsm8k
        ({"problem": "q", "solution": "So $42$.", "answer": "42", "subject": "Algebra", "level": 2}, "42"),  # MATH-500
        ({"ID": "2024-I-1", "Problem": "q", "Solution": "So 42.", "Answer": 42}, "42"),  # AIME 2024
        ({"problem": "q", "expected_answer": "42", "generated_solution": "So 42."}, "42"),
        ({"question": "q", "final_answer": ["42"], "solution": ["So 42."], "error": None}, "42"),  # OlympiadBench
    ],
)
def test_questions_of_well_known_benchmarks_have_their_right_answer(row: dict[str, Any], right: str) -> None:
    assert read_question(row, "") == Question("q", right)


def test_the_doc_of_columns_names_every_name_once() -> None:
    for names in (QUESTION, REASONING, RESPONSE, GOLD, WRITTEN, MESSAGES):
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z_]+", n) for n in names)
    assert not {*QUESTION} & {*REASONING, *RESPONSE, *GOLD, *WRITTEN, *MESSAGES}


def test_batches_hold_as_many_and_as_long_as_they_may() -> None:
    lengths = [40, 7, 12, 61, 9, 30, 29, 8, 8, 75]
    cut = [[lengths[i] for i in batch] for batch in batches(lengths, 3, 60)]
    assert cut == [[7, 8, 8], [9, 12], [29, 30], [40], [61], [75]]
    assert [len(b) for b in batches(lengths, 3, 10**6)] == [3, 3, 3, 1]
    assert list(batches([], 3, 60)) == []
    assert list(batches(lengths, None, None)) == [sorted(range(len(lengths)), key=lambda i: lengths[i])]
