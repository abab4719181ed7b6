"""The chunked loss against a plain cross entropy over all logits, in value and in gradient."""

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from mot_lora.data.traces import IGNORE
from mot_lora.training.loss import batch_loss, chunked_cross_entropy, trained_tokens

VOCABULARY, WIDTH = 37, 8


class CountingHead(torch.nn.Linear):
    """A head that notes for how many tokens it was asked at once."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__(WIDTH, VOCABULARY, bias=bias)
        self.sizes: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.sizes.append(input.shape[0])
        return super().forward(input)


def random_tokens(n: int, seed: int = 0) -> tuple[CountingHead, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden = torch.randn(n, WIDTH, requires_grad=True)
    return CountingHead(), hidden, torch.randint(VOCABULARY, (n,))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32))
def test_chunks_add_up_to_the_whole(n: int, chunk: int, seed: int) -> None:
    head, hidden, targets = random_tokens(n, seed)
    expected = F.cross_entropy(F.linear(hidden, head.weight), targets, reduction="sum")
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])
    loss = chunked_cross_entropy(hidden, head, targets, chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head.weight]), expected_grads)


@pytest.mark.parametrize(("n", "chunk"), [(10, 3), (9, 3), (7, 7), (2, 5), (5, 1)])
def test_logits_of_a_chunk_are_the_most_that_is_made_at_once(n: int, chunk: int) -> None:
    head, hidden, targets = random_tokens(n)
    loss = chunked_cross_entropy(hidden, head, targets, chunk)
    assert max(head.sizes) <= chunk
    assert sum(head.sizes) == n
    loss.backward()
    assert sum(head.sizes) == n  # never again for the gradient


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    head, hidden, targets = random_tokens(64)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        F.cross_entropy(head(hidden), targets, reduction="sum")
    assert max(kept) >= 64 * VOCABULARY
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        chunked_cross_entropy(hidden, head, targets, 16)
    assert max(kept, default=0) < 16 * VOCABULARY


def test_the_gradient_is_let_go_of_before_the_layers_go_backward() -> None:
    head, given, targets = random_tokens(64)
    loss = chunked_cross_entropy(given.sin(), head, targets, 16)
    node: Any = loss.grad_fn
    gradient = weakref.ref(node.grads[0])
    assert gradient() is not None
    seen: list[object] = []
    given.register_hook(lambda _: seen.append(gradient()))
    loss.backward()
    assert seen == [None]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 40), st.integers(1, 50), st.booleans(), st.integers(0, 2**32))
def test_a_frozen_heads_gradient_is_exact_and_takes_no_graph(n: int, chunk: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, targets = torch.randn(n, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (n,))
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)
    before = head.weight.clone(), hidden.detach().clone()
    exact = hidden.detach().double().requires_grad_()
    z = F.linear(exact, head.weight.double(), head.bias.double() if bias else None)
    want = F.cross_entropy(z, targets, reduction="sum")
    loss = chunked_cross_entropy(hidden, head, targets, chunk)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    (3 * loss).backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), torch.autograd.grad(3 * want, exact)[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, head, targets, chunk), loss.detach())
    assert torch.equal(head.weight, before[0])
    assert torch.equal(hidden, before[1])


def test_sure_and_hopeless_tokens_have_their_gradient() -> None:
    # softmax - onehot is taken before it is rounded: near 1 it would be lost in 16 bits
    head = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    hidden = torch.tensor([[4.0, 0.0], [60.0, 0.0], [-60.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = chunked_cross_entropy(hidden, head, torch.zeros(3, dtype=torch.int64), 2)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-8)) + 120, rel=1e-6)
    loss.backward()
    assert hidden.grad is not None
    want = [-2 / (1 + math.exp(8)), 0.0, -2.0]
    torch.testing.assert_close(hidden.grad[:, 0].tolist(), want, rtol=1e-2, atol=1e-12)


def test_what_the_head_has_and_does_not_use_gets_no_gradient() -> None:
    head, hidden, targets = random_tokens(5)
    head.idle = torch.nn.Parameter(torch.ones(3))
    chunked_cross_entropy(hidden, head, targets, 2).backward()
    assert head.weight.grad is not None
    assert head.idle.grad is None or not head.idle.grad.any()


def test_the_softmax_is_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(16, WIDTH).bfloat16() * 4, torch.nn.Linear(WIDTH, VOCABULARY).bfloat16()
    targets = torch.randint(VOCABULARY, (16,))
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    loss = chunked_cross_entropy(hidden, head, targets, 5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    # a softmax in bf16 would differ by more than the comparison allows
    assert (F.cross_entropy(head(hidden), targets, reduction="sum").float() - expected).abs() > 1e-3


def test_no_tokens_lose_nothing() -> None:
    head, hidden, targets = random_tokens(0)
    assert chunked_cross_entropy(hidden, head, targets, 4).item() == 0
    assert head.sizes == []


def test_a_hidden_state_predicts_the_next_token() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[9, 1, IGNORE, 3], [IGNORE, IGNORE, 2, IGNORE]])
    states, targets = trained_tokens(hidden, labels)
    # the label at position 0 has nothing before it that could predict it
    assert targets.tolist() == [1, 3, 2]
    assert states.flatten().tolist() == [0, 2, 5]


# --- real models --------------------------------------------------------------------------------------


def load(student: Path) -> PeftModel:
    """The student in fp32 with an adapter whose A and B both get gradients."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def padded_batch(vocabulary: int, lengths: tuple[int, ...] = (11, 7, 4), prompts: tuple[int, ...] = (4, 2, 1)) -> Any:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    tokens = torch.randint(4, vocabulary, (len(lengths), longest), generator=generator)
    position = torch.arange(longest)
    mask = position < torch.tensor(lengths)[:, None]
    trained = mask & (position >= torch.tensor(prompts)[:, None])
    return {
        "input_ids": tokens.where(mask, 0),
        "attention_mask": mask.long(),
        "labels": tokens.where(trained, IGNORE),
    }


