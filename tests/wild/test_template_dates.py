"""Templates that write today's date, as those of Llama 3.2, gpt-oss, Mistral Small, Granite and Apertus do."""

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils
from wild import CHATML, jsonl, recipe, rows, student, tokenizer

from mot_lora.data.chat import prompt_text
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace

Call = Callable[..., tuple[int, str, str]]

DATED = {
    "llama-3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = "
        "strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '1 Jan 1970' %}{%- endif %}{%- endif %}"
        "{{ 'Today Date: ' + date_string + '\n' }}",
        "Today Date: 26 Jul 2024\n",
    ),
    "gpt-oss": ('{{- "Current date: " + strftime_now("%Y-%m-%d") + "\n" }}', "Current date: 2024-07-26\n"),
    "granite": ("{{ \"Today's Date: \" + strftime_now('%B %d, %Y') + '.\n' }}", "Today's Date: July 26, 2024.\n"),
    "macro": (
        "{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() + ', ' + day() | lower + '\n' }}",
        "Friday, friday\n",
    ),
    "parts": (
        "{% set y = strftime_now('%Y') | int %}{% set m = strftime_now('%-m') | int %}{{ y + 1 }}/{{ m }}\n\n",
        "2025/7\n\n",
    ),
    "blank-lines": ("\n\n{{ strftime_now('%d.%m.%y %H:%M') }}\n\n", "\n\n26.07.24 00:00\n\n"),
}


@pytest.fixture(params=["2026-01-01", "2026-12-31"])
def today(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    day = datetime.datetime.fromisoformat(request.param)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return day.replace(tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return request.param


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_the_same_on_every_day(today: str, name: str) -> None:
    template, written = DATED[name]
    tok = tokenizer(None, template=template + CHATML)
    question = {"role": "user", "content": "What day is it?"}
    asked = "<|im_start|>user\nWhat day is it?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tok, (question,)) == written + asked
    example = encode(tok, Trace((question,), "Friday"))
    assert tok.decode(list(example.input_ids)) == f"{written}{asked}Friday<|im_end|>"
    plain = tok.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert (today[:4] in plain) or name not in ("llama-3.2", "gpt-oss", "granite")  # else nothing is shown here


def test_a_date_that_is_written_is_told(tmp_path: Path, call: Call) -> None:
    student(tmp_path, template=DATED["llama-3.2"][0] + CHATML)
    config = recipe(tmp_path, tmp_path, jsonl(tmp_path / "one.jsonl", rows()))
    _, out, _ = call("data", config)
    assert "its chat template writes the date: here it is always 26 July 2024" in " ".join(out.split())


def test_a_question_with_the_word_is_not_told_the_date(tmp_path: Path) -> None:
    student(tmp_path)
    asked = ({"role": "user", "content": "What does {{ strftime_now('%Y') }} say?"},)
    assert "{{ strftime_now('%Y') }}" in prompt_text(load_tokenizer(tmp_path), asked)
