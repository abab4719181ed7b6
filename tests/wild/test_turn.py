"""How the families' chat templates head and end a turn, and what is trained of it.

The templates are written short here and behave as the public ones do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from transformers import PreTrainedTokenizerBase
from wild import tokenizer

from mot_lora.data.chat import Template, prompt_text, stop_ids
from mot_lora.data.encoding import answer_text, encode
from mot_lora.data.scoring import final_answer
from mot_lora.data.tokenizer import token_ids
from mot_lora.data.traces import IGNORE, Trace
from mot_lora.errors import UserError


@dataclass(frozen=True)
class Family:
    """A template, its tokenizer's eos and added tokens, and a whole turn: what is trained stands after the arrow."""

    template: str
    turn: str
    eos: str
    marks: Sequence[str] = ()
    listed: Sequence[str] = ()  # in generation_config.json


def each(user: str, assistant: str, header: str, *, before: str = "", system: str = "") -> str:
    """A template that writes each message so; S, U and A are the words."""

    def text(pattern: str) -> str:
        return (
            "{{ "
            + " + ".join(repr(p) if p not in ("S", "U", "A") else "m['content']" for p in pattern.split("@"))
            + " }}"
        )

    system = text(system) if system else "{{ raise_exception('System role not supported') }}"
    return (
        before
        + "{% for m in messages %}{% if m['role'] == 'user' %}"
        + text(user)
        + "{% elif m['role'] == 'assistant' "
        "%}" + text(assistant) + "{% else %}" + system + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + header + "{% endif %}"
    )


ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n"
    "{{ m['reasoning_content'] if m['reasoning_content'] is string else '' }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else "
    "m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}{{ '<|return|>' if m['role'] == 'assistant' and loop.last else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM_MARKS = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")
R1 = each(
    "<｜User｜>@U", "<｜Assistant｜>@A@<｜eos｜>", "<｜Assistant｜><think>\n", before="{{ bos_token }}", system="S"
)
COMMAND_R7B = each(
    "<|START|><|USER|>@U@<|END|>",
    "<|START|><|CHATBOT|><|START_RESPONSE|>@A@<|END_RESPONSE|><|END|>",
    "<|START|><|CHATBOT|>",
)

CHATML_TURN = "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n→{a}<|im_end|>"

