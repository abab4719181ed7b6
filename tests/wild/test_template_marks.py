"""Rows that hold the marks of a chat template already: raw generations, rendered prompts, responses that run on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from transformers import PreTrainedTokenizerBase
from wild import jsonl, recipe, student

from mot_lora.data.chat import EndedError, prompt_text, unmarked
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace, read_trace
from mot_lora.errors import UserError

Call = Callable[..., tuple[int, str, str]]

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
RENDERED = {
    "chatml": "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n",
    "chatml-think": "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "chatml-closed": "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "chatml-turn": "<|im_start|>user\n2 + 3?<|im_end|>\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2 + 3?<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\n2 + 3?<end_of_turn>\n<start_of_turn>model\n",
    "gemma-4": "<bos><|turn>user\n2 + 3?<turn|>\n<|turn>model\n",
    "mistral": "<s>[INST] 2 + 3? [/INST]",
    "phi-3": "<|user|>\n2 + 3?<|end|>\n<|assistant|>\n",
    "phi-3-system": "<|system|>\nBe brief.<|end|>\n<|user|>\n2 + 3?<|end|>\n<|assistant|>\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>2 + 3?<｜Assistant｜><think>\n",
    "harmony": "<|start|>user<|message|>2 + 3?<|end|><|start|>assistant",
    "granite": "<|start_of_role|>user<|end_of_role|>2 + 3?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "command-r": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2 + 3?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
    "<|CHATBOT_TOKEN|>",
    "exaone": "[|user|]2 + 3?\n[|assistant|]",
}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatml")
    student(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 259]}')  # <|im_end|> and <|endoftext|>
    return folder


@pytest.fixture(scope="module")
def tok(chatml: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(chatml)


def trace(prompt: str, completion: str) -> Trace:
    found = read_trace({"prompt": prompt, "completion": completion}, "row 1")
    assert isinstance(found, Trace)
    return found


def text(tok: PreTrainedTokenizerBase, found: Trace) -> str:
    return tok.decode(list(encode(tok, found).input_ids))


# --- the end of an answer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        "<|im_end|>",
        "<|im_end|>\n",
        "<|im_end|><|im_end|>",
        "<|im_end|>\n<|endoftext|>",
        "<|im_end|><|pad|><|pad|>",
        "<|endoftext|>",
        "<｜end▁of▁sentence｜>",
        "<|eot_id|>",
        "<end_of_turn>\n<eos>",
        "</s>",
        "<|return|>",
        "<|end|>\n",
        "<|END_OF_TURN_TOKEN|>",
    ],
)
def test_an_answers_own_end_is_trained_once(tok: PreTrainedTokenizerBase, end: str) -> None:
    """Whatever model wrote it: huggingface/trl#3091."""
    assert encode(tok, trace("2 + 3?", f"<think>\nadd\n</think>\n\n5{end}")) == encode(
        tok, trace("2 + 3?", "<think>\nadd\n</think>\n\n5")
    )


@pytest.mark.parametrize("words", ["5 ", "5\n", "x<|im", "a </s> b", "</s> is a token", "say <|im_start|>user"])
def test_other_words_are_left_as_they_are(tok: PreTrainedTokenizerBase, words: str) -> None:
    assert unmarked(tok, trace("q", words)).completion == words


@pytest.mark.parametrize(
    "header", ["<|im_start|>assistant\n", "<|im_start|>assistant", "<start_of_turn>model\n", "[/INST]"]
)
def test_an_answers_own_header_is_read_once(tok: PreTrainedTokenizerBase, header: str) -> None:
    whole = "<think>\nadd\n</think>\n\n5"
    assert encode(tok, trace("q", f"{header}{whole}<|im_end|>")) == encode(tok, trace("q", whole))


def test_a_users_turn_within_a_message_is_written_once(tok: PreTrainedTokenizerBase) -> None:
    plain = ("1 + 1?", "2", "2 + 2?")
    marked = ("<|im_start|>user\n1 + 1?<|im_end|>\n", "<|im_start|>assistant\n2<|im_end|>", "2 + 2?<|im_end|>")
    told = [
        tuple({"role": role, "content": w} for role, w in zip(("user", "assistant", "user"), words, strict=True))
        for words in (plain, marked)
    ]
    assert encode(tok, Trace(told[1], "4")) == encode(tok, Trace(told[0], "4"))


