"""Where a prompt's tokens end and an answer's begin, in vocabularies that join words with what stands before them."""

import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from wild import CHATML, tokenizer

from mot_lora.data.chat import prompt_text
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import token_ids
from mot_lora.data.traces import Trace

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
    "' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + '[/INST]' if m['role'] == 'user' else "
    "' ' + m['content'] + eos_token }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' + m['content'] if m['role'] == 'user' else ' ASSISTANT: ' + m['content'] + "
    "eos_token }}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SPACED = VICUNA.replace(" ASSISTANT:{% endif", " ASSISTANT: {% endif")  # the prompt ends within a word's first token
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {
    "zephyr": ZEPHYR,
    "llama-2": LLAMA2,
    "mistral-3": MISTRAL3,
    "vicuna": VICUNA,
    "spaced": SPACED,
    "gemma": GEMMA,
    "chatml": CHATML,
}
WORDS = ("that", "yes", "5", "is", "so")


def sentencepiece(template: str, kind: str) -> PreTrainedTokenizerBase:
    """A vocabulary of letters and some words, whose spaces are a letter before a word, as Llama's and Gemma's are."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]<>|/:_.,?+=-"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    grown = list(dict.fromkeys(w[:n] for word in WORDS for w in (f"▁{word}", word) for n in range(2, len(w) + 1)))
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, *grown])}
    merges = [(w[:-1], w[-1]) for w in sorted(grown, key=len)]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    if kind == "prepend":  # Llama 2 and Mistral: a space before a text and after each special token
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":  # the same, made since: before a text alone
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:  # Gemma: none
        inner.normalizer = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)] if kind != "none" else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    marks = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
    inner.add_special_tokens([AddedToken(m, normalized=False) for m in marks])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


def asked(question: str, completion: str) -> Trace:
    return Trace(({"role": "user", "content": question},), completion)


@pytest.fixture(params=["prepend", "first", "none", "bytes"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def made(template: str, kind: str) -> PreTrainedTokenizerBase:
    if kind == "bytes":
        return tokenizer(
            None, template=template, eos="</s>", bos="<s>", extra=["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
        )
    return sentencepiece(template, kind)


@pytest.mark.parametrize("answer", ["that", "5", "<think>\nis so\n</think>\n\nyes", "  yes", "\nyes"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "spaced"])
def test_an_example_is_the_rendered_conversations_tokens(name: str, kind: str, answer: str) -> None:
    tok = made(TEMPLATES[name], kind)
    messages = [{"role": "user", "content": "is that so?"}, {"role": "assistant", "content": answer}]
    whole = token_ids(tok, tok.apply_chat_template(messages, tokenize=False))
    example = encode(tok, asked("is that so?", answer))
    assert list(example.input_ids) == whole[: len(example)]
    assert tok.decode(whole[len(example) :]).strip() == ""
    assert list(example.input_ids[: example.prompt_length]) == token_ids(tok, prompt_text(tok, messages[:1]))


def test_no_space_is_put_between_the_header_and_the_answer() -> None:
    tok = sentencepiece(ZEPHYR, "prepend")
    example = encode(tok, asked("is that so?", "yes"))
    assert tok.decode(list(example.input_ids)).endswith("<|assistant|>\nyes</s>")
    assert tok.convert_ids_to_tokens(list(example.input_ids[example.prompt_length :])) == ["yes", "</s>"]


def test_a_token_across_the_seam_leaves_the_prompt_as_it_is_asked(kind: str) -> None:
    tok = made(SPACED, kind)
    prompt = prompt_text(tok, ({"role": "user", "content": "is that so?"},))
    assert prompt.endswith("ASSISTANT: ")
    example = encode(tok, asked("is that so?", "yes"))
    assert list(example.input_ids[: example.prompt_length]) == token_ids(tok, prompt)
    assert tok.decode(list(example.input_ids)) == f"{prompt}yes</s>"


def test_newlines_that_would_join_across_the_seam_do_not() -> None:
    inner = tokenizer(None, template=CHATML)
    vocabulary = inner.get_vocab()
    merged = {k: v for k, v in vocabulary.items() if not k.startswith("<|")}
    merged["ĊĊ"] = len(merged)
    model = Tokenizer(models.BPE(vocab=merged, merges=[("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    tok.chat_template = CHATML
    example = encode(tok, asked("q", "\n\n\n5"))
    prompt = prompt_text(tok, ({"role": "user", "content": "q"},))
    assert list(example.input_ids[: example.prompt_length]) == token_ids(tok, prompt)
    assert tok.decode(list(example.input_ids)) == f"{prompt}\n\n\n5<|im_end|>"


def test_a_long_trace_is_read_once_or_twice_not_letter_by_letter() -> None:
    tok = sentencepiece(ZEPHYR, "first")
    chain = "is that so? 5 yes. " * 5_000
    begun = time.perf_counter()
    n = len(token_ids(tok, chain))
    once = time.perf_counter() - begun
    begun = time.perf_counter()
    example = encode(tok, asked("q", f"<think>\n{chain}\n</think>\n\n5"))
    assert len(example) > n
    assert time.perf_counter() - begun < 6 * once + 0.2
