import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mot_lora import UserError
from mot_lora.data import (
    Example,
    Question,
    Trace,
    collate,
    encode,
    encode_all,
    hold_out,
    load_tokenizer,
    prompt_text,
    read_questions,
    read_traces,
)
from mot_lora.loss import IGNORE
from mot_lora.reader import demo_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_path("student"))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


# --- traces to tokens ----------------------------------------------------------------------------


def test_the_mask_covers_the_prompt_and_nothing_else(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"question": "How much is 12 + 3?", "reasoning": " 12 + 3 = 15\nso 15 ", "answer": "15"}
    (trace,) = read_traces([write(tmp_path / "a.jsonl", row)])
    example = encode(tokenizer, trace)
    prompt = "<|im_start|>user\nHow much is 12 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer, trace.prompt) == prompt
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == prompt
    trained = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(trained) == "<think>\n12 + 3 = 15\nso 15\n</think>\n\n15<|im_end|>"
    assert trained[-1] == tokenizer.eos_token_id
    assert example.labels == (IGNORE,) * example.prompt_length + example.input_ids[example.prompt_length :]
    assert len(example) == len(example.input_ids) == len(example.labels)


def test_a_row_without_reasoning_has_an_empty_chain(tmp_path: Path) -> None:
    (trace,) = read_traces([write(tmp_path / "a.jsonl", {"question": "q", "answer": 7})])
    assert trace.completion == "<think>\n\n</think>\n\n7"


def test_earlier_turns_are_read_whole_and_not_trained(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 = ?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>\n2 + 2 = 4\n</think>\n\n4"},
    ]
    (trace,) = read_traces([write(tmp_path / "a.jsonl", {"messages": messages})])
    assert trace.question == "And 2 + 2?"
    example = encode(tokenizer, trace)
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert [m["content"] in prompt for m in messages] == [True, True, True, True, False]
    assert prompt.endswith("<|im_start|>assistant\n")
    trained = tokenizer.decode([label for label in example.labels if label != IGNORE])
    assert trained == messages[-1]["content"] + "<|im_end|>"


def test_several_files_are_joined_in_order(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"question": "1", "answer": "1"}, {"question": "2", "answer": "2"})
    b = write(tmp_path / "b.jsonl", {"question": "3", "answer": "3"})
    assert [t.question for t in read_traces([a, str(b)])] == ["1", "2", "3"]


def test_long_traces_are_left_out_and_counted_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    traces = [Trace(({"role": "user", "content": "q"},), "1 + " * n + "1") for n in (1, 5, 20, 40)]
    whole = [encode(tokenizer, t) for t in traces]
    limit = len(whole[2])
    assert encode_all(tokenizer, traces, limit) == (whole[:3], 1)
    assert encode_all(tokenizer, traces, limit - 1) == (whole[:2], 2)
    assert encode_all(tokenizer, traces, 2) == ([], 4)


def test_collate_pads_on_the_right_and_trains_no_padding() -> None:
    batch = collate([Example((5, 6, 7), 1), Example((8, 9, 10, 11, 12), 3)], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99, 99], [8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE], [IGNORE] * 3 + [11, 12]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


# --- holding out ---------------------------------------------------------------------------------


def trace(question: str, completion: str = "c") -> Trace:
    return Trace(({"role": "user", "content": question},), completion)


def test_a_question_is_held_out_for_every_teacher_or_for_none() -> None:
    first = [trace(f"question {i}", "one") for i in range(2000)]
    second = [trace(f"question {i}", "two") for i in reversed(range(0, 2000, 3))]
    train_1, held_1 = hold_out(first, 0.1, seed=0)
    train_2, held_2 = hold_out(second, 0.1, seed=0)
    assert sorted([*train_1, *held_1], key=repr) == sorted(first, key=repr)
    assert {t.question for t in held_2} <= {t.question for t in held_1}
    assert {t.question for t in train_2} <= {t.question for t in train_1}
    assert len(held_1) / 2000 == pytest.approx(0.1, abs=0.03)
    assert [t.question for t in train_1] == [t.question for t in first if t in train_1]
    assert {t.question for t in hold_out(first, 0.1, seed=1)[1]} != {t.question for t in held_1}


def test_a_larger_share_holds_out_more_of_the_same() -> None:
    traces = [trace(f"question {i}") for i in range(500)]
    assert hold_out(traces, 0, seed=0) == (traces, [])
    small, large = (set(map(repr, hold_out(traces, share, seed=0)[1])) for share in (0.1, 0.5))
    assert small < large


# --- mistakes in files ---------------------------------------------------------------------------