FAMILIES = {
    "chatml": Family(CHATML + OPEN, CHATML_TURN, "<|im_end|>"),
    "chatml-base": Family(  # Qwen's base models and ChatML on others: eos is another token
        CHATML + OPEN, CHATML_TURN, "<|endoftext|>"
    ),
    "qwen2.5": Family(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + CHATML
        + OPEN,
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
        "→{a}<|im_end|>",
        "<|im_end|>",
        listed=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Family(QWEN3 + OPEN, CHATML_TURN, "<|im_end|>"),
    "qwen3-thinking": Family(
        QWEN3 + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n→\n</think>\n\n{a}<|im_end|>",
        "<|im_end|>",
    ),
    "thinks-if-asked": Family(  # Qwen3.5's small ones, EXAONE 4: without `enable_thinking` the chain is closed
        QWEN3 + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
        "enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n→\n</think>\n\n{a}<|im_end|>",
        "<|im_end|>",
    ),
    "never-thinks": Family(  # the prompt has an empty chain, whatever is asked
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        CHATML_TURN,
        "<|im_end|>",
    ),
    "always-open": Family(  # writes the header whether asked or not
        CHATML + "<|im_start|>assistant\n",
        CHATML_TURN,
        "<|im_end|>",
    ),
    "no-header": Family(CHATML, CHATML_TURN, "<|im_end|>"),
    "no-header-spaced": Family(
        "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}",
        "USER: {q}</s>\nASSISTANT:→ {a}</s>",
        "</s>",
    ),
    "llama-2": Family(
        ALTERNATE + each("{{bos}}[INST] @U@ [/INST]", " @A@ </s>", "").replace("{{bos}}", "<s>"),
        "<s>[INST] {q} [/INST]→ {a} </s>",
        "</s>",
        ("<s>",),
    ),
    "llama-3": Family(
        LLAMA3,
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n→{a}<|eot_id|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>"),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "llama-3-of-old": Family(  # its tokenizer's eos was <|end_of_text|> at first
        LLAMA3,
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n→{a}<|eot_id|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral-1": Family(
        "{{ bos_token }}" + each(" [INST] @U@ [/INST]", " @A@</s>", ""), "<|bos|> [INST] {q} [/INST]→ {a}</s>", "</s>"
    ),
    "mistral-3": Family(
        "{{ bos_token }}" + each("[INST]@U@[/INST]", "@A@</s>", "", system="[SYSTEM_PROMPT]@S@[/SYSTEM_PROMPT]"),
        "<|bos|>[INST]{q}[/INST]→{a}</s>",
        "</s>",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "gemma": Family(
        GEMMA,
        "<|bos|><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n→{a}<end_of_turn>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
    ),
    "gemma-unlisted": Family(  # as a fine-tune often saves it
        GEMMA,
        "<|bos|><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n→{a}<end_of_turn>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        ("<eos>",),
    ),
    "phi-3": Family(
        PHI3,
        "<|user|>\n{q}<|end|>\n<|assistant|>\n→{a}<|end|>",
        "<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "phi-3-unlisted": Family(
        PHI3,
        "<|user|>\n{q}<|end|>\n<|assistant|>\n→{a}<|end|>",
        "<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "phi-4": Family(
        each(
            "<|im_start|>user<|im_sep|>@U@<|im_end|>",
            "<|im_start|>assistant<|im_sep|>@A@<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|im_start|>user<|im_sep|>{q}<|im_end|><|im_start|>assistant<|im_sep|>→{a}<|im_end|>",
        "<|endoftext|>",
        ("<|im_sep|>",),
        ("<|endoftext|>", "<|im_end|>"),
    ),
    "glm-4": Family(  # nothing ends a turn but the next one's first token
        GLM,
        "[gMASK]<sop><|user|>\n{q}<|assistant|>\n→{a}<|user|>",
        "<|endoftext|>",
        GLM_MARKS,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "glm-4-unlisted": Family(
        GLM, "[gMASK]<sop><|user|>\n{q}<|assistant|>\n→{a}<|endoftext|>", "<|endoftext|>", GLM_MARKS
    ),
    "glm-4.5": Family(
        GLM.replace(
            "<|{{ m['role'] }}|>\n", "<|{{ m['role'] }}|>\n{{ '<think></think>\n' if m['role'] == 'assistant' }}"
        ).replace("<|assistant|>\n{% endif", "<|assistant|>{% endif"),
        "[gMASK]<sop><|user|>\n{q}<|assistant|>→\n{a}<|user|>",
        "<|endoftext|>",
        GLM_MARKS,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "deepseek-r1": Family(
        R1,
        "<|bos|><｜User｜>{q}<｜Assistant｜><think>\n→\n</think>\n\n{a}<｜eos｜>",
        "<｜eos｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "deepseek-v3.1": Family(  # <think> when asked for, else the chain is closed
        R1.replace("<think>\n{% endif", "{{ '<think>' if thinking is defined and thinking else '</think>' }}{% endif"),
        "<|bos|><｜User｜>{q}<｜Assistant｜><think>→\n</think>\n\n{a}<｜eos｜>",
        "<｜eos｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "command-r7b": Family(
        COMMAND_R7B,
        "<|START|><|USER|>{q}<|END|><|START|><|CHATBOT|>→<|START_RESPONSE|>{a}<|END_RESPONSE|><|END|>",
        "<|END|>",
        ("<|START|>", "<|USER|>", "<|CHATBOT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "harmony": Family(
        HARMONY,
        "<|start|>user<|message|>{q}<|end|><|start|>assistant→<|channel|>final<|message|>{a}<|return|>",
        "<|return|>",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "granite": Family(
        each(
            "<|start_of_role|>user<|end_of_role|>@U@<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>@A@<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|start_of_role|>user<|end_of_role|>{q}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        "→{a}<|end_of_text|>",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>\n{q}</s>\n<|assistant|>\n→{a}</s>",
        "</s>",
    ),
    "olmo": Family(
        "{{ bos_token }}" + each("<|user|>\n@U@\n", "<|assistant|>\n@A@<|endoftext|>\n", "<|assistant|>\n"),
        "<|bos|><|user|>\n{q}\n<|assistant|>\n→{a}<|endoftext|>",
        "<|endoftext|>",
    ),
    "vicuna": Family(each("USER: @U", " ASSISTANT: @A@</s>", " ASSISTANT:"), "USER: {q} ASSISTANT:→ {a}</s>", "</s>"),
    "alpaca": Family(
        each("### Instruction:\n@U@\n\n", "### Response:\n@A@\n\n", "### Response:\n"),
        "### Instruction:\n{q}\n\n### Response:\n→{a}</s>",
        "</s>",
    ),
    "falcon": Family(
        each("User: @U@\n\n", "Assistant: @A@\n\n", "Assistant:"), "User: {q}\n\nAssistant:→ {a}</s>", "</s>"
    ),
    "end-in-letters": Family(  # ChatML on a vocabulary that has no such tokens: it ends with eos, after the letters
        CHATML.replace("im_", "m_") + OPEN.replace("im_", "m_"),
        "<|m_start|>user\n{q}<|m_end|>\n<|m_start|>assistant\n→{a}<|m_end|></s>",
        "</s>",
    ),
    "not-the-last": Family(  # ends each turn but the last
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}</s>[assistant]{% endif %}",
        "[user]{q}</s>[assistant]→{a}</s>",
        "</s>",
    ),
    "parts": Family(  # SmolVLM, Idefics 3: what is said must be a list of parts
        "{% for m in messages %}{{ m['role'] | capitalize }}: {% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "User: {q}<end_of_utterance>\nAssistant:→ {a}<end_of_utterance>",
        "<|endoftext|>",
        ("<end_of_utterance>",),
    ),
    "refuses-answers": Family(  # takes questions alone: what ends a turn is not said, so the tokenizer's eos does
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}"
        "Q: {{ m['content'] }}\nA: {% endfor %}",
        "Q: {q}\nA: →{a}</s>",
        "</s>",
    ),
    "rewrites-answers": Family(
        "{% for m in messages %}{{ 'Q: ' + m['content'] if m['role'] == 'user' else 'A: (an answer)' }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}",
        "Q: {q}\nA: →{a}</s>",
        "</s>",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def made(family: Family) -> PreTrainedTokenizerBase:
    marks = [m for m in (*family.marks, family.eos, "<|bos|>") if m not in ("<|im_end|>", "<|endoftext|>", "<|bos|>")]
    tok = tokenizer(None, template=family.template, eos=family.eos, bos="<|bos|>", extra=list(dict.fromkeys(marks)))
    tok.listed_ends = tuple(tok.convert_tokens_to_ids(list(family.listed)))
    return tok


def asked(question: str, completion: str) -> Trace:
    return Trace(({"role": "user", "content": question},), completion)


def read(tok: PreTrainedTokenizerBase, trace: Trace) -> tuple[str, str]:
    """What the student reads, and what of it is trained."""
    example = encode(tok, trace)
    n = example.prompt_length
    assert all(label == IGNORE for label in example.labels[:n])
    assert example.labels[n:] == example.input_ids[n:]
    return tok.decode(list(example.input_ids[:n])), tok.decode(list(example.input_ids[n:]))


def test_a_turn_is_headed_and_ended_as_the_template_does(family: Family) -> None:
    tok = made(family)
    head, trained = family.turn.format(q="what", a="that").split("→")
    assert prompt_text(tok, ({"role": "user", "content": "what"},)) == head
    assert read(tok, asked("what", "that")) == (head, trained)


def test_a_chain_is_trained_whole_before_the_end(family: Family) -> None:
    tok = made(family)
    example = encode(tok, asked("1 + 1?", "<think>\nso\n</think>\n\n2"))
    text = tok.decode(list(example.input_ids))
    assert text.count("<think>") == text.count("</think>") == 1
    assert text.endswith(f"so\n</think>\n\n2{Template.of(tok).turn.end}")


def test_what_ends_a_turn_stops_an_answer_and_is_taken_off(family: Family) -> None:
    tok = made(family)
    for stop in stop_ids(tok):
        assert answer_text(tok, "", [*token_ids(tok, "yes"), stop]) == "yes"
    example = encode(tok, asked("q", "yes"))
    assert example.input_ids[-1] in stop_ids(tok)
    answer = answer_text(tok, "", example.input_ids[example.prompt_length :])
    assert answer.removeprefix("\n</think>\n\n").strip() == "yes"


def test_an_end_that_an_answer_brings_along_is_trained_once(family: Family) -> None:
    tok = made(family)
    once = encode(tok, asked("q", "5"))
    end = Template.of(tok).turn.end
    for brought in (end, f"{end}\n", end * 2, f"{end}\n{tok.eos_token}", f"{end}{tok.pad_token}{tok.pad_token}"):
        assert encode(tok, asked("q", f"5{brought}")) == once


def test_a_prompt_that_is_rendered_already_is_not_rendered_twice(family: Family) -> None:
    tok = made(family)
    plain = encode(tok, asked("What is 2 + 3?", "5"))
    rendered = prompt_text(tok, ({"role": "user", "content": "What is 2 + 3?"},))
    assert encode(tok, asked(rendered, "5")) == plain
    assert encode(tok, asked(rendered.removesuffix("\n"), "5")) == plain


# --- a chain of thought in other marks -------------------------------------------------------------------

SEED = (
    "{% for m in messages %}<seed:bos>{{ m['role'] }}\n{% if m['role'] == 'assistant' and m['reasoning_content'] %}"
    "<seed:think>{{ m['reasoning_content'] }}</seed:think>\n{% endif %}{{ m['content'] }}<seed:eos>{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}"
)
GEMMA4 = (
    "{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{% if m['reasoning'] %}"
    "<|channel>thought\n{{ m['reasoning'] }}\n<channel|>{% endif %}{{ m['content'] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
GPT_OSS = HARMONY.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['thinking'] and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m['thinking'] }}<|end|>{% endif %}",
)
OPENS = (  # Command A: the prompt begins the chain with a mark of its own
    "{% for m in messages %}<|turn|>{{ m['role'] }}:{% if m['role'] == 'assistant' %}<|START_THINKING|>"
    "{{ m['reasoning_content'] }}<|END_THINKING|><|START_RESPONSE|>{{ m['content'] }}<|END_RESPONSE|>{% else %}"
    "{{ m['content'] }}{% endif %}<|END|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant:<|START_THINKING|>"
    "{% endif %}"
)
CHAINS = {
    "seed": (SEED, "<seed:eos>", "<seed:think>so</seed:think>\n2<seed:eos>", "2<seed:eos>"),
    "gemma-4": (GEMMA4, "<turn|>", "<|channel>thought\nso\n<channel|>2<turn|>", "2<turn|>"),
    "gpt-oss": (
        GPT_OSS,
        "<|return|>",
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
        "<|channel|>final<|message|>2<|return|>",
    ),
    "opens": (
        OPENS,
        "<|END|>",
        "so<|END_THINKING|><|START_RESPONSE|>2<|END_RESPONSE|><|END|>",
        "<|END_THINKING|><|START_RESPONSE|>2<|END_RESPONSE|><|END|>",
    ),
}


@pytest.fixture(params=CHAINS)
def chained(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, str, str]:
    """A tokenizer, and what is trained of an answer with a chain and of one without."""
    template, eos, *trained = CHAINS[request.param]
    marks = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|turn|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]
    return tokenizer(None, template=template, eos=eos, extra=[*marks, eos]), *trained


def test_a_chain_is_written_as_the_template_does(chained: tuple[PreTrainedTokenizerBase, str, str]) -> None:
    tok, with_chain, without = chained
    assert read(tok, asked("1 + 1?", "<think>\nso\n</think>\n\n2"))[1] == with_chain
    assert read(tok, asked("1 + 1?", "2"))[1] == without


def test_a_chain_is_read_as_the_template_writes_it(chained: tuple[PreTrainedTokenizerBase, str, str]) -> None:
    tok, with_chain, without = chained
    prompt = prompt_text(tok, ({"role": "user", "content": "1 + 1?"},))
    assert answer_text(tok, prompt, token_ids(tok, with_chain)) == "<think>\nso\n</think>\n\n2"
    assert final_answer(answer_text(tok, prompt, token_ids(tok, without))) == "2"
    begun = with_chain.partition("so")[0] + "so, and so"
    assert final_answer(answer_text(tok, prompt, token_ids(tok, begun))) is None


def test_a_chain_within_which_the_answer_would_be_stopped_is_not_written() -> None:
    template = SEED.replace("</seed:think>", "<seed:eos>")
    tok = tokenizer(None, template=template, eos="<seed:eos>", extra=["<seed:eos>"])
    assert Template.of(tok).turn.chain is None
    assert read(tok, asked("1 + 1?", "<think>\nso\n</think>\n\n2"))[1] == "<think>\nso\n</think>\n\n2<seed:eos>"


# --- templates that cannot be asked ----------------------------------------------------------------------


def test_several_templates_without_a_default_are_one_line() -> None:
    tok = tokenizer(None, template=None)
    tok.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match=r"several chat templates \(tool_use, rag\), and none of them is called"):
        prompt_text(tok, ({"role": "user", "content": "q"},))


def test_a_template_for_tools_is_used_where_a_row_offers_some() -> None:
    tok = tokenizer(None, template=None)
    tools = "{% for t in tools %}<tool>{{ t['function']['name'] }}</tool>{% endfor %}"
    tok.chat_template = {"default": CHATML + OPEN, "tool_use": tools + CHATML + OPEN}
    question = ({"role": "user", "content": "q"},)
    offered = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert prompt_text(tok, question, [offered]) == f"<tool>add</tool>{prompt_text(tok, question)}"


def test_a_conversation_that_is_not_taken_names_its_roles() -> None:
    tok = made(FAMILIES["gemma"])
    with pytest.raises(UserError, match="does not accept a conversation of user, user"):
        prompt_text(tok, ({"role": "user", "content": "q"}, {"role": "user", "content": "q"}))