def test_an_end_within_earlier_turns_is_written_once(tok: PreTrainedTokenizerBase) -> None:
    prompt = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2<|im_end|>"},
        {"role": "user", "content": "2 + 2?"},
    )
    assert text(tok, Trace(prompt, "4")).count("<|im_end|>") == 4


# --- answers that run on ---------------------------------------------------------------------------------

RUNS_ON = (
    "5<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n6",
    "5<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>",
    "5<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?",
    "5</s><s>[INST] And 3 + 3? [/INST]",
    "5<end_of_turn>\n<start_of_turn>user\nAnd 3 + 3?",
    "5<｜end▁of▁sentence｜><｜User｜>And 3 + 3?",
    "5<|im_end|>\n<|im_start|>assistant\n5<|im_end|>",
    "5<|im_end|> and more",
    "5<|endoftext|>The next document",
    "<think>\nadd<|im_end|>\n</think>\n\n5",
)


@pytest.mark.parametrize("response", RUNS_ON)
def test_an_answer_that_goes_on_into_a_users_turn_is_told(tok: PreTrainedTokenizerBase, response: str) -> None:
    with pytest.raises(EndedError, match=r"^the answer goes on after the end of its turn"):
        encode(tok, trace("2 + 3?", response))


def test_answers_that_run_on_are_left_out_and_counted(chatml: Path, tmp_path: Path, call: Call) -> None:
    rows = [{"question": f"{i}?", "response": f"{i}<|im_end|>"} for i in range(9)]
    rows += [{"question": f"{i} + 1?", "response": response} for i, response in enumerate(RUNS_ON)]
    config = recipe(tmp_path, chatml, jsonl(tmp_path / "one.jsonl", rows))
    status, out, err = call("data", config, "--json")
    assert status == 0, err
    record = json.loads(out)
    (teacher,) = record["teachers"]
    assert (teacher["used"] + teacher["held_out"], teacher["marked"]) == (9, teacher["used"])
    assert teacher["left_out"] == {"goes on after its end": len(RUNS_ON)}
    _, out, _ = call("data", config)
    assert f"{teacher['used']} traces of one had marks of a chat template, which were removed" in " ".join(out.split())


# --- prompts that are rendered ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RENDERED if name.startswith("chatml")])
def test_a_prompt_in_the_students_own_template_is_read_as_its_words(tok: PreTrainedTokenizerBase, name: str) -> None:
    rendered = trace(RENDERED[name], "add\n</think>\n\n5")
    assert encode(tok, rendered) == encode(tok, trace("2 + 3?", "<think>\nadd\n</think>\n\n5"))
    assert unmarked(tok, rendered).question == "2 + 3?"


@pytest.mark.parametrize("name", [name for name in RENDERED if not name.startswith("chatml")])
def test_a_prompt_in_another_models_template_is_refused(tok: PreTrainedTokenizerBase, name: str) -> None:
    with pytest.raises(UserError, match="prompt was rendered by a chat template") as e:
        encode(tok, trace(RENDERED[name], "5"))
    assert "\n" not in str(e.value)


def test_a_refused_prompt_names_its_row(chatml: Path, tmp_path: Path, call: Call) -> None:
    file = jsonl(tmp_path / "one.jsonl", [{"prompt": RENDERED["gemma"], "completion": "5"}])
    line = refused(call("data", recipe(tmp_path, chatml, file)))
    assert line.startswith(f"{file}:1: its prompt was rendered by a chat template")
    assert "<start_of_turn>" in line


@pytest.mark.parametrize(
    "question",
    [
        "What does <|im_start|>user mean?",
        "<|im_start|>user is a mark of what?",
        "Explain [INST] and [/INST].",
        "[INST] opens what?",
        "User: 2 + 3?\nAssistant:",
    ],
)
def test_a_question_about_marks_is_a_question(tok: PreTrainedTokenizerBase, question: str) -> None:
    assert text(tok, trace(question, "5")) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )


