"""Rows as public data sets publish them: what is asked, what is trained, and what is right."""

import json
from typing import Any

import pytest

from mot_lora.data.gold import right_answers
from mot_lora.data.scoring import is_right
from mot_lora.data.traces import Example, Trace, read_question, read_trace, read_traces, settled
from mot_lora.errors import RowError

CHAIN, WHOLE = "doubling seven times", "<think>\ndoubling seven times\n</think>\n\nIt is \\boxed{128}."
ASK, SAYS = "What is $2^7$?", "It is \\boxed{128}."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# rows that mean: asked ASK, the chain CHAIN, the answer SAYS, and 128 is right
PUBLISHED: dict[str, dict[str, Any]] = {
    "open-r1/OpenR1-Math-220k": {
        "problem": ASK,
        "solution": "## Solution. So $128$.",
        "answer": "128",
        "problem_type": "Algebra",
        "is_reasoning_complete": [True, True],
        "generations": ["<think>\nno\n</think>\n\n127", WHOLE],
        "correctness_math_verify": [False, True],
        "correctness_llama": None,
        "messages": [user(ASK), assistant(WHOLE)],
    },
    "open-thoughts/OpenThoughts-114k, metadata": {
        "problem": ASK,
        "deepseek_reasoning": CHAIN,
        "deepseek_solution": SAYS,
        "ground_truth_solution": "So $2^7 = \\boxed{128}$",
        "domain": "math",
        "source": "numina_math",
        "test_cases": None,
        "starter_code": None,
    },
    "PrimeIntellect/SYNTHETIC-1": {
        "prompt": ASK,
        "task_type": "verifiable_math",
        "verification_info": '{"ground_truth": "128"}',
        "llm_response": WHOLE,
        "score": 1.0,
        "response_id": "x",
    },
    "a-m-team/AM-DeepSeek-R1-Distilled-1.4M": {
        "messages": [
            {
                "role": "user",
                "content": ASK,
                "info": {"source": "x", "reference_answer": "128", "test_case": None, "think_content": None},
            },
            {
                "role": "assistant",
                "content": WHOLE,
                "info": {"source": None, "reference_answer": None, "test_case": None, "think_content": CHAIN},
            },
        ]
    },
    "nvidia/OpenMathReasoning": {
        "expected_answer": "128",
        "problem_type": "has_answer_extracted",
        "generation_model": "DeepSeek-R1",
        "pass_rate_72b_tir": "0.9",
        "problem": ASK,
        "generated_solution": WHOLE,
        "inference_mode": "cot",
    },
    "nvidia/Llama-Nemotron-Post-Training-Dataset": {
        "input": [user(ASK)],
        "output": WHOLE,
        "category": "math",
        "reasoning": "on",
        "system_prompt": None,
        "generator": "DeepSeek-R1",
        "expected_answer": "128",
    },
    "Congliu/Chinese-DeepSeek-R1-Distill-data-110k": {
        "input": ASK,
        "reasoning_content": CHAIN,
        "content": SAYS,
        "repo_name": "x",
        "score": 10,
        "answer": "128",
    },
    "zwhe99/DeepMath-103K, one of three": {
        "question": ASK,
        "final_answer": "128",
        "difficulty": 2.0,
        "topic": "Algebra",
        "generation": WHOLE,
    },
    "GAIR/LIMO": {"question": ASK, "solution": WHOLE, "answer": "128"},
    "simplescaling/s1K": {
        "solution": "128",
        "question": ASK,
        "cot_type": "math",
        "source_type": "x",
        "metadata": "{}",
        "cot": None,
        "thinking_trajectories": [CHAIN],
        "attempt": SAYS,
    },
    "KingNish/reasoning-base-20k": {"user": ASK, "assistant": SAYS, "reasoning": CHAIN, "template": "", "gold": 128.0},
    "Magpie-Align/Magpie-Reasoning": {
        "uuid": "x",
        "instruction": ASK,
        "response": WHOLE,
        "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": WHOLE}],
        "ground_truth": 128,
    },
    "verl, with a response": {
        "data_source": "x",
        "prompt": [user(ASK)],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "128"},
        "extra_info": {"index": 0, "split": "train"},
        "response": WHOLE,
    },
}


def trace_of(row: dict[str, Any], columns: dict[Any, str] | None = None) -> Trace:
    trace = read_trace(row, "row 1", columns)
    assert isinstance(trace, Trace)
    return trace


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_teachers_row_is_what_it_is_meant_to_be(name: str) -> None:
    trace = trace_of(PUBLISHED[name])
    assert (trace.prompt, trace.completion) == ((user(ASK),), WHOLE)
    assert trace.gold is not None
    assert any(is_right(WHOLE, right) for right in trace.right_answers)
    assert not any(is_right("<think>\n</think>\n\n\\boxed{127}", right) for right in trace.right_answers)