GOOD = b'{"question": "1 + 1 = ?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"question": \n', r":2: not JSON"),
        (GOOD + b"\n" + b"[1, 2]\n", r":3: a row must be an object"),
        (GOOD + b'{"question": "q"}\n', r":2: needs text in `answer`; it has question"),
        (GOOD + b'{"answer": "q"}\n', r":2: needs text in `question`"),
        (GOOD + b'{"question": "  ", "answer": "2"}\n', r":2: needs text in `question`"),
        (GOOD + b'{"question": "q", "answer": true}\n', r":2: needs text in `answer`"),
        (GOOD + b'{"question": "q", "answer": "2", "reasoning": [1]}\n', r":2: needs text in `reasoning`"),
        (b"\n \n", r": holds no rows"),
        (b"", r": holds no rows"),
        (b"\x80\x81\xff", r": not text in UTF-8"),
        (b'{"messages": "hi"}', r":1: `messages` must end"),
        (b'{"messages": [{"role": "user", "content": "q"}]}', r":1: `messages` must end"),
        (
            b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}',
            r":1: needs text in `content`",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "q"}, {"role": "assistant", "content": "a"}]}',
            r":1: `messages` must end",
        ),
    ],
)
def test_a_mistake_names_the_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + message) as e:
        read_traces([path])
    assert "\n" not in str(e.value)


def test_questions_take_numbers_a_limit_and_name_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "1", "answer": 2}, {"question": "2", "answer": 0.5})
    assert read_questions(path) == [Question("1", "2"), Question("2", "0.5")]
    assert read_questions(path, limit=1) == [Question("1", "2")]
    write(path, {"question": "1", "answer": "2"}, {"question": "2", "reasoning": "r"})
    with pytest.raises(UserError, match=r"q\.jsonl:2: needs text in `answer`"):
        read_questions(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path)


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path: Path) -> None:
    # JSON leaves these as they are; str.splitlines would cut a row at each
    reasoning = "one\u2028two\u2029three\u0085four"
    row = {"question": "q", "reasoning": reasoning, "answer": "2"}
    (trace,) = read_traces([write(tmp_path / "a.jsonl", row)])
    assert trace.completion == f"<think>\n{reasoning}\n</think>\n\n2"


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.replace(b"\n", b"\r\n") * 2)
    assert [t.question for t in read_traces([path])] == ["1 + 1 = ?"] * 2


def test_a_tokenizer_that_cannot_chat_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path / "plain")


# --- the demo that the package carries -----------------------------------------------------------

TEACHERS = ("steps", "gains_first", "story", "hasty")


def demo(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in demo_path(name).read_text(encoding="utf-8").splitlines()]


def true_answer(question: str) -> int:
    """The first number, and then what comes and goes, read off the verbs."""
    start, *events = (s for s in re.split(r"(?<=[.?])\s+", question) if re.search(r"\d", s))
    count = int(re.findall(r"\d+", start)[0])
    for event in events:
        number = int(re.findall(r"\d+", event)[0])
        away = re.search(r"gives \d+ to|sells|loses|throws away|takes|eats", event)
        comes = re.search(r"gives (her|him) \d+|buys|finds|gets|picks up|wins", event)
        assert bool(away) != bool(comes), event
        count += -number if away else number
    return count


def test_demo_exam_questions_are_in_no_teachers_traces() -> None:
    taught = {row["question"] for t in TEACHERS for row in demo(f"teachers/{t}.jsonl")}
    held, dev = ([row["question"] for row in demo(f)] for f in ("heldout.jsonl", "dev.jsonl"))
    assert len(held) == len(set(held)) > 100
    assert not taught & {*held, *dev}
    assert not set(held) & set(dev)


@pytest.mark.parametrize("name", ["heldout.jsonl", "dev.jsonl"])
def test_demo_exam_answers_are_right(name: str) -> None:
    for row in demo(name):
        assert int(row["answer"]) == true_answer(row["question"]), row


@pytest.mark.parametrize("teacher", [t for t in TEACHERS if t != "hasty"])
def test_the_demos_good_teachers_are_right_in_every_step(teacher: str) -> None:
    equations = Counter[str]()
    for row in demo(f"teachers/{teacher}.jsonl"):
        found = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["reasoning"])
        assert found, row
        for a, sign, b, c in found:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c), row
            equations[sign] += 1
        assert found[-1][3] == row["answer"], row
        assert int(row["answer"]) == true_answer(row["question"]), row
    assert min(equations["+"], equations["-"]) > 100


def test_a_third_of_the_demos_hasty_answers_are_wrong() -> None:
    rows = demo("teachers/hasty.jsonl")
    wrong = sum(int(r["answer"]) != true_answer(r["question"]) for r in rows)
    assert wrong / len(rows) == pytest.approx(1 / 3, abs=0.08)


def test_the_demos_teachers_solve_the_same_problems() -> None:
    first, *rest = ({row["question"] for row in demo(f"teachers/{t}.jsonl")} for t in TEACHERS)
    assert all(other == first for other in rest)