def plain_loss(model: torch.nn.Module, batch: Any) -> Tensor:
    """All logits at once, each row by itself and without padding."""
    losses: list[Tensor] = []
    for i in range(len(batch["input_ids"])):
        n = int(batch["attention_mask"][i].sum())
        logits = model(input_ids=batch["input_ids"][i : i + 1, :n]).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], batch["labels"][i, 1:n], ignore_index=IGNORE, reduction="sum"))
    return torch.stack(losses).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_a_steps_loss_is_that_of_a_masked_forward_of_all_its_traces(student: Path, chunk: int) -> None:
    # what is padded is not masked here, and a step is cut into batches with other padding
    adapted = load(student).train()
    model: Any = adapted.get_base_model()
    batch = padded_batch(model.config.vocab_size, (23, 9, 17, 4, 11), (3, 1, 9, 2, 4))
    expected = model(**batch).loss
    expected.backward()
    expected_grads = gradients(adapted)
    n = int((batch["labels"][:, 1:] != IGNORE).sum())
    total = 0.0
    for rows, width in ((slice(0, 3, 2), 23), (slice(1, 5, 3), 11), (slice(3, 4), 4)):
        part = {k: t[rows, :width] for k, t in batch.items() if k != "attention_mask"}
        loss = batch_loss(model, part, chunk)[0] / n
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    grads = gradients(adapted)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).abs().max() / expected_grads[name].abs().max()
        assert error < 2e-5, name


