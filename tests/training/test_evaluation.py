import gc
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, EvalConfig, LoraConfig
from mot_lora.data.chat import prompt_text
from mot_lora.data.encoding import collate, encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Example, Question, Trace
from mot_lora.errors import UserError
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.decoding import Layer
from mot_lora.training.evaluation import LOSS_TOKENS, AtOnce, evaluate, generate, held_out_losses, loss_tokens
from mot_lora.training.student import load_model

CPU = torch.device("cpu")
QUESTIONS = [Question("7 + " * n + "1 = ?", "8") for n in (5, 1, 9, 3, 7, 2, 12)]
LEARNED = [("1 + 1 = ?", "2"), ("What is 2 + 3, all in all?", "5"), ("3 + 4 = ?", "9"), ("9 - 2 = ?", "7")]


@pytest.fixture(scope="module")
def tokenizer(qwen3: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(qwen3)


def talkative(path: Path) -> PeftModel:
    """A student in NF4 whose adapter is large enough for it to say different things."""
    model = add_adapter(load_model(Checkpoint.open(path), "nf4", CPU), LoraConfig(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def model(qwen3: Path) -> PeftModel:
    return talkative(qwen3)


@pytest.fixture(scope="module")
def learned(qwen3: Path, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """A student that knows four answers by heart, of which the third is wrong."""
    model = add_adapter(load_model(Checkpoint.open(qwen3), "none", CPU), LoraConfig(r=4, alpha=8))
    reset_adapter(model, 0)
    traces = [Trace(({"role": "user", "content": q},), f"<think>\nit is\n</think>\n\n{a}") for q, a in LEARNED]
    batch = collate([encode(tokenizer, t) for t in traces], tokenizer.pad_token_id)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def greedy_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> list[int]:
    """Greedy decoding by hand: one prompt, no cache, no padding."""
    ids = tokenizer(prompt_text(tokenizer, [{"role": "user", "content": question}]), return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            following = model(input_ids=ids).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following.view(1, 1)], 1)
    return ids[0, start:].tolist()


def greedy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    return tokenizer.decode(greedy_ids(model, tokenizer, question, tokens))


def test_batched_answers_are_those_of_one_at_a_time_in_order(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    want = [[greedy(model, tokenizer, q.question, 12)] for q in QUESTIONS]
    assert len({w[0] for w in want}) == len(QUESTIONS)
    for batch_size in (1, 3, 7):
        seen: list[tuple[int, int, int]] = []

        def progress(stage: str, done: int, total: int, note: str = "", *, tokens: int, seen: list[Any] = seen) -> None:
            assert (stage, note) == ("answer", "")
            seen.append((done, total, tokens))

        settings = EvalConfig(batch_size=batch_size, max_new_tokens=12)
        assert generate(model, tokenizer, QUESTIONS, settings, seed=0, progress=progress) == want
        assert seen == sorted(seen)
        assert list(dict.fromkeys(done for done, _, _ in seen)) == list(range(8))
        assert {total for _, total, _ in seen} == {7}
        assert seen[-1] == (7, 7, 7 * 12)


def test_the_adapter_counts_unless_it_is_switched_off(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = EvalConfig(max_new_tokens=6)
    with_adapter = generate(model, tokenizer, QUESTIONS, settings, seed=0)
    with model.disable_adapter():
        without = generate(model, tokenizer, QUESTIONS, settings, seed=0)
        assert without == [[greedy(model, tokenizer, q.question, 6)] for q in QUESTIONS]
    assert with_adapter != without


def test_samples_follow_their_seed_and_leave_the_global_one(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = EvalConfig(samples=3, temperature=1.0, batch_size=3, max_new_tokens=8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, QUESTIONS, settings, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(model, tokenizer, QUESTIONS, settings, seed=5) == first
    assert generate(model, tokenizer, QUESTIONS, settings, seed=6) != first
    assert [len(samples) for samples in first] == [3] * len(QUESTIONS)
    assert any(len(set(samples)) > 1 for samples in first)


def test_low_temperature_samples_answer_their_own_question(
    learned: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # num_return_sequences interleaves the samples of a batch
    settings = EvalConfig(samples=3, temperature=0.01, batch_size=3, max_new_tokens=12)
    texts = generate(learned, tokenizer, [Question(q, "") for q, _ in LEARNED], settings, seed=0)
    assert texts == [[f"<think>\nit is\n</think>\n\n{a}"] * 3 for _, a in LEARNED]


def test_answers_are_computed_as_the_loss_is(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # on a GPU the base is in bf16 and the adapter in fp32, which would pull all that follows it into fp32
    base = model.get_base_model()
    for module in base.modules():
        if isinstance(module, torch.nn.Embedding) or type(module).__name__.endswith("RMSNorm"):
            module.to(torch.bfloat16)
    base.config.dtype = torch.bfloat16
    assert model.dtype == base.dtype == torch.bfloat16
    layer = base.model.layers[1].mlp.down_proj
    seen: dict[str, set[torch.dtype]] = {"answers": set(), "loss": set()}
    with torch.no_grad():
        for what, dtypes in seen.items():
            hook = layer.lora_B["default"].register_forward_hook(lambda _m, _x, y, to=dtypes: to.add(y.dtype))
            if what == "loss":
                trace = encode(tokenizer, Trace(({"role": "user", "content": "7 + 1 = ?"},), "8"))
                held_out_losses(model, tokenizer, {"a": [trace]}, AtOnce(1), 100)
            else:
                generate(model, tokenizer, QUESTIONS, EvalConfig(max_new_tokens=4), seed=0)
            hook.remove()
    assert seen == {"answers": {torch.bfloat16}, "loss": {torch.bfloat16}}


@contextmanager
def memory_for(model: PeftModel, rows: int) -> Iterator[list[Any]]:
    """A model that finds no memory for more rows at once; gives what was held when it failed."""
    held: list[Any] = []

    def full(_module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if len(ids) > rows:
            assert all(ref() is None for ref in held)  # what the attempt before had is gone
            blocked = torch.empty(10)
            held.append(weakref.ref(blocked))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = model.get_base_model().base_model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        yield held
    finally:
        hook.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_out_of_memory_halves_what_is_done_at_once_and_goes_on(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    questions = [*QUESTIONS, *(Question("2 + " * n + "1 = ?", "8") for n in (4, 2, 8))]
    traces = {"a": [Example.after(tuple(range(4, 4 + n)), 1) for n in (40, 7, 12, 61, 9)]}
    settings = EvalConfig(max_new_tokens=8, batch_size=10, samples=1 + bool(temperature), temperature=temperature)
    want, answers = evaluate(model, tokenizer, questions, traces, settings, seed=3)
    assert want.at_once == {}
    said: list[tuple[str, int, str]] = []

    def progress(stage: str, done: int, _total: int, note: str = "", **_: Any) -> None:
        said.append((stage, done, note))

    with memory_for(model, 3) as held:
        record, less = evaluate(model, tokenizer, questions, traces, settings, seed=3, progress=progress)
    assert less == answers
    assert record.losses == pytest.approx(want.losses, rel=1e-5)
    assert record.at_once == {"traces": 2, "answers": 2}
    assert len(held) == 1 + (3 if temperature else 2)  # 5 traces; 20, 10, 5 or 10, 5 answers
    assert all(ref() is None for ref in held)
    assert [note for stage, done, note in said if (stage, done) == ("answer", 0)][-1] == "out of memory: 2 at once"
    assert said[-1] == ("answer", 10 * settings.samples, "out of memory: 2 at once")
    assert ("loss", 5, "out of memory: 2 at once") in said


def test_out_of_memory_for_a_single_one_ends_in_one_line(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    traces = {"a": [Example.after(tuple(range(4, 4 + n)), 1) for n in (40, 7)]}
    for questions, held_out in ((QUESTIONS, {}), ([], traces)):
        with memory_for(model, 0), pytest.raises(UserError) as caught:
            evaluate(model, tokenizer, questions, held_out, EvalConfig(max_new_tokens=8), seed=0)
        assert "2.00 GiB" in str(caught.value)
        assert "eval.max_new_tokens below 8 or a smaller branch.max_length" in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    hook = model.get_base_model().register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        generate(model, tokenizer, QUESTIONS, EvalConfig(max_new_tokens=8), seed=0)
    hook.remove()


def test_measuring_takes_no_more_tokens_at_once_than_training() -> None:
    assert loss_tokens(BranchConfig(batch_size=1), 700) == 700
    assert loss_tokens(BranchConfig(batch_size=4), 700) == 2800
    assert loss_tokens(BranchConfig(batch_size=4), 40_000) == LOSS_TOKENS


def test_a_model_of_another_kind_is_asked_by_generate_and_that_is_said(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = EvalConfig(max_new_tokens=8, samples=2, temperature=1.0, batch_size=2)
    want = generate(model, tokenizer, QUESTIONS, settings, seed=0)
    model.get_base_model().set_attn_implementation("eager")
    notes: set[str] = set()
    got = generate(model, tokenizer, QUESTIONS, settings, seed=0, progress=lambda *counts, **_: notes.add(counts[3]))
    assert got == want
    assert notes == {"Qwen3ForCausalLM: by transformers' generate"}


def test_an_interrupted_answer_leaves_nothing_behind(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = EvalConfig(max_new_tokens=8, batch_size=2, samples=2, temperature=1.0)
    threads, state = threading.enumerate(), torch.get_rng_state()

    def stop(_stage: str, done: int, _total: int, _note: str = "", **_: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, QUESTIONS, settings, seed=0, progress=stop)
    assert not [x for x in gc.get_objects() if type(x) is Layer]
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_autocast_enabled("cpu")
    assert generate(model, tokenizer, QUESTIONS, settings, seed=0) == generate(
        model, tokenizer, QUESTIONS, settings.model_copy(update={"batch_size": 7}), seed=0
    )


def chatty_copy(qwen3: Path, path: Path, **settings: Any) -> Path:
    """A copy of the student with its own generation_config.json."""
    shutil.copytree(qwen3, path)
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def test_a_models_own_chat_settings_do_not_change_greedy_answers(
    qwen3: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = [[greedy(model, tokenizer, q.question, 12)] for q in QUESTIONS]
    # as Qwen's models come
    chat = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.5}
    chatty = talkative(chatty_copy(qwen3, tmp_path / "chatty", **chat, eos_token_id=tokenizer.eos_token_id))
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            got = generate(chatty, tokenizer, QUESTIONS, EvalConfig(max_new_tokens=12), seed=0)
    finally:
        transformers_logging.disable_propagation()
    assert got == want
    assert caplog.messages == []


def test_a_models_own_end_tokens_end_an_answer_and_are_no_part_of_it(
    qwen3: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    question = QUESTIONS[0].question
    ids = greedy_ids(model, tokenizer, question, 12)
    stop = next(i for i in ids if i not in ids[:3])
    ends = talkative(chatty_copy(qwen3, tmp_path / "ends", eos_token_id=[stop, tokenizer.eos_token_id]))
    ((cut,),) = generate(ends, tokenizer, QUESTIONS[:1], EvalConfig(max_new_tokens=12), seed=0)
    assert cut == tokenizer.decode(ids[: ids.index(stop)])


def test_accuracy_is_the_share_of_right_answers(learned: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    gold = ["2", "5", "7", r"\frac{14}{2}"]
    questions = [Question(q, g) for (q, _), g in zip(LEARNED, gold, strict=True)]
    for settings in (
        EvalConfig(max_new_tokens=12, batch_size=3),
        EvalConfig(max_new_tokens=12, samples=2, temperature=0.01),
    ):
        record, answers = evaluate(learned, tokenizer, questions, {}, settings, seed=0)
        assert [(a.question, a.answer) for a in answers] == [(q.question, q.answer) for q in questions]
        assert [a.score for a in answers] == [1, 1, 0, 1]
        assert record.questions == 4
        assert record.accuracy == 0.75
        assert record.interval is not None
        assert 0 < record.interval[0] < 0.75 < record.interval[1] < 1
        assert record.losses == {}
    # cut before the chain of thought is closed, nothing is right
    cut, _ = evaluate(learned, tokenizer, questions, {}, EvalConfig(max_new_tokens=3), seed=0)
    assert cut.accuracy == 0


def test_the_held_out_loss_is_the_mean_over_trained_tokens(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    def example(words: int) -> Example:
        return encode(tokenizer, Trace(({"role": "user", "content": "7 + 1 = ?"},), "7 + " * words + "1"))

    rows = {"a": [example(n) for n in (9, 1, 30, 2, 5)], "b": [example(4)], "none": []}
    want: dict[str, float] = {}
    for name, examples in rows.items():
        logs: list[float] = []
        for e in examples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([e.input_ids])).logits[0].double()
            p = logits.log_softmax(-1)
            logs += [float(p[i - 1, e.input_ids[i]]) for i in range(e.prompt_length, len(e))]
        if logs:
            want[name] = -sum(logs) / len(logs)
    for batch_size in (1, 2, 16):
        settings = EvalConfig(batch_size=batch_size)
        losses = held_out_losses(model, tokenizer, rows, AtOnce(batch_size), LOSS_TOKENS)
        assert losses == pytest.approx(want, rel=1e-5)
        record, answers = evaluate(model, tokenizer, [], rows, settings, seed=0)
        assert record.losses == pytest.approx(want, rel=1e-5)
        assert record.loss == pytest.approx((want["a"] + want["b"]) / 2, rel=1e-5)
        assert (answers, record.accuracy, record.interval, record.questions) == ([], None, None, 0)


def test_long_held_out_traces_go_one_by_one_and_short_ones_together(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = {"a": [Example.after(tuple(range(4, 4 + n)), 1) for n in (40, 7, 12, 61, 9, 30, 29, 8, 8, 75)]}
    shapes: list[tuple[int, int]] = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    want = held_out_losses(model, tokenizer, rows, AtOnce(3), LOSS_TOKENS)
    assert shapes == [(3, 8), (3, 29), (3, 61), (1, 75)]
    shapes.clear()
    assert held_out_losses(model, tokenizer, rows, AtOnce(3), 60) == pytest.approx(want, rel=1e-5)
    hook.remove()
    assert shapes == [(3, 8), (2, 12), (2, 30), (1, 40), (1, 61), (1, 75)]