def test_a_rendered_prompt_with_a_system_message(tok: PreTrainedTokenizerBase) -> None:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"})
    rendered = prompt_text(tok, messages)
    assert unmarked(tok, trace(rendered, "5")).prompt == messages
    assert encode(tok, trace(rendered, "5")) == encode(tok, Trace(messages, "5"))


def test_a_rendered_conversation_of_several_turns_is_taken_as_it_is(tok: PreTrainedTokenizerBase) -> None:
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 3?"},
    )
    assert encode(tok, trace(prompt_text(tok, messages), "5")) == encode(tok, Trace(messages, "5"))


def test_a_rendered_prompt_beside_a_system_message_of_its_own_is_refused(tok: PreTrainedTokenizerBase) -> None:
    rendered = prompt_text(tok, ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 3?"}))
    with pytest.raises(UserError, match="has other messages before it"):
        encode(tok, Trace(({"role": "system", "content": "Be brief."}, {"role": "user", "content": rendered}), "5"))


def test_the_beginning_of_a_text_is_there_once(tmp_path: Path) -> None:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
    student(tmp_path, template=LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>", extra=marks)
    tok = load_tokenizer(tmp_path)
    plain = encode(tok, trace("2 + 3?", "5"))
    conversation = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 3?"},
    )
    several = encode(tok, Trace(conversation, "5"))
    for begin in ("", "<|begin_of_text|>"):
        rendered = begin + RENDERED["llama-3"].removeprefix("<|begin_of_text|>")
        assert encode(tok, trace(rendered, "5")) == plain
        rendered = begin + prompt_text(tok, conversation).removeprefix("<|begin_of_text|>")
        assert encode(tok, trace(rendered, "5")) == several


def test_a_rendered_question_is_found_in_the_evaluation(chatml: Path, tmp_path: Path, call: Call) -> None:
    questions = [
        {"prompt": RENDERED["chatml"].replace("2 + 3", f"How much is {i} + {i}"), "answer": "0"} for i in range(3)
    ]
    rows = [{"question": f"How much is {i} + {i}?", "response": str(2 * i)} for i in range(9)]
    config = recipe(
        tmp_path,
        chatml,
        jsonl(tmp_path / "one.jsonl", rows),
        eval={"data": str(jsonl(tmp_path / "asked.jsonl", questions))},
    )
    status, out, err = call("data", config, "--json")
    assert status == 0, err
    (teacher,) = json.loads(out)["teachers"]
    assert teacher["left_out"] == {"in the evaluation": 3}


def test_raw_generations_from_rendered_prompts(chatml: Path, tmp_path: Path, call: Call) -> None:
    """As RL data have them: the prompt ends in <think>, the response begins within the chain and brings its end."""
    rows = [
        {"prompt": RENDERED["chatml-think"].replace("2", str(i)), "completion": f"add\n</think>\n\n{i}<|im_end|>"}
        for i in range(30)
    ]
    config = recipe(tmp_path, chatml, jsonl(tmp_path / "one.jsonl", rows))
    status, out, err = call("data", config, "--json")
    assert status == 0, err
    (teacher,) = json.loads(out)["teachers"]
    (asked, answered) = teacher["sample"]
    assert asked["text"] in [RENDERED["chatml"].replace("2", str(i)) for i in range(30)]
    assert answered["text"].startswith("<think>\nadd\n</think>\n\n")
    assert answered["text"].count("<|im_end|>") == 1
    assert (teacher["used"] + teacher["held_out"], teacher["without_reasoning"]) == (30, 0)
    assert teacher["marked"] == teacher["used"]


def test_verified_only_sees_the_answer_without_its_end(chatml: Path, tmp_path: Path, call: Call) -> None:
    rows = [{"question": f"Word {i}?", "response": "yes<|im_end|>", "gold": "yes"} for i in range(4)]
    config: Any = recipe(tmp_path, chatml, jsonl(tmp_path / "one.jsonl", rows))
    status, out, err = call("data", config, "teachers.0.verified_only=true", "--json")
    assert status == 0, err
    assert json.loads(out)["teachers"][0]["left_out"] == {}
