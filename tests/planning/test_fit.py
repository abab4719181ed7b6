"""What is said of a run before it begins: memory, work, time, and what to change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import allocated, stored
from transformers import Qwen3Config, Qwen3ForCausalLM

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import MERGE_METHODS, Config, LoraConfig
from mot_lora.errors import UserError
from mot_lora.merging.agreement import agreement_of
from mot_lora.merging.lowrank import Adapter, Factors
from mot_lora.merging.merged import Merged, combine
from mot_lora.merging.methods import NEEDS_DENSITY
from mot_lora.planning.cards import Card, find_card
from mot_lora.planning.fit import PlanRecord, changes, plan
from mot_lora.planning.need import LAUNCHES, Need, Part, UnplannableError, Work, peak_of
from mot_lora.runs.distillation import preview, run
from mot_lora.training.adapter import add_adapter
from mot_lora.training.student import fold, load_model

GIB = 2**30
QWEN3 = {
    "0.6b": (1024, 28, 16, 3072, True),
    "4b": (2560, 36, 32, 9728, True),
    "8b": (4096, 36, 32, 12288, False),
    "14b": (5120, 40, 40, 17408, False),
}


def architecture(name: str) -> str:
    width, layers, heads, inner, tied = QWEN3[name]
    config = Qwen3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=151936,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )
    return config.to_json_string(use_diff=False)


TINY = Qwen3Config(
    hidden_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=500,
    max_position_embeddings=8192,
).to_json_string(use_diff=False)


def config(**settings: Any) -> Config:
    branch = {"batch_size": 1, "gradient_accumulation": 16, "max_length": 4096, **settings.pop("branch", {})}
    teachers = ({"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"})
    return Config.model_validate({"student": "s", "teachers": teachers, "branch": branch, **settings})


def test_true_shapes_take_what_others_measured() -> None:
    """NF4 weights with bf16 embeddings: 5.7 and 9.25 GiB; inputs of layers at 32k tokens: 9.0 and 12.5 GiB."""
    for name, weights, inputs in (("8b", 5.7, 9.0), ("14b", 9.25, 12.5)):
        need = Need(config(), architecture(name), find_card("RTX 4090"))
        parts = {p.name: p.bytes / GIB for p in need.parts(32768)}
        assert parts["linear layers, nf4"] + parts["embeddings, head, norms"] == pytest.approx(weights, rel=0.01)
        assert parts["inputs of layers, offloaded"] == pytest.approx(inputs)


@pytest.mark.slow
def test_the_longest_trace_fits_and_a_longer_one_does_not() -> None:
    for card in (Card("small", 1.2), Card("larger", 2), Card("no bf16", 2, bf16=False), Card("CPU", 1.5, is_gpu=False)):
        need = Need(
            config(branch={"loss_chunk": 4096}), json.dumps(json.loads(TINY) | {"max_position_embeddings": 2**20}), card
        )
        longest = need.longest()
        assert longest > 1000
        assert need.fits(longest)
        assert not need.fits(round(longest * 1.05) + 64)


def test_the_longest_trace_is_no_longer_than_the_student_reads() -> None:
    assert Need(config(), TINY, Card("large", 80)).longest() == 8192


@pytest.mark.slow
def test_nothing_fits_where_the_weights_do_not() -> None:
    need = Need(config(), architecture("8b"), find_card("RTX 3060"))
    tight = Need(config(), architecture("8b"), Card("tiny", 4))
    assert need.longest() > 0
    assert tight.longest() == 0
    assert changes(tight.config, tight.architecture, tight.card, 4096) == ()


@pytest.mark.slow
def test_what_is_changed_fits_and_less_does_not() -> None:
    asked = config(quantization="none", branch={"activation_checkpointing": False, "batch_size": 8, "max_length": 8192})
    card = find_card("RTX 4090")
    record = plan(asked, architecture("8b"), card)
    assert not record.fits

    def changed(settings: tuple[str, ...]) -> Config:
        tree = asked.model_dump(mode="json")
        for setting in settings:
            *outer, last = setting.partition("=")[0].split(".")
            node = tree
            for key in outer:
                node = node[key]
            node[last] = json.loads(setting.partition("=")[2]) if last != "quantization" else "nf4"
        return Config.model_validate(tree)

    length = next((int(c.partition("=")[2]) for c in record.change if c.startswith("branch.max_length")), 8192)
    assert Need(changed(record.change), architecture("8b"), card).fits(length)
    assert len(record.change) >= 2
    for setting in record.change:  # each is needed
        if not setting.startswith(("branch.max_length", "branch.gradient_accumulation")):
            less = tuple(c for c in record.change if c != setting)
            assert not Need(changed(less), architecture("8b"), card).fits(length), setting


@pytest.mark.slow
def test_a_smaller_rank_comes_before_shorter_traces() -> None:
    def asked(r: int) -> Config:
        return config(lora={"r": r, "alpha": 64}, branch={"loss_chunk": 64})

    large, small = (peak_of(Need(asked(r), TINY, Card("large", 80)).parts(4096)) for r in (64, 8))
    card = Card("between", (large + small) / 2 / GIB)
    assert changes(asked(64), TINY, card, 4096) == ("lora.r=8",)
    (shorter,) = changes(asked(8), TINY, Card("less", (small - 2**20) / GIB), 4096)
    assert shorter.startswith("branch.max_length=")


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_fold_takes_as_many_copies_of_a_layer_as_are_planned(tmp_path: Path, method: str) -> None:
    config = Qwen3Config(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, head_dim=32, vocab_size=500)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = add_adapter(load_model(checkpoint, "nf4", torch.device("cpu")), LoraConfig())
    shapes = {n.removesuffix(".weight"): t.shape for n, t in stored(tmp_path).items() if "_proj" in n}

    def merged() -> Merged:
        adapters = [
            Adapter(
                str(i), {n: Factors(torch.randn(4, inner), torch.randn(out, 4)) for n, (out, inner) in shapes.items()}
            )
            for i in range(4)
        ]
        return combine(adapters, method, density=0.5 if method in NEEDS_DENSITY else None)

    ledger = [merged(), merged()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for f in fold(model, checkpoint, ledger):
            agreement_of(ledger[-1].adapters, f.module, f.base, f.update, f.change)
            del f
    merge = {"method": method, **({"density": 0.5} if method in NEEDS_DENSITY else {})}
    asked = Config(student="s", teachers=tuple({"name": str(i), "data": "d"} for i in range(4)), merge=merge)
    planned = Need(asked, TINY, Card("CPU", 8, is_gpu=False)).copies
    assert allocated(profile)[1] / (4 * 256 * 1024) == pytest.approx(planned, abs=0.6)


def test_the_peak_is_of_what_is_held_together() -> None:
    parts = [
        Part(name="weights", bytes=10),
        Part(name="kept", bytes=5, phase="training"),
        Part(name="loss", bytes=3, phase="loss"),
        Part(name="layer", bytes=4, phase="layers"),
        Part(name="fold", bytes=7, phase="folding"),
        Part(name="answers", bytes=8, phase="answering"),
        Part(name="moved", bytes=100, place="host"),
    ]
    assert peak_of(parts) == 19
    assert peak_of([*parts, Part(name="more answers", bytes=2, phase="answering")]) == 20
    assert peak_of([*parts, Part(name="measured with", bytes=3, phase="measuring")]) == 21
    assert peak_of([*parts, Part(name="held-out losses", bytes=12, phase="losses")]) == 22


def test_work_is_counted_from_the_traces() -> None:
    record = plan(
        config(branch={"steps": 10}),
        TINY,
        find_card("RTX 3090"),
        Work({"a": [100] * 160, "b": [50] * 80 + [150] * 80}),
    )
    a, b = record.teachers
    assert (a.steps, a.tokens, a.longest, a.traces) == (10, 16000, 100, 160)
    assert (b.tokens, b.longest) == (16000, 150)
    assert a.seconds
    assert b.seconds
    assert b.seconds > a.seconds  # as many tokens, but long traces attend to more
    assert record.seconds == pytest.approx(5 * (a.seconds + b.seconds))
    assert record.tokens == 150
    twice = plan(config(branch={"steps": 20}), TINY, find_card("RTX 3090"), Work({"a": [100] * 160, "b": [150]}))
    assert twice.teachers[0].seconds == pytest.approx(2 * a.seconds)


def test_epochs_are_steps_of_the_traces_that_are_there() -> None:
    record = plan(
        config(branch={"epochs": 2}), TINY, Card("CPU", 8, is_gpu=False), Work({"a": [10] * 33, "b": [10] * 16})
    )
    assert [t.steps for t in record.teachers] == [6, 2]
    assert record.seconds is None  # nobody says how fast a CPU is


@pytest.mark.slow
def test_batches_and_chunks_take_memory() -> None:
    def peak(**branch: Any) -> int:
        return peak_of(Need(config(branch=branch), architecture("8b"), find_card("RTX 4090")).parts(4096))

    usual = peak()
    assert peak(batch_size=2) > usual
    assert peak(loss_chunk=4096) > usual
    assert peak(activation_checkpointing=False) > 3 * usual
    assert peak(offload="on") < peak(offload="off")


def test_what_cannot_run_without_data_is_said_so() -> None:
    with pytest.raises(UnplannableError, match="no_such_model"):
        plan(config(), json.dumps({"model_type": "no_such_model"}), find_card("T4"))


def test_a_preview_needs_no_weights_and_no_traces(tmp_path: Path, qwen3: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for file in qwen3.iterdir():
        if file.suffix != ".safetensors":
            (student / file.name).write_bytes(file.read_bytes())
    asked = config(student=str(student))
    record, unread = preview(asked, "RTX 4090")
    assert "a.jsonl" in unread
    assert [(t.traces, t.longest) for t in record.teachers] == [(0, 4096), (0, 4096)]
    assert preview(asked, "RTX 4090", gib=10)[0].capacity == 10 * GIB


def test_a_run_is_planned_before_it_begins(make_config: Callable[..., Config]) -> None:
    told: list[PlanRecord] = []
    asked = make_config(rounds=1)
    run(asked, planned=told.append)
    assert told[0].fits
    assert told[0].card == "CPU"
    assert max(t.longest for t in told[0].teachers) == told[0].tokens


def test_a_trace_that_is_too_long_is_refused_by_name(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_config(rounds=1)
    asked = asked.model_copy(update={"eval": asked.eval.model_copy(update={"batch_size": 1})})
    longest = max(preview(asked)[0].teachers, key=lambda t: t.longest)
    small = Card(
        "a small card", preview(asked.model_copy(update={"device": "cpu"}))[0].peak / GIB - 0.0002, is_gpu=False
    )
    monkeypatch.setattr("mot_lora.runs.distillation.this_card", lambda _: small)
    with pytest.raises(UserError) as refused:
        run(asked)
    said = str(refused.value)
    assert longest.teacher in said
    assert ".jsonl" in said
    assert f"{longest.longest} tokens" in said
    assert "--force" in said
    assert not (Path(asked.output) / "round-001").exists()
    run(asked, force=True)
    assert (Path(asked.output) / "round-001").exists()


def test_what_is_offloaded_must_fit_into_host_memory(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mot_lora.runs.distillation.this_card", lambda _: Card("a large card", 80))
    monkeypatch.setattr("mot_lora.runs.distillation.host_memory", lambda: 2**20)
    branch = {"steps": 1, "batch_size": 1024, "max_length": 128, "activation_checkpointing": True, "offload": "on"}
    with pytest.raises(
        UserError, match=r"teacher `.`.*tokens.*host memory.* 1 MiB are free.*branch.offload=off.*--force"
    ):
        run(make_config(rounds=1, branch=branch))
    run(make_config(rounds=1, branch={**branch, "offload": "off"}))


def test_the_command(call: Callable[..., tuple[int, str, str]], config_file: Path) -> None:
    status, out, _ = call("plan", config_file, "--card", "RTX 3060", "--json")
    record = PlanRecord.model_validate_json(out)
    assert status == 0
    assert (record.card, record.capacity) == ("RTX 3060", find_card("RTX 3060").bytes)
    status, out, _ = call("plan", config_file, "device=cpu")
    assert status == 0
    assert "fits" in out
    status, out, err = call("plan", config_file, "--card", "RTX 3061")
    assert (status, out) == (2, "")
    assert "did you mean RTX 3060" in err


@pytest.mark.parametrize(
    ("name", "layers", "longest"), [pytest.param("0.6b", 28, 40_960, marks=pytest.mark.slow), ("4b", 36, 30_912)]
)
def test_a_card_before_ampere_takes_long_traces(name: str, layers: int, longest: int) -> None:
    """It computes in fp16, with keys and values repeated for a kernel that makes no matrix of scores."""
    asked = config(eval={"holdout": 0.05, "batch_size": 1})
    need = Need(asked, architecture(name), find_card("T4"))
    assert need.student.dtype == torch.float16
    assert need.student.config.num_hidden_layers == layers
    assert need.longest() >= longest


def test_what_is_measured_takes_memory_and_time() -> None:
    card, work = find_card("RTX 3090"), Work({"a": [100], "b": [100]}, [100] * 20, 10, 6, [4, 5])

    def planned(work: Work = work, **settings: Any) -> PlanRecord:
        return plan(config(rounds=2, **settings), TINY, card, work, search=False)

    asked = {"data": "q.jsonl", "batch_size": 2, "max_new_tokens": 100}
    both = planned(eval=asked)
    names = {p.name: p.phase for p in both.parts}
    assert names["held-out losses of 100 tokens"] == "losses"
    assert names["keys and values of 2 answers"] == names["their prompts, or next tokens"] == "answering"
    assert names["adapter in 16 bits"] == "measuring"
    assert "held-out losses" not in " ".join(p.name for p in planned(eval={**asked, "holdout": 0}).parts)
    # 5 layers' kernels are what a token takes: before, after two rounds, and for two teachers in each
    assert both.answering == pytest.approx(100 * 5 * LAUNCHES * (7 * 5 + 3 * (2 + 3)))
    alone = planned(eval={**asked, "branches": False})
    assert alone.answering == pytest.approx(100 * 5 * LAUNCHES * (3 * 5 + 3 * (2 + 3)))
    assert both.losing
    assert alone.losing == pytest.approx(both.losing * 3 / 7)
    weighed = {**asked, "branches": False, "validation": "v.jsonl"}
    for weights, tried in (("validation", 2), ("greedy", 3)):
        longer = planned(eval=weighed, merge={"weights": weights}).answering
        assert longer == pytest.approx(alone.answering + 100 * 5 * LAUNCHES * 2 * tried * 3)
    final = planned(Work({"a": [100]}, final=6), eval={**asked, "final": {"samples": 3, "temperature": 1}})
    assert final.answering == pytest.approx(100 * 5 * LAUNCHES * 3)
    assert "keys and values of 6 answers" in {p.name for p in final.parts}
    # a large student's weights take longer to be read than kernels to be started
    slow = plan(
        config(eval=asked, rounds=1, quantization="none"), architecture("8b"), find_card("T4"), work, search=False
    )
    assert slow.answering
    assert slow.answering > 100 * 36 * LAUNCHES * (4 * 5 + 2 * (2 + 3))


def test_many_held_out_traces_at_once_are_bounded() -> None:
    def named(tokens: int, **branch: int) -> str:
        need = Need(config(eval={"batch_size": 64}, branch=branch), architecture("8b"), find_card("RTX 4090"))
        (name,) = [p.name for p in need.parts(tokens) if p.phase == "losses"]
        return name

    assert named(4096) == "held-out losses of 4,096 tokens"  # as many as in a step's batch
    assert named(4096, batch_size=8) == "held-out losses of 16,384 tokens"
    assert named(20_000, batch_size=8) == "held-out losses of 20,000 tokens"
