"""Questions of choices as their data sets write them: asked with their options, and right by letter and by text."""

import json
import re
from typing import Any

import pytest

from mot_lora.data.choices import Choices, find_choices
from mot_lora.data.traces import Trace, read_question, read_trace
from mot_lora.errors import UserError

ASK = "Which is a prime?"
FOUR = ["4", "6", "7", "9"]
LINES = "A. 4\nB. 6\nC. 7\nD. 9"

# a row of each, in which 7 is right and the third
PUBLISHED: dict[str, dict[str, Any]] = {
    "cais/mmlu": {"question": ASK, "subject": "math", "choices": FOUR, "answer": 2},
    "TIGER-Lab/MMLU-Pro": {
        "question_id": 70,
        "question": ASK,
        "options": FOUR,
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": "math",
        "src": "x",
    },
    "allenai/ai2_arc": {
        "id": "x",
        "question": ASK,
        "choices": {"text": FOUR, "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    },
    "allenai/openbookqa": {
        "id": "x",
        "question_stem": ASK,
        "choices": {"text": FOUR, "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    },
    "tau/commonsense_qa": {
        "question": ASK,
        "question_concept": "prime",
        "choices": {"label": ["A", "B", "C", "D"], "text": FOUR},
        "answerKey": "C",
    },
    "Rowan/hellaswag": {
        "ind": 4,
        "ctx_a": "x",
        "ctx_b": "y",
        "ctx": ASK,
        "endings": FOUR,
        "source_id": "z",
        "label": "2",
    },
    "GBaker/MedQA-USMLE": {
        "question": ASK,
        "answer": "7",
        "options": {"A": "4", "B": "6", "C": "7", "D": "9"},
        "meta_info": "step1",
        "answer_idx": "C",
    },
    "MedQA, keys and values": {
        "question": ASK,
        "options": [{"key": k, "value": v} for k, v in zip("ABCD", FOUR, strict=True)],
        "answer_idx": "C",
    },
    "openlifescienceai/medmcqa": {
        "question": ASK,
        "opa": "4",
        "opb": "6",
        "opc": "7",
        "opd": "9",
        "cop": 2,
        "choice_type": "single",
        "exp": "7 has no divisor.",
    },
    "haonan-li/cmmlu": {"Question": ASK, "A": "4", "B": "6", "C": "7", "D": "9", "Answer": "C"},
    "ceval/ceval-exam": {
        "id": 0,
        "question": ASK,
        "A": "4",
        "B": "6",
        "C": "7",
        "D": "9",
        "answer": "C",
        "explanation": "",
    },
    "deepmind/aqua_rat": {
        "question": ASK,
        "options": ["A)4", "B)6", "C)7", "D)9"],
        "rationale": "7 has none.",
        "correct": "C",
    },
    "allenai/math_qa": {"Problem": ASK, "Rationale": "x", "options": "a ) 4 , b ) 6 , c ) 7 , d ) 9", "correct": "c"},
    "CMExam": {"Question": ASK, "Options": "A 4\nB 6\nC 7\nD 9", "Answer": "C"},
    "EleutherAI/race": {"question": ASK, "options": FOUR, "answer": "C"},
    "lucasmccabe/logiqa": {"query": ASK, "options": FOUR, "correct_option": 2},
    "reclor": {"question": ASK, "answers": FOUR, "label": 2, "id_string": "x"},
    "cosmos_qa": {"question": ASK, "answer0": "4", "answer1": "6", "answer2": "7", "answer3": "9", "label": 2},
    "social_i_qa": {"question": ASK, "answerA": "4", "answerB": "6", "answerC": "7", "label": "3"},
    "swag": {"sentence": ASK, "ending0": "4", "ending1": "6", "ending2": "7", "ending3": "9", "label": 2},
    "a table of options, counted from 1": {
        "question": ASK,
        **{f"option{i + 1}": t for i, t in enumerate(FOUR)},
        "answer": 3,
    },
    "a table of options, by letter": {
        "question": ASK,
        **{f"option_{k}": t for k, t in zip("abcd", FOUR, strict=True)},
        "answer": "c",
    },
    "by the column's name": {
        "question": ASK,
        **{f"option_{k}": t for k, t in zip("abcd", FOUR, strict=True)},
        "correct": "option_c",
    },
    "digits as labels": {
        "question": ASK,
        "choices": {"text": FOUR, "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
    "JSON in a cell": {"question": ASK, "choices": json.dumps(FOUR), "answer": "C"},
    "Python in a cell": {"question": ASK, "options": str(FOUR), "answer": "(C)"},
    "one of five is missing": {
        "question": ASK,
        "options": dict(zip("ABCDE", [*FOUR, None], strict=True)),
        "answer": "C.",
    },
    "the answer in words": {"question": ASK, "choices": FOUR, "answer": "7"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_are_asked_and_the_right_one_is_known(name: str) -> None:
    """UKGovernmentBEIS/inspect_ai#5145."""
    asked = read_question(PUBLISHED[name], "row 1")
    lines = re.findall(r"^[\w]\. \d$", asked.question, re.MULTILINE)
    assert asked.question.startswith(f"{ASK}\n\n")
    assert len(lines) == (3 if name == "social_i_qa" else 4)
    assert lines[2] in ("C. 7", "3. 7")
    assert asked.right_answers == (lines[2][0], "7")


HASHED: dict[str, dict[str, Any]] = {
    "Idavidrein/gpqa": {
        "Question": ASK,
        "Correct Answer": "7",
        "Incorrect Answer 1": "4",
        "Incorrect Answer 2": "6",
        "Incorrect Answer 3": "9",
        "Explanation": "x",
    },
    "allenai/sciq": {
        "question": ASK,
        "distractor3": "9",
        "distractor1": "4",
        "distractor2": "6",
        "correct_answer": "7",
        "support": "",
    },
    "truthful_qa, multiple_choice": {
        "question": ASK,
        "mc1_targets": {"choices": ["7", "4", "6", "9"], "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": ["7", "4", "6", "9"], "labels": [1, 0, 0, 0]},
    },
    "truthful_qa, generation": {
        "type": "x",
        "question": ASK,
        "best_answer": "7",
        "correct_answers": ["7", "seven"],
        "incorrect_answers": ["4", "6", "9"],
    },
    "tasksource/bigbench": {
        "inputs": ASK,
        "targets": ["7"],
        "multiple_choice_targets": ["7", "4", "6", "9"],
        "multiple_choice_scores": [1, 0, 0, 0],
    },
}


@pytest.mark.parametrize("name", HASHED)
def test_where_the_right_one_stands_first_its_letter_does_not_tell_it(name: str) -> None:
    asked = read_question(HASHED[name], "row 1")
    assert sorted(re.findall(r"^\w\. (\d)$", asked.question, re.MULTILINE)) == sorted(FOUR)
    assert f"\n{asked.answer}. 7" in asked.question
    assert asked == read_question(HASHED[name], "row 1")


def test_orders_of_the_right_one_differ() -> None:
    rows = [{"question": f"{i}?", "Correct Answer": f"r{i}", "Incorrect Answer 1": f"w{i}"} for i in range(40)]
    assert 5 < sum(read_question(row, "").answer == "A" for row in rows) < 35


def test_two_options_of_physics_and_of_pronouns() -> None:
    piqa = {"goal": "Boil eggs.", "sol1": "In water.", "sol2": "In sand.", "label": 0}
    assert read_question(piqa, "").right_answers == ("A", "In water.")
    copa = {
        "premise": "It rained.",
        "question": "effect",
        "choice1": "It was dry.",
        "choice2": "It was wet.",
        "label": 1,
    }
    asked = read_question(copa, "")
    assert asked.question == "It rained.\n\neffect\n\nA. It was dry.\nB. It was wet."
    assert asked.answer == "B"
    winogrande = {
        "sentence": "The trophy did not fit since _ was big.",
        "option1": "trophy",
        "option2": "case",
        "answer": "1",
    }
    assert read_question(winogrande, "").right_answers == ("A", "trophy")


def test_options_that_the_question_holds_are_not_asked_twice() -> None:
    question = f"{ASK}\n(A) 4\n(B) 6\n(C) 7\n(D) 9"
    assert read_question({"question": question, "choices": FOUR, "answer": 2}, "").question == question
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "C"}]
    assert read_trace({"messages": turns, "options": FOUR}, "").prompt[0]["content"] == question  # pyright: ignore


def test_options_beside_a_conversation_are_asked_too() -> None:
    turns = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "So \\boxed{C}"}]
    trace = read_trace({"messages": turns, "options": FOUR, "answer": "C"}, "")
    assert isinstance(trace, Trace)
    assert trace.question == f"{ASK}\n\n{LINES}"
    assert trace.right_answers == ("C", "7")


def test_a_teachers_row_is_trained_with_its_options() -> None:
    row = {"question": ASK, "choices": FOUR, "reasoning": "7 has none.", "answer": "C"}
    trace = read_trace(row, "")
    assert isinstance(trace, Trace)
    assert (trace.question, trace.completion) == (f"{ASK}\n\n{LINES}", "<think>\n7 has none.\n</think>\n\nC")
    assert trace.gold is None  # the answer is the teacher's
    assert read_trace({**row, "answer": 2}, "") == trace  # a place is no answer to train
    assert read_trace({**row, "gold": "B"}, "").right_answers == ("B", "6")  # pyright: ignore


def test_options_may_lie_in_columns_that_are_named() -> None:
    row = {"question": ASK, "items": FOUR, "key": "C"}
    asked = read_question(row, "", {"choices": "items", "gold": "key"})
    assert (asked.question, asked.answer) == (f"{ASK}\n\n{LINES}", "C")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": FOUR, "answer": "5"}, "nothing says which of its options is right"),
        ({"choices": FOUR}, "nothing says which of its options is right"),
        ({"choices": FOUR, "answer": 7}, "nothing says which of its options is right"),
        ({"choices": ["0", "1", "2"], "answer": "1", "answer_index": 2}, "`answer_index` says C, `answer` says B"),
        ({"choices": ["3", "1", "2"], "answer": "1"}, None),
        ({"choices": ["1", "2", "3"], "answer": "1"}, "`1` is the text of one option and the place of another"),
        ({"options": FOUR, "answer": "B", "answer_index": 2}, "`answer_index` says C, `answer` says B"),
        ({"choices": [{"message": {"content": "x"}}], "answer": "x"}, "`choices` holds no options"),
        ({"options": "see the picture", "answer": "x"}, "`options` holds no options"),
    ],
)
def test_options_of_which_none_is_right_are_refused(row: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert read_question({"question": ASK, **row}, "row 1").answer == "B"
        return
    with pytest.raises(UserError) as e:
        read_question({"question": ASK, **row}, "row 1")
    assert str(e.value).startswith("row 1: ")
    assert said in str(e.value)


def test_what_is_no_question_of_choices_is_none() -> None:
    for row in ({"q": 1, "a": 2}, {"question": "q", "a": "x"}, {"answer_1": "x", "answer_2": "y"}, {"choices": []}):
        assert find_choices({k: v for k, v in row.items() if v != []}, "") is None
    assert read_question({"question": "q", "options": [], "answer": "2"}, "").question == "q"
    assert read_question({"question": "q", "choices": None, "answer": "2"}, "").question == "q"


def test_options_of_a_generation_and_an_apis_choices_are_no_options() -> None:
    row = {"question": "q", "response": "a", "options": {"temperature": 0.6, "num_ctx": 4096}}
    assert read_trace(row, "").prompt[0]["content"] == "q"  # pyright: ignore
    answers = [{"text": "a", "index": i, "finish_reason": "stop"} for i in (0, 1)]
    with pytest.raises(UserError, match="`choices` holds no options"):
        read_trace({"prompt": "q", "response": "a", "choices": answers}, "")


def test_a_text_is_right_too_where_it_tells_answers_apart() -> None:
    def right(text: str) -> tuple[str, ...]:
        return Choices(("A", "B"), (text, "x"), right=0).answers

    assert right("Paris") == ("A", "Paris")
    assert right("\\frac{1}{2}") == ("A", "\\frac{1}{2}")
    assert right("5 apples") == ("A",)  # a judge of mathematics reads 5
    assert right("b") == ("A",)  # the other's letter