def test_attention_gets_no_mask_and_stays_causal(student: Path) -> None:
    # with a mask it could take none of its fast kernels
    model: Any = load(student).get_base_model()
    seen: list[dict[str, Any]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                seen.append(kwargs)
            return func(*args, **(kwargs or {}))

    with Watch():
        batch_loss(model, padded_batch(model.config.vocab_size), 4)
    assert [(k["attn_mask"], k["is_causal"]) for k in seen] == [(None, True)] * 2


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("in_training", [True, False])
def test_a_models_loss_is_the_plain_cross_entropy(student: Path, chunk: int, in_training: bool) -> None:
    adapted = load(student).train(in_training)
    model: Any = adapted.get_base_model()
    batch = padded_batch(model.config.vocab_size)
    expected = plain_loss(model, batch)
    expected.backward()
    expected_grads = gradients(adapted)
    loss, n = batch_loss(model, batch, chunk)
    loss.backward()
    grads = gradients(adapted)
    assert n == 7 + 5 + 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    assert len(grads) == 2 * 7 * 2  # A and B of seven modules in two layers, and nothing of the base
    assert all(g.abs().max() > 1e-4 for g in expected_grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-5)


def test_an_adapter_on_the_head_gets_its_gradient_in_bf16_too(llama: Path) -> None:
    """All of autocast's copies of it are of one step, whatever the number of chunks."""
    grads: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
        assert not base.config.tie_word_embeddings
        adapted = get_peft_model(
            base, LoraConfig(r=4, target_modules=["lm_head", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        batch = padded_batch(base.config.vocab_size)
        for _ in range(2):  # once more: nothing is left of the step before
            adapted.zero_grad()
            batch_loss(adapted.get_base_model(), batch, 4)[0].backward()
        grads.append(gradients(adapted))
        if dtype == torch.float32:
            plain_loss(adapted, batch).backward()
            for name, grad in gradients(adapted).items():
                torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-5)
    exact, rounded = grads
    assert any("lm_head" in name for name in exact)
    for name, grad in exact.items():
        assert F.cosine_similarity(grad.flatten(), rounded[name].flatten(), dim=0) > 0.99, name


def test_gradients_reach_every_weight_of_a_model_without_adapters(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    batch = padded_batch(model.config.vocab_size)
    plain_loss(model, batch).backward()
    expected = gradients(model)
    batch_loss(model, batch, 4)[0].backward()
    grads = gradients(model)
    assert grads.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_nothing(student: Path) -> None:
    adapted = load(student).train()
    model: Any = adapted.get_base_model()
    batch = padded_batch(model.config.vocab_size)
    plain, _ = batch_loss(model, batch, 4)
    plain.backward()
    expected = gradients(adapted)
    model.enable_input_require_grads()
    checkpoint_activations(model)
    loss, _ = batch_loss(model, batch, 4)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(adapted), expected)


def test_what_is_not_trained_contributes_nothing(student: Path) -> None:
    model: Any = load(student).get_base_model()
    batch = padded_batch(model.config.vocab_size)
    with torch.no_grad():
        loss, n = batch_loss(model, batch, 4)
        # other padding, and a last token that predicts nothing and is not trained
        changed = {k: t.clone() for k, t in batch.items()}
        changed["input_ids"][batch["attention_mask"] == 0] = 5
        torch.testing.assert_close(batch_loss(model, changed, 4)[0], loss)
        # each trained token counts by itself: taking one away takes its loss away
        one_less = {**batch, "labels": batch["labels"].clone()}
        one_less["labels"][0, 6] = IGNORE
        less, m = batch_loss(model, one_less, 4)
        only = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
        only["labels"][0, 6] = batch["labels"][0, 6]
        single, k = batch_loss(model, only, 4)
        assert (m, k) == (n - 1, 1)
        assert single > 0
        torch.testing.assert_close(less + single, loss)


def test_a_batch_without_trained_tokens_costs_nothing(qwen3: Path) -> None:
    model: Any = load(qwen3).get_base_model()
    batch = padded_batch(model.config.vocab_size)
    loss, n = batch_loss(model, {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}, 4)
    assert (loss.item(), n) == (0, 0)


def test_the_head_of_a_model_sees_trained_tokens_only(student: Path) -> None:
    model: Any = load(student).get_base_model()
    batch = padded_batch(model.config.vocab_size)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: sizes.append(logits.shape[0]))
    with torch.no_grad():
        batch_loss(model, batch, 4)
    assert sizes == [4, 4, 4, 3]