ASKED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "openai/gsm8k": ({"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, ("42",)),
    "meta-math/MetaMathQA": (
        {"query": "q", "response": "So.\n#### 42\nThe answer is: 42", "type": "GSM_Rephrased"},
        ("42",),
    ),
    "HuggingFaceH4/MATH-500": ({"problem": "q", "solution": "So $42$.", "answer": "42", "level": 2}, ("42",)),
    "HuggingFaceH4/aime_2024": (
        {"id": 60, "problem": "q", "solution": "So 42.", "answer": "42", "url": "x", "year": "2024"},
        ("42",),
    ),
    "Maxwell-Jia/AIME_2024": ({"ID": "2024-I-1", "Problem": "q", "Solution": "So 42.", "Answer": 42}, ("42",)),
    "a table with a gap": ({"question": "q", "answer": 42.0}, ("42",)),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [user("q")],
            "reward_model": {"style": "rule", "ground_truth": "42"},
            "extra_info": {"answer": "so\n#### 42", "question": "q", "split": "test"},
        },
        ("42",),
    ),
    "Skywork/Skywork-OR1-RL-Data": ({"prompt": [user("q")], "reward_model": {"ground_truth": '["42"]'}}, ("42",)),
    "AI-MO/NuminaMath-1.5": (
        {"problem": "q", "solution": "s", "answer": "42", "question_type": "math-word-problem"},
        ("42",),
    ),
    "Hothan/OlympiadBench": ({"question": "q", "final_answer": ["42"], "solution": ["So 42."]}, ("42",)),
    "inclusionAI/AReaL-boba-Data": ({"prompt": "q", "task": "math", "solutions": ["\\boxed{42}"]}, ("\\boxed{42}",)),
    "mandarjoshi/trivia_qa": (
        {"question": "q", "answer": {"value": "NYC", "aliases": ["New York", "NYC"], "type": "WikipediaEntity"}},
        ("NYC", "New York"),
    ),
    "google-research-datasets/nq_open": ({"question": "q", "answer": ["1972", "in 1972"]}, ("1972", "in 1972")),
    "rajpurkar/squad": (
        {
            "id": "x",
            "title": "t",
            "context": "Tom is 9.",
            "question": "q",
            "answers": {"text": ["9", "nine"], "answer_start": [1, 1]},
        },
        ("9", "nine"),
    ),
    "google/boolq": ({"question": "q", "answer": False, "passage": "Tom is 9."}, ("false", "no")),
    "ucinlp/drop": (
        {"passage": "Tom is 9.", "question": "q", "answers_spans": {"spans": ["9"], "types": ["span"]}},
        ("9",),
    ),
    "hotpotqa/hotpot_qa": (
        {"question": "q", "answer": "yes", "context": {"title": ["Tom"], "sentences": [["Tom ", "is 9."]]}},
        ("yes",),
    ),
    "qiaojin/PubMedQA": (
        {
            "question": "q",
            "context": {"contexts": ["Tom is 9."], "labels": ["A"]},
            "long_answer": "l",
            "final_decision": "yes",
        },
        ("yes",),
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_of_a_benchmark_has_its_right_answers(name: str) -> None:
    row, right = ASKED[name]
    asked = read_question(row, "row 1", {"gold": "final_decision"} if "final_decision" in row else None)
    assert asked.right_answers == right
    about = (
        {"Tom\nTom is 9.\n\nq"}
        if "hotpot" in name
        else {"Tom is 9.\n\nq"}
        if {"context", "passage"} & {*row}
        else {"q"}
    )
    assert {asked.question} == about


def test_a_context_that_the_question_holds_is_not_said_twice() -> None:
    assert (
        read_question({"question": "Tom is 9. How old?", "context": "Tom is 9.", "answer": "9"}, "").question.count("9")
        == 1
    )
    row = {"question": "q", "documents": [{"title": "A", "text": "a"}, {"text": "b"}, "c"], "answer": "1"}
    assert trace_of(row).question == "A\na\n\nb\n\nc\n\nq"
    assert trace_of({**row, "notes": "n"}, {"context": "notes"}).question == "n\n\nq"


@pytest.mark.parametrize(
    "row", [{"answer": "proof"}, {"answer": "notfound"}, {"answers": {"text": [], "answer_start": []}}]
)
def test_a_problem_without_an_answer_has_none(row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as e:
        read_question({"problem": "q", **row}, "row 1")
    assert e.value.reason == "without a right answer"
    assert trace_of({"problem": "q", "solution": "s", **row}).gold is None


def test_several_right_answers() -> None:
    assert list(right_answers("[1, 2]")) == ["[1, 2]"]  # a list of numbers is itself an answer
    assert list(right_answers('["1", "2"]')) == ["1", "2"]
    assert list(right_answers([1, True, None, "x\n#### 5"])) == ["1", "true", "yes", "5"]
    assert trace_of({"question": "q", "response": "r", "gold": ["a", "b"]}).right_answers == ("a", "b")
    assert trace_of({"question": "q", "answer": True}).completion == "true"


# --- names with dots --------------------------------------------------------------------------------------


def test_columns_reach_into_cells() -> None:
    """verl-project/verl's parquet files."""
    row = {
        "prompt": [user("rendered q")],
        "extra_info": {"question": "q", "answer": "so\n#### 42"},
        "reward_model": '{"ground_truth": "41"}',
        "samples": [{"text": "r"}],
    }
    columns: dict[Any, str] = {"question": "extra_info.question", "gold": "reward_model.ground_truth"}
    assert read_question(row, "", columns).right_answers == ("41",)
    assert trace_of(row, {**columns, "answer": "samples.0.text"}) == Trace((user("q"),), "r", "41")
    assert trace_of({"a.b": "r", "question": "q"}, {"answer": "a.b"}).completion == "r"
    with pytest.raises(RowError, match=r"nothing in `extra_info\.gold`"):
        read_question({**row, "extra_info": {"gold": ""}}, "row 1", {"question": "prompt", "gold": "extra_info.gold"})


# --- several generations a row ----------------------------------------------------------------------------


def found(row: dict[str, Any], columns: dict[Any, str] | None = None) -> list[str]:
    outcomes: list[str] = []
    for where, one in read_traces(row, "row 1", columns):
        assert where.startswith("row 1")
        outcomes.append(
            one.completion if isinstance(one, Trace) else one.reason if isinstance(one, RowError) else str(one)
        )
    return outcomes


def test_each_generation_is_a_trace_but_those_that_their_row_calls_wrong_or_cut() -> None:
    row = {
        "problem": "q",
        "answer": "4",
        "generations": ["a", "b", "c", "d", None],
        "is_reasoning_complete": [True, True, False, True, True],
        "correctness_math_verify": [True, False, True, False, True],
        "correctness_llama": [False, False, None, True, None],
    }
    assert found(row) == ["a", "marked as wrong", "reasoning never ends", "d", "without an answer"]
    assert found({**row, "correctness_llama": None}) == [
        "a", "marked as wrong", "reasoning never ends", "marked as wrong", "without an answer",
    ]  # fmt: skip
    bare = {"problem": "q", "generations": json.dumps(["a", "b"]), "correctness_math_verify": [None, None]}
    assert found(bare) == ["a", "b"]
    assert [where for where, _ in read_traces(bare, "x:3")] == ["x:3, generation 1", "x:3, generation 2"]


def test_generations_beside_messages_wait_until_they_are_asked_for() -> None:
    row = {"problem": "q", "generations": ["a", "b"], "messages": [user("q"), assistant("a")]}
    assert found(row) == ["a"]
    assert found({k: v for k, v in row.items() if k != "messages"}) == ["a", "b"]


def test_chains_and_answers_that_are_listed_side_by_side_belong_together() -> None:
    row = {"question": "q", "thinking": ["r", "s"], "responses": ["1", "2"]}
    pairs = ["<think>\nr\n</think>\n\n1", "<think>\ns\n</think>\n\n2"]
    assert found(row) == pairs
    named = {"q": "q", "chains": ["r", "s"], "texts": ["1", "2"]}
    assert found(named, {"question": "q", "reasoning": "chains", "answer": "texts"}) == pairs
    assert found({"question": "q", "outputs": [{"text": "1"}, assistant("2")]}) == ["1", "2"]


def test_generations_in_numbered_columns() -> None:
    row = {"question": "q", "final_answer": "4", **{f"r1_solution_{i}": f"s{i}" for i in (1, 2, 3)}}
    assert found(row) == ["s1", "s2", "s3"]
    assert read_question(row, "").right_answers == ("4",)


def test_a_row_of_one_generation_is_one_trace() -> None:
    for row in ({"question": "q", "answer": "a"}, {"question": "q", "generations": ["a"]}):
        assert read_traces(row, "row 1") == [("row 1", Trace((user("q"),), "a"))]
    ids = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert isinstance(read_traces(ids, "row 1")[0][1], Example)
    assert found({"question": "q"}) == ["without an answer"]


@pytest.mark.parametrize("word", ["on", "off", True, False, "high"])
def test_whether_to_reason_is_no_reasoning(word: Any) -> None:
    assert trace_of({"question": "q", "output": "a", "reasoning": word}).completion == "a"


def test_an_answer_that_is_a_list_in_words_is_one_answer() -> None:
    for text in ("[1, 2]", '["a", "b"]', '[{"from": "a", "to": "b"}]'):
        assert found({"question": "List them.", "response": text}) == [text]
    assert found({"question": "q", "generations": '["a", "b"]'}) == ["a", "b"]


def test_where_a_response_failed_the_right_answer_is_not_the_teachers() -> None:
    rows = [{"question": "q", "response": "so 2", "answer": "2"}, {"question": "p", "response": None, "answer": "4"}]
    columns = settled(rows, {})
    assert [found(row, dict(columns)) for row in rows] == [["so 2"], ["without an answer"]]
    # of two sources that are merged, each has its own column
    merged = [{"question": "q", "response": "so 2", "answer": None}, {"question": "p", "response": None, "answer": "4"}]
    assert settled(merged, {}) == {}
    assert settled([*rows, {"question": "q", "output": "x"}], {}) == {}
    assert settled(rows, {"answer": "answer"}) == {"answer": "answer"}
    assert settled([PUBLISHED["open-r1/OpenR1-Math-220k"]], {}) == {}
