import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASES, VOCABULARY, fresh
from transformers import MistralConfig, MistralForCausalLM, TopPLogitsWarper
from transformers.cache_utils import DynamicCache

from mot_lora.training import decoding as decode
from mot_lora.training.decoding import Decoding, decodes

PROMPTS = [[5, 9, 3], [7], [2, 2, 30, 31], [8, 1, 1, 9, 4, 12, 17], [20, 3], [33, 6, 6], [1, 2], [39, 38, 37, 36, 35]]
STOPS = frozenset({0, 4, 11, 13, 21, 29})
SEEDS = list(range(100, 100 + len(PROMPTS)))


def untold(_count: int) -> None: ...


def answers(model: Any, how: Decoding, at_once: int, prompts: Any = PROMPTS, **more: Any) -> list[list[int]]:
    found = dict(decode.decode(model, prompts, SEEDS[: len(prompts)], how, at_once, untold, more.pop("tokens", 10**6)))
    return [found[k] for k in range(len(prompts))]


def by_generate(model: Any, how: Decoding, at_once: int) -> list[list[int]]:
    with torch.no_grad():
        found = dict(decode.generate(model, PROMPTS, SEEDS, how, at_once, untold, 39))
    return [found[k] for k in range(len(PROMPTS))]


def one_by_one(model: Any, how: Decoding) -> list[list[int]]:
    """Each answer by hand: alone, without keys that are kept, all of the text again for each token."""
    out: list[list[int]] = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        draws, text = how.draws(seed), list(prompt)
        while len(text) < len(prompt) + how.max_new_tokens and not (text[len(prompt) :] and text[-1] in how.stops):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text])).logits[:, -1]
            text.append(int(how.choose(logits, draws[len(text) - len(prompt) :][:1])))
        out.append(text[len(prompt) :])
    return out


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_are_those_of_one_at_a_time(bases: dict[str, Path], name: str, temperature: float) -> None:
    model = fresh(bases[name])
    assert decodes(model)
    endless = one_by_one(model, Decoding(20, frozenset(), temperature, 0.9))
    how = Decoding(20, frozenset(endless[i][i + 3] for i in (0, 3, 6)), temperature, 0.9)
    want = one_by_one(model, how)
    assert len({len(w) for w in want}) > 1  # they end at different times
    with torch.no_grad():
        for at_once, tokens in ((1, 10**6), (3, 10**6), (3, 1), (20, 10)):
            assert answers(model, how, at_once, tokens=tokens) == want
    for at_once in (1, 3, 20):
        assert by_generate(model, how, at_once) == want


def test_where_an_answer_ends_the_next_begins(bases: dict[str, Path]) -> None:
    model, how = fresh(bases["tied"]), Decoding(20, STOPS)
    want = one_by_one(model, how)
    rows: list[int] = []
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _x, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        ended = [k for k, _ in decode.decode(model, PROMPTS, SEEDS, how, 3, counts.append, 10**6)]
    hook.remove()
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert ended != sorted(ended)
    assert rows == counts
    assert sum(rows) == sum(map(len, want))
    # all rows are at work until nothing waits any more; then they become fewer, and none is computed in vain
    assert rows == sorted(rows, reverse=True)
    assert set(rows) <= {1, 2, 3}
    assert len(rows) < sum(max(len(w) for w in want[i : i + 3]) for i in range(0, len(want), 3))


def test_memory_is_taken_once_and_given_back(bases: dict[str, Path]) -> None:
    model, how = fresh(bases["untied"]), Decoding(20, STOPS)
    with torch.no_grad():
        writing = decode.decode(model, PROMPTS, SEEDS, how, 3, untold, 10**6)
        next(writing)
        layers = [x for x in gc.get_objects() if type(x) is decode.Layer]
        assert len(layers) == model.config.num_hidden_layers
        for layer in layers:
            assert layer.keys.shape == layer.values.shape == (3, 1, 7 + 20, 8)
        kept = [layer.keys.data_ptr() for layer in layers]
        next(writing)
        assert [layer.keys.data_ptr() for layer in layers] == kept
        del layers, layer
        writing.close()  # as an interruption does
    assert not [x for x in gc.get_objects() if type(x) is decode.Layer]


def test_no_prompts_have_no_answers(bases: dict[str, Path]) -> None:
    assert answers(fresh(bases["tied"]), Decoding(5, STOPS), 4, prompts=[]) == []


def test_what_attends_to_a_window_alone_is_left_to_generate() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    for window, plain in ((None, True), (4, False)):
        model = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=window)).eval()
        assert decodes(model) == plain
        assert by_generate(model, Decoding(20, STOPS), 3) == one_by_one(model, Decoding(20, STOPS))
    model.set_attn_implementation("eager")
    assert not decodes(model)  # it would add the mask


def test_draws_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50) * 2
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (1.0, 0.05)):
        how = Decoding(1, STOPS, temperature, top_p)
        scores = logits / temperature
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
        for row, p in zip(logits, scores.double().softmax(-1), strict=True):
            chosen = how.choose(row.expand(len(draws), -1), draws.tolist())
            assert (torch.bincount(chosen, minlength=50) / len(draws) - p).abs().max() < 1.1 / len(draws)
    # the largest draw there is takes a token that is possible
    edge = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert Decoding(1, STOPS, 1.0).choose(edge, [1 - 2**-53]).tolist() == [1]
    assert Decoding(1, STOPS, 1.0, 0.5).choose(edge, [1 - 2**-53]).tolist() in ([0], [1])


def test_draws_are_a_matter_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    how = Decoding(6, STOPS, 1.0)
    assert how.draws(1) == how.draws(1) != how.draws(2)
    assert how.draws(1) == Decoding(9, STOPS, 1.0).draws(1)[:6]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_is_read_as_the_model_reads_it(bases: dict[str, Path]) -> None:
    model = fresh(bases["qwen2"])
    with torch.no_grad():
        read = decode._read(model, PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            cache = DynamicCache(config=model.config)
            model(input_ids=torch.tensor([prompt]), past_key_values=cache)
            n = max(1, len(prompt) - 1)
            for mine, own in zip(read, cache.layers, strict=True):
                assert torch.allclose(mine.keys[i, :, :n], own.keys[0, :, :n], atol=1e-6)
                assert torch.allclose(mine.values[i, :, :n], own.values[0, :, :n], atol=1e-6)
