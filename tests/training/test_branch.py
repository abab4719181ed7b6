import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from bitsandbytes.nn.modules import Linear4bit
from conftest import MakeAdapter
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from mot_lora import UserError
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.data.encoding import collate, encode
from mot_lora.data.rows import read_rows
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import IGNORE, Example, Trace, read_trace
from mot_lora.errors import DivergedError
from mot_lora.reader import demo_path
from mot_lora.records import TrainRecord
from mot_lora.training import adapter, branch, trainer
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.branch import train
from mot_lora.training.liger import uses_liger
from mot_lora.training.student import load_model, read_weight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(qwen3: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(qwen3)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Sixteen traces of very different lengths."""
    return [
        encode(tokenizer, Trace(({"role": "user", "content": f"{i} + 1 = ?"},), f"{i} + 1 = {i + 1}. " * (i % 5 + 1)))
        for i in range(16)
    ]


def new_model(path: Path, quantization: str = "nf4", **lora: Any) -> PeftModel:
    settings = LoraConfig(**{"r": 4, "alpha": 8, **lora})
    model = add_adapter(load_model(Checkpoint.open(path), quantization, CPU), settings)
    reset_adapter(model, 0)
    return model


def settings(**changes: Any) -> BranchConfig:
    given = {
        "steps": 4,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup": 0,
        "loss_chunk": 16,
    }
    if "epochs" in changes:
        given.pop("steps")
    return BranchConfig(**{**given, **changes})


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    assert x.keys() == y.keys()
    return all(torch.equal(x[n], y[n]) for n in x)


def plain_loss(model: PeftModel, rows: Sequence[Example], pad: int) -> float:
    """The mean loss over all trained tokens, from whole logits."""
    batch = collate(rows, pad)
    with torch.no_grad():
        mask = torch.tensor([[i < len(e) for i in range(batch["input_ids"].shape[1])] for e in rows])
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=mask.long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
    )
    return float(losses)


# --- the adapter ---------------------------------------------------------------------------------


def test_branches_of_a_round_start_from_one_a_whatever_the_random_state(student: Path) -> None:
    torch.manual_seed(1)
    model = new_model(student)
    reset_adapter(model, 5)
    first = factors(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    reset_adapter(model, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(factors(model), first)
    assert same(factors_after_reset(new_model(student, "none"), 5), first)
    reset_adapter(model, 6)
    for name, value in factors(model).items():
        assert value.dtype == torch.float32
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.8 * bound < value.abs().max() <= bound
            assert value.mean().abs() < bound / 4
            assert not torch.equal(value, first[name])
    a = [v for n, v in first.items() if "lora_A" in n and v.shape == (4, 64)]
    assert len({v.sum().item() for v in a}) == len(a)  # modules do not share one draw


def factors_after_reset(model: PeftModel, seed: int) -> dict[str, torch.Tensor]:
    reset_adapter(model, seed)
    return factors(model)


def test_only_the_adapter_trains_and_targets_can_be_chosen(qwen3: Path) -> None:
    model = new_model(qwen3, target_modules=("q_proj", "down_proj"), r=3, alpha=6, rslora=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(("q_proj" in n or "down_proj" in n) and "lora_" in n for n in trained)
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(3))


def test_targets_that_match_nothing_are_refused(qwen3: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules .*no_such_proj") as e:
        new_model(qwen3, target_modules=("no_such_proj",))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("targets", ["all-linear", ("gate",)])
def test_experts_are_no_linear_layers_and_the_advice_is_right(
    bases: dict[str, Path], targets: str | tuple[str, ...]
) -> None:
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp\.\w+ is not a linear layer but Qwen3Moe\w+; choose from \["
    ) as e:
        adapter.check_targets(bases["moe"], LoraConfig(target_modules=targets))
    advised = tuple(str(e.value).rpartition("[")[2].rstrip("]").split(","))
    assert advised == ("k_proj", "o_proj", "q_proj", "v_proj")
    adapter.check_targets(bases["moe"], LoraConfig(target_modules=advised))
    with pytest.raises(
        UserError, match=r"cannot be used \(Target module Qwen3MoeExperts.*; the student has k_proj, o_proj"
    ):
        adapter.check_targets(bases["moe"], LoraConfig(target_modules=("q_proj", "experts")))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_targets_that_no_fold_can_take_are_refused_before_training(qwen3: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        new_model(qwen3, target_modules=("q_proj", target))


# --- training ------------------------------------------------------------------------------------


def test_training_in_nf4_lowers_the_loss_and_leaves_the_base(
    student: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    model = new_model(student)
    layers = {n: m.get_base_layer() for n, m in model.get_base_model().named_modules() if hasattr(m, "get_base_layer")}
    codes = {n: layer.weight.data.clone() for n, layer in layers.items()}
    weights = {n: read_weight(layer) for n, layer in layers.items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n and p.is_floating_point()}
    pad = tokenizer.pad_token_id
    before = plain_loss(model, examples, pad)
    start = factors(model)
    record = train(model, tokenizer, examples, settings(steps=24, batch_size=4, gradient_accumulation=1), seed=0)
    after = plain_loss(model, examples, pad)
    assert before > 6
    assert after < before - 0.5
    assert after < record.loss < before  # the mean over the steps
    assert record.steps == 24
    assert record.tokens == 24 / 4 * sum(len(e) - e.prompt_length for e in examples)
    assert record.seconds > 0
    assert not model.training
    assert all(p.dtype == torch.float32 for p in factors(model).values())
    assert not any(torch.equal(v, start[n]) for n, v in factors(model).items())
    for n, layer in layers.items():
        assert torch.equal(layer.weight.data, codes[n])
        assert torch.equal(read_weight(layer), weights[n])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], v) for n, v in others.items())


def one_step(
    path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Example], **changes: Any
) -> tuple[dict[str, torch.Tensor], TrainRecord]:
    model = new_model(path, changes.pop("quantization", "nf4"))
    # B = 0 gives A no gradient: start from a B that is not
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    record = train(model, tokenizer, rows, settings(steps=1, **changes), seed=0)
    return factors(model), record


def test_accumulated_steps_weigh_every_token_alike(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    # a mean of the micro-batches' means would weigh the tokens of short traces more
    rows = examples[:4]
    assert len({len(e) - e.prompt_length for e in rows}) == 4
    together, first = one_step(qwen3, tokenizer, rows, batch_size=4, gradient_accumulation=1)
    apart, second = one_step(qwen3, tokenizer, rows, batch_size=1, gradient_accumulation=4)
    assert first.tokens == second.tokens == sum(len(e) - e.prompt_length for e in rows)
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    start = factors(new_model(qwen3))
    for name, value in together.items():
        moved = (value - start[name]).abs().max()
        # Adam's first step is the gradient's sign, so where it is nearly 0 rounding may tip it
        assert ((value - apart[name]).abs() > 1e-4 * moved).float().mean() < 0.01


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = new_model(qwen3, "none")
        want = plain_loss(model, examples[:4], tokenizer.pad_token_id)
        chosen = settings(steps=1, batch_size=batch_size, gradient_accumulation=accumulation)
        record = train(model, tokenizer, examples[:4], chosen, seed=0)
        assert record.loss == pytest.approx(want, rel=1e-5)


def test_the_gradient_of_a_step_is_that_of_a_masked_forward_of_its_traces(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    rows = examples[:5]  # in batches of two, the last of one
    batch = collate(rows, tokenizer.pad_token_id)
    mask = torch.tensor([[i < len(e) for i in range(batch["input_ids"].shape[1])] for e in rows]).long()
    assert not mask.all()
    model = new_model(qwen3, "none")
    model(**batch, attention_mask=mask).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        got.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(keep)
    try:
        chosen = settings(steps=1, batch_size=2, gradient_accumulation=3, max_grad_norm=1e9)
        train(model, tokenizer, rows, chosen, seed=0)
    finally:
        hook.remove()
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=float(want[name].abs().max()) * 1e-4 + 1e-9)


def batches_of(
    monkeypatch: pytest.MonkeyPatch, path: Path, pad: PreTrainedTokenizerBase, rows: list[Example], **changes: Any
) -> list[list[Example]]:
    """The batches that a branch trains on, in their order."""
    seen: list[list[Example]] = []
    real = trainer.collate

    def spy(batch: Sequence[Example], pad_id: int) -> Any:
        seen.append(list(batch))
        return real(batch, pad_id)

    monkeypatch.setattr(trainer, "collate", spy)
    train(new_model(path), pad, rows, settings(**changes), seed=11)
    monkeypatch.setattr(trainer, "collate", real)
    return seen


def test_a_steps_traces_are_those_of_the_random_order_and_stand_by_length(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = examples[:14]
    chosen = {"epochs": 2, "batch_size": 2, "gradient_accumulation": 3}  # 6, 6 and 2 traces a step
    batches = batches_of(monkeypatch, qwen3, tokenizer, rows, **chosen)
    random = SeedableRandomSampler(rows, data_seed=11)
    padding = without = 0
    for epoch in range(2):
        random.set_epoch(epoch)
        order = [rows[k] for k in random]
        for step in (order[:6], order[6:12], order[12:]):
            pairs = [step[i : i + 2] for i in range(0, len(step), 2)]
            taken, batches = batches[: len(pairs)], batches[len(pairs) :]
            assert [e for b in reversed(taken) for e in b] == sorted(step, key=len)
            padding += sum(max(map(len, b)) * len(b) for b in taken)
            without += sum(max(map(len, b)) * len(b) for b in pairs)
    assert batches == []
    tokens = 2 * sum(map(len, rows))
    assert tokens <= padding < without
    assert padding - tokens < 0.6 * (without - tokens)


@pytest.mark.parametrize(
    "cut",
    [
        {"batch_size": 6, "gradient_accumulation": 1},
        {"batch_size": 1, "gradient_accumulation": 6},
        {"batch_size": 3, "gradient_accumulation": 2, "batch_tokens": 90},
    ],
)
def test_which_traces_a_step_sees_does_not_depend_on_how_it_is_cut(
    qwen3: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    cut: dict[str, Any],
) -> None:
    rows = examples[:14]
    batches = batches_of(monkeypatch, qwen3, tokenizer, rows, epochs=2, **cut)
    random = SeedableRandomSampler(rows, data_seed=11)
    for epoch in range(2):
        random.set_epoch(epoch)
        order = [rows[k] for k in random]
        for step in (order[:6], order[6:12], order[12:]):
            taken: list[list[Example]] = []
            while sum(map(len, taken)) < len(step):
                taken.append(batch := batches.pop(0))
                if tokens := cut.get("batch_tokens"):
                    assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= tokens
                else:
                    assert len(batch) <= cut["batch_size"]
            assert [e for b in reversed(taken) for e in b] == sorted(step, key=len)
    assert batches == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_layers_in_bf16_take_their_inputs_as_they_are(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example], quantization: str, dropout: float
) -> None:
    model = add_adapter(in_bf16(qwen3, quantization), LoraConfig(r=4, alpha=8, dropout=dropout))
    reset_adapter(model, 0)
    seen: dict[str, list[torch.dtype]] = {}
    for name, module in model.get_base_model().named_modules():
        if name.endswith(("_proj", "_proj.lora_A.default")):

            def note(_module: Any, args: Any, name: str = name) -> None:
                seen.setdefault(name, []).append(args[0].dtype)

            module.register_forward_pre_hook(note)
    train(model, tokenizer, examples, settings(steps=1), seed=0)
    layers = [name for name in seen if name.endswith("_proj")]
    assert len(layers) == 14
    for name in layers:
        assert seen[name] == [torch.bfloat16] * 4  # two batches, forward and again
        # PEFT's own way is left to dropout alone
        assert seen.get(f"{name}.lora_A.default", []) == ([torch.bfloat16] * 4 if dropout else [])
    # outside, PEFT's copy is made again
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def in_bf16(path: Path, quantization: str) -> Any:
    """The student as `load_model` has it on a GPU."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=nf4 if quantization == "nf4" else None
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            cast("Any", module).support_avx512bf16_for_cpu = False
    return model


def test_the_first_step_goes_down_the_gradient_by_the_learning_rate(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    rows = examples[:4]
    model = new_model(qwen3, "none")
    batch = collate(rows, tokenizer.pad_token_id)
    model(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    start = factors(model)
    train(model, tokenizer, rows, settings(steps=1, batch_size=4, gradient_accumulation=1, learning_rate=1e-3), seed=0)
    for name, value in factors(model).items():
        sure = gradients[name].abs() > 1e-5
        moved = (value - start[name])[sure]
        torch.testing.assert_close(moved, -1e-3 * gradients[name][sure].sign(), rtol=0.02, atol=1e-6)
        if "lora_B" in name:
            assert sure.any()


def test_training_is_a_function_of_its_seed(
    student: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    runs: list[dict[str, torch.Tensor]] = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        model = new_model(student, dropout=0.1)
        torch.manual_seed(global_seed)
        train(model, tokenizer, examples, settings(), seed=seed)
        runs.append(factors(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_second_branch_on_one_model_is_as_if_it_were_the_first(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    model = new_model(qwen3)
    runs: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        reset_adapter(model, 3)
        train(model, tokenizer, examples, settings(), seed=1)
        runs.append(factors(model))
    assert same(runs[0], runs[1])  # nothing of the first optimizer is left


def test_activation_checkpointing_changes_memory_not_the_result(
    student: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    runs: list[dict[str, torch.Tensor]] = []
    for on in (True, False):
        model = new_model(student)
        train(model, tokenizer, examples, settings(activation_checkpointing=on), seed=1)
        assert model.get_base_model().is_gradient_checkpointing is on
        runs.append(factors(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-6)


def test_the_chunk_of_the_loss_changes_memory_not_the_result(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    small, first = one_step(qwen3, tokenizer, examples[:4], loss_chunk=3)
    large, second = one_step(qwen3, tokenizer, examples[:4], loss_chunk=10_000)
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    close = torch.cat([((v - large[n]).abs() < 1e-4).flatten() for n, v in small.items()])
    assert close.float().mean() > 0.99


def test_epochs_train_on_every_trace_as_often(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    record = train(new_model(qwen3), tokenizer, examples, settings(epochs=2), seed=0)
    assert record.steps == 2 * 16 // 4
    assert record.tokens == 2 * sum(len(e) - e.prompt_length for e in examples)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"schedule": "constant", "warmup": 0}, [1] * 8),
        ({"schedule": "constant", "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1 - i / 8 for i in range(8)]),
        ({"schedule": "cosine", "warmup": 0.25}, [0.5, *((1 + math.cos(math.pi * i / 7)) / 2 for i in range(7))]),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    qwen3: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    want: list[float],
) -> None:
    rates: list[float] = []
    real = branch.BranchTrainer.training_step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(branch.BranchTrainer, "training_step", spy)
    chosen = settings(steps=8, batch_size=1, gradient_accumulation=1, learning_rate=2e-3, **changes)
    train(new_model(qwen3), tokenizer, examples, chosen, seed=0)
    assert [r / 2e-3 for r in rates] == pytest.approx(want, abs=1e-6)


def test_progress_sees_every_step_its_loss_and_the_tokens_so_far(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example], capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int, float | None]] = []
    counted: list[int] = []

    def progress(stage: str, done: int, total: int, note: str = "", *, loss: Any = None, tokens: Any = None) -> None:
        assert note == ""
        seen.append((stage, done, total, loss))
        counted.append(tokens)

    record = train(new_model(qwen3), tokenizer, examples, settings(), seed=0, progress=progress)
    assert [(stage, done, total) for stage, done, total, _ in seen] == [("train", i, 4) for i in range(5)]
    assert tuple(loss for *_, loss in seen[1:]) == record.losses
    assert seen[0][-1] is None
    assert sum(record.losses) / 4 == pytest.approx(record.loss)
    assert counted == sorted(set(counted))
    assert (counted[0], counted[-1]) == (0, record.tokens)
    assert capfd.readouterr() == ("", "")


def test_a_branch_that_goes_astray_says_from_where_to_where_and_what_to_lower(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    with pytest.raises(DivergedError, match=r"from 6\.\d+ to nan at step 2: lower its learning_rate, now 1e\+30") as e:
        train(new_model(qwen3), tokenizer, examples, settings(learning_rate=1e30), seed=0)
    assert "\n" not in str(e.value)


def test_a_loss_that_explodes_and_stays_finite_ends_the_branch_too() -> None:
    # a student that has learned something can become worse than guessing; a random one cannot
    path = demo_path("student")
    model = new_model(path, "none")
    (where, row), *_ = read_rows(demo_path("teachers/steps.jsonl"))
    rows = [encode(load_tokenizer(path), cast("Trace", read_trace(row, where)))]
    chosen = settings(steps=10, learning_rate=30.0)
    with pytest.raises(DivergedError, match=r"the loss went from \d\.\d+ to \d+\.\d+ at step \d+: lower"):
        train(model, load_tokenizer(path), rows, chosen, seed=0)


def test_weights_that_are_not_finite_after_the_last_step_end_the_branch(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    # no loss comes after the last step that could tell
    with pytest.raises(DivergedError, match=r"lora_\S+ is not finite after the last step: lower its learning_rate"):
        train(new_model(qwen3), tokenizer, examples, settings(steps=1, learning_rate=1e39), seed=0)


def test_the_saved_adapter_is_what_was_trained(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example], tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    model = new_model(qwen3)
    train(model, tokenizer, examples, settings(), seed=0)
    model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    trained = {n.replace(".default.weight", ".weight"): v for n, v in factors(model).items()}
    assert same(saved, trained)
    assert saved.keys() == load_file(make_adapter(qwen3, "peft") / "adapter_model.safetensors").keys()


# --- on a GPU, and where memory ends -------------------------------------------------------------


def test_ligers_kernels_are_refused_where_they_cannot_run(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    with pytest.raises(
        UserError, match=r"^branch\.liger: its kernels need a CUDA GPU, and the device is `cpu`; set it"
    ):
        train(new_model(qwen3), tokenizer, examples, settings(liger=True), seed=0)
    assert not uses_liger("off", is_gpu=True)
    if find_spec("liger_kernel") is None:
        assert not uses_liger("auto", is_gpu=True)
        with pytest.raises(UserError, match=r"^branch\.liger needs .* pip install liger-kernel"):
            uses_liger("on", is_gpu=True)


def test_out_of_memory_advises_what_a_run_can_go_on_with() -> None:
    rest = ", or start a new run with branch.max_length below 90, the longest trace"

    def said(stays: bool = False, **changes: Any) -> str:
        advice = branch._advice(settings(**changes), 90, stays)
        assert advice.endswith(rest)
        return advice.removesuffix(rest)

    assert said(True, batch_size=1, loss_chunk=256) == "resume with branch.offload=on"
    assert said(batch_size=1, loss_chunk=256) == "free memory that other programs use, and resume"
    assert said(batch_size=3, gradient_accumulation=2, activation_checkpointing=False, loss_chunk=300) == (
        "resume with branch.batch_size=1 branch.gradient_accumulation=6 branch.activation_checkpointing=true "
        "branch.loss_chunk=256"
    )
    assert said(batch_size=4, gradient_accumulation=3, loss_chunk=1024) == (
        "resume with branch.batch_size=2 branch.gradient_accumulation=6 branch.loss_chunk=512"
    )
    assert said(batch_tokens=150, loss_chunk=256) == "resume with branch.batch_tokens=90"
    assert said(batch_tokens=80, loss_chunk=256) == "free memory that other programs use, and resume"
