"""Consensus: students' log-probs against plain transformers, classes that were planted, the page, and the command."""

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh, refused, true_updates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run_page import HOSTILE, Reader, a_page, a_run, fold, section
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from mot_lora import UserError
from mot_lora.analysis import landscape
from mot_lora.analysis.confidence import (
    KINDS,
    ConsensusRecord,
    ConsensusRound,
    Estimate,
    ExampleRecord,
    LandscapeRecord,
    LossLine,
    StudentConfidence,
    TokenRecord,
    classes_of,
    consensus_of,
    read_consensus,
)
from mot_lora.analysis.consensus import consensus
from mot_lora.config import Config
from mot_lora.data.dataset import load_data
from mot_lora.data.tokenizer import load_tokenizer, pieces
from mot_lora.data.traces import IGNORE, Example
from mot_lora.reader import demo_path, parse_config
from mot_lora.reports import consensus_charts
from mot_lora.reports.consensus_page import ConsensusPart, consensus_part, finding
from mot_lora.reports.publish import read_page
from mot_lora.reports.run_page import report
from mot_lora.runs.distillation import run
from mot_lora.runs.rundir import RunDir

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

# each word is a token of its own
SAID = {"a": "Anna starts with pears", "b": "Ella sells more stamps", "c": "Ruth throws away marbles"}
SHARED = {"a": "Jack takes coins", "b": "Jack takes coins", "c": "Noah buys nuts"}


@pytest.fixture(scope="module")
def config(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three teachers: each says a thing of its own, and `a` and `b` share another. Finished, not quantized."""
    folder = tmp_path_factory.mktemp("consensus")
    for t in SAID:
        rows = [{"question": f"{i} + 1 = ?", "answer": f"{SAID[t]} {SHARED[t]} {i + 1}"} for i in range(30)]
        (folder / f"{t}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree = {
        "student": str(qwen3),
        "teachers": [{"name": t, "data": str(folder / f"{t}.jsonl")} for t in SAID],
        "rounds": 2,
        "branch": {
            "steps": 12,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 1e-2,
            "max_length": 128,
            "activation_checkpointing": False,
        },
        "lora": {"r": 4, "alpha": 8},
        "eval": {"holdout": 0.15},
        "quantization": "none",
        "device": "cpu",
        "output": str(folder / "run"),
    }
    config = parse_config(tree, "test")
    run(config)
    return config


@pytest.fixture(scope="module")
def found(config: Config) -> ConsensusRecord:
    return consensus(config.output, traces=99)


def held_out(config: Config) -> dict[str, list[Example]]:
    return load_data(config, load_tokenizer(Path(config.student))).held_out


def branch(config: Config, number: int, teacher: str) -> Path:
    return Path(config.output) / f"round-{number:03d}" / teacher


def students(config: Config) -> dict[tuple[int, str | None], PreTrainedModel]:
    """The base, every branch and every merged student (an equal mean) as plain models, without the package."""
    out: dict[tuple[int, str | None], PreTrainedModel] = {(0, None): fresh(Path(config.student))}
    for number in (1, 2):
        updates = {t: true_updates(branch(config, number, t)) for t in SAID}
        for who in (*SAID, None):
            model = fresh(Path(config.student))
            model.load_state_dict(out[number - 1, None].state_dict())
            for name in updates["a"]:
                deltas = [updates[t][name] for t in SAID] if who is None else [updates[who][name]]
                with torch.no_grad():
                    model.get_submodule(name).weight += torch.stack(deltas).mean(0).float()
            out[number, who] = model
    return out


def log_probs(model: PreTrainedModel, example: Example) -> dict[int, float]:
    """Log p of each trained token by its position, from all logits in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    every = torch.log_softmax(logits, -1)
    return {i: float(every[i - 1, y]) for i, y in enumerate(example.labels) if i and y != IGNORE}


@pytest.fixture(scope="module")
def recomputed(config: Config) -> dict[tuple[int, str | None], dict[str, list[dict[int, float]]]]:
    data = held_out(config)
    return {
        who: {t: [log_probs(model, e) for e in examples] for t, examples in data.items()}
        for who, model in students(config).items()
    }


def flat(found: dict[str, list[dict[int, float]]]) -> list[float]:
    return [x for traces in found.values() for trace in traces for x in trace.values()]


def test_confidence_is_that_of_plain_transformers(found: ConsensusRecord, recomputed: Any) -> None:
    assert {(c.round, c.branch) for c in found.confidence} == recomputed.keys()
    assert found.branches == tuple(SAID)
    for c in found.confidence:
        for t, traces in recomputed[c.round, c.branch].items():
            x = [v for trace in traces for v in trace.values()]
            assert c.log_p[t] == pytest.approx(sum(x) / len(x), abs=1e-4)
            assert c.p[t] == pytest.approx(sum(map(math.exp, x)) / len(x), abs=1e-4)
        assert c.mean == pytest.approx(sum(c.p.values()) / 3)


@pytest.mark.parametrize("number", [1, 2])
def test_classes_are_those_of_plain_transformers(found: ConsensusRecord, recomputed: Any, number: int) -> None:
    start, merged, base = (flat(recomputed[w]) for w in ((number - 1, None), (number, None), (0, None)))
    each = [flat(recomputed[number, t]) for t in SAID]
    counts = [sum(b[i] - start[i] > found.threshold for b in each) for i in range(len(start))]
    names = {3: "all", 2: "several", 1: "one", 0: "none"}
    (part,) = (r for r in found.rounds if r.round == number)
    assert sum(c.tokens for c in part.classes) == len(start)
    for c in part.classes:
        at = [i for i, n in enumerate(counts) if names[n] == c.kind]
        assert c.tokens == pytest.approx(len(at), abs=1)  # one may lie on the threshold
        assert c.merged.value == pytest.approx(sum(merged[i] - start[i] for i in at) / len(at), abs=0.01)
        assert c.base == pytest.approx(sum(merged[i] - base[i] for i in at) / len(at), abs=0.01)
        assert c.mean == pytest.approx(sum(b[i] - start[i] for i in at for b in each) / len(at) / 3, abs=0.01)


def test_what_was_planted_is_found(found: ConsensusRecord, config: Config, recomputed: Any) -> None:
    """In the first round what one teacher alone says is its own gain, and what two say is that of the two."""
    tokenizer = AutoTokenizer.from_pretrained(config.student)
    habits, shared = Counter[str](), Counter[str]()
    for t in SAID:
        own, both = len(tokenizer.tokenize(SAID[t])), len(tokenizer.tokenize(" " + SHARED[t]))
        for k, start in enumerate(recomputed[0, None][t]):
            sets = ["".join(x for x in SAID if recomputed[1, x][t][k][i] - start[i] > 0.1) for i in sorted(start)]
            habits.update("alone" if g == t else g for g in sets[:own])
            if t != "c":
                shared.update(sets[own : own + both])
    assert habits.most_common(1)[0][0] == "alone", habits
    assert shared.most_common(1)[0][0] == "ab", shared
    assert all(found.rounds[0].of(kind) for kind in ("one", "several"))


def test_examples_are_traces_with_their_numbers(found: ConsensusRecord, config: Config, recomputed: Any) -> None:
    data, tokenizer = held_out(config), AutoTokenizer.from_pretrained(config.student)
    assert [e.teacher for e in found.examples] == list(SAID)
    for e in found.examples:
        example = data[e.teacher][0]
        assert e.prompt + "".join(t.text for t in e.tokens) == tokenizer.decode(example.input_ids)
        for position, token in zip(recomputed[0, None][e.teacher][0], e.tokens, strict=True):
            start = recomputed[1, None][e.teacher][0][position]
            changes = [recomputed[2, t][e.teacher][0][position] - start for t in SAID]
            assert token.start == pytest.approx(start, abs=2e-3)
            assert token.branches == pytest.approx(changes, abs=2e-3)
            assert token.merged == pytest.approx(recomputed[2, None][e.teacher][0][position] - start, abs=2e-3)
            assert token.kind == KINDS[int(classes_of(torch.tensor(token.branches)[:, None])[0])]


def check_landscape(config: Config, found: ConsensusRecord, ends: bool) -> None:
    rundir, around = RunDir(Path(config.output)), found.landscape
    begun, done = (rundir.round_record(n) for n in (1, 2))
    assert begun
    assert done
    along = dict(zip(around.update.at, around.update.losses, strict=True))
    assert along[-1.0] == pytest.approx(begun.evaluation.loss, rel=1e-4)
    assert along[0.0] == pytest.approx(done.evaluation.loss, rel=1e-4)
    assert [line.losses[line.at.index(0.0)] for line in around.random] == [along[0.0]] * 2
    names = [t.name for t in config.teachers]
    pairs = [(a, b) for i, b in enumerate(names) for a in names[:i]]
    assert [line.name for line in around.between] == [f"{a} to {b}" for a, b in pairs]
    for (a, b), line in zip(pairs, around.between, strict=True):
        assert line.at == (0, 0.25, 0.5, 0.75, 1)
        for name, loss in ((a, line.losses[0]), (b, line.losses[-1])) if ends else ():
            own = rundir.branch_record(2, name)
            assert own
            assert own.evaluation
            assert loss == pytest.approx(own.evaluation.loss, rel=1e-4)


def test_the_landscape_goes_through_what_the_run_measured(config: Config, found: ConsensusRecord) -> None:
    check_landscape(config, found, ends=True)
    assert len({x for line in (*found.landscape.random, found.landscape.update) for x in line.losses}) == 13


def test_so_it_does_in_four_bits_with_momentum(make_config: Callable[..., Config]) -> None:
    steps = {"steps": 1, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2}
    config = make_config(merge={"momentum": 0.5}, eval={"holdout": 0.2, "branches": False}, branch=steps)
    run(config)
    check_landscape(config, consensus(config.output, traces=99), ends=False)  # a folded branch is rounded


def test_random_directions_are_as_large_as_they_are_said_to_be() -> None:
    one, two = (landscape._random((6, 9), 2, 3.5, seed, torch.device("cpu")) for seed in (0, 1))
    assert one.rank == 2
    assert float(one.delta().norm()) == pytest.approx(3.5)
    assert float((one.delta() * two.delta()).sum()) < 3.5**2 / 2


def test_at_most_so_many_traces_are_looked_at_and_only_once(
    config: Config, found: ConsensusRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = shutil.copytree(config.output, tmp_path / "run")
    stages: list[str] = []

    def watch(stage: str, *_counts: Any, **_numbers: Any) -> None:
        stages.append(stage)

    assert consensus(output, traces=99, progress=watch) == found
    assert not stages
    small = consensus(output, traces=1, progress=watch)
    assert {"confidence", "landscape"} <= set(stages)
    assert (small.traces, small.questions) == (1, 1)
    assert all(c.merged.half is None for r in small.rounds for c in r.classes)
    assert {r.outcome for r in small.rounds} == {"unclear"}
    assert read_consensus(RunDir(output)) == small
    (output / "consensus.json").write_text("{}")
    assert read_consensus(RunDir(output)) is None
    assert consensus(output, traces=1) == small

    def opened(*_: Any) -> None:
        raise UserError("opened")

    monkeypatch.setattr(sys.modules["mot_lora.analysis.consensus"], "_open", opened)
    assert consensus(output, traces=1) == small
    file = output / "round-002" / "round.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UserError, match="opened"):
        consensus(output, traces=1)


def test_what_cannot_be_looked_at_is_told(config: Config, found: ConsensusRecord, tmp_path: Path) -> None:
    def copy(name: str, **changes: Any) -> Path:
        path = tmp_path / name
        shutil.copytree(config.output, path)
        (path / "consensus.json").unlink()
        tree = config.model_dump(mode="json")
        (path / "config.yaml").write_text(json.dumps({**tree, **changes}))
        return path

    assert found
    with pytest.raises(UserError, match="needs two finished rounds; the run has 1"):
        consensus(copy("one", rounds=1))
    with pytest.raises(UserError, match="at least two teachers"):
        consensus(copy("alone", teachers=[config.model_dump(mode="json")["teachers"][0]]))
    with pytest.raises(UserError, match=r"eval\.holdout is 0"):
        consensus(copy("all", eval={"holdout": 0, "data": "asked.jsonl"}, stop={"metric": "accuracy"}))
    with pytest.raises(UserError, match="traces must be at least 1"):
        consensus(copy("none"), traces=0)
    damaged = copy("damaged")
    (damaged / "round-001" / "a" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged"):
        consensus(damaged)
    other = copy("other")
    environment = json.loads((other / "environment.json").read_text())
    environment["inputs"]["student"] = "another"
    (other / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UserError, match="not the model that"):
        consensus(other)
    busy = copy("busy")
    with RunDir(busy).lock(), pytest.raises(UserError, match="the run is in progress"):
        consensus(busy)


# --- the math, by hand -----------------------------------------------------------------------------------


def by_hand(lone_kept: float, agreed_kept: float, noise: float = 0.0, questions: int = 6) -> ConsensusRound:
    """Each question has a token on which both of two branches gain 1, and one on which the first alone does."""
    n = 2 * questions
    both = torch.tensor([1.0, 0.0]).repeat(questions)
    lone = 1 - both
    wobble = noise * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(questions)[:n]
    merged = agreed_kept * both + lone_kept * lone + wobble
    each = torch.stack([both + lone, both])
    return consensus_of(1, torch.full((n,), -2.0), each - 2, merged - 2, torch.full((n,), -3.0), torch.arange(n) // 2)


def test_a_planted_round_has_its_numbers() -> None:
    planted = by_hand(lone_kept=0.25, agreed_kept=0.75)
    assert [c.kind for c in planted.classes] == ["all", "one"]
    agreed, lone = planted.classes
    assert (agreed.tokens, agreed.share, agreed.gain, agreed.mean) == (6, 0.5, 1.0, 1.0)
    assert (lone.tokens, lone.share, lone.gain, lone.mean) == (6, 0.5, 1.0, 0.5)
    assert agreed.p_start == pytest.approx(math.exp(-2))
    assert (agreed.merged.value, agreed.base) == pytest.approx((0.75, 1.75))
    assert (lone.merged.value, lone.base) == pytest.approx((0.25, 1.25))
    assert agreed.kept
    assert lone.kept
    assert (agreed.kept.value, lone.kept.value) == pytest.approx((0.75, 0.25))
    assert planted.difference
    assert planted.difference.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lone", "agreed", "noise", "outcome"),
    [
        (0.0, 1.0, 0.0, "yes"),
        (-0.2, 1.0, 0.05, "yes"),
        (0.4, 1.0, 0.05, "in part"),
        (1.0, 0.5, 0.0, "no"),  # lone gains are kept better
        (0.0, -0.5, 0.0, "no"),  # agreed gains are lost
        (0.3, 0.9, 3.0, "unclear"),
    ],
)
def test_the_claim_can_come_out_false(lone: float, agreed: float, noise: float, outcome: str) -> None:
    planted = by_hand(lone, agreed, noise)
    assert planted.outcome == outcome
    said = finding(planted)
    assert said.startswith(
        {
            "yes": "The claim holds here.",
            "in part": "The claim holds here in part",
            "no": "The claim does not hold here.",
            "unclear": "These traces do not tell",
        }[outcome]
    )
    assert ("which may be chance" in said) == (noise == 3.0 or lone == noise == 0)


def test_too_few_questions_tell_nothing() -> None:
    planted = by_hand(0.0, 1.0, questions=2)
    assert planted.outcome == "unclear"
    assert planted.classes[0].merged == Estimate(value=1.0)
    assert "on too few questions" in finding(planted)


def test_the_interval_of_independent_tokens_is_student_s() -> None:
    start, change = torch.zeros(5), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    part = consensus_of(1, start, torch.ones(2, 5), change, start, torch.arange(5))
    half = 2.776 * float(change.std()) / math.sqrt(5)
    assert part.classes[0].merged.half == pytest.approx(half, rel=0.005)
    # five times the same question is one question, however many tokens
    again = consensus_of(1, start, torch.ones(2, 5), change, start, torch.zeros(5, dtype=torch.int64))
    assert again.classes[0].merged.half is None


numbers = st.floats(-3, 0, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 5), st.integers(1, 30))
def test_every_token_has_one_class(data: st.DataObject, branches: int, n: int) -> None:
    def drawn() -> Tensor:
        return torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n)))

    start, each = drawn(), torch.stack([drawn() for _ in range(branches)])
    part = consensus_of(1, start, each, each.double().mean(0), start, torch.arange(n) % 4)
    assert sum(c.tokens for c in part.classes) == n
    assert sum(c.share for c in part.classes) == pytest.approx(1)
    gains = (each.double() - start.double()).T.tolist()
    counted = [sum(g > 0.1 for g in row) for row in gains]
    for c in part.classes:
        right = {"all": lambda k: k == branches, "none": lambda k: k == 0, "one": lambda k: k == 1}
        fits = right.get(c.kind, lambda k: 1 < k < branches)
        assert c.tokens == sum(map(fits, counted))
        assert c.merged.value == pytest.approx(c.mean, abs=1e-6)  # here the merge is the branches' mean
    turned = consensus_of(1, start, each.flip(0), each.double().mean(0), start, torch.arange(n) % 4)
    assert [(c.kind, c.tokens) for c in turned.classes] == [(c.kind, c.tokens) for c in part.classes]


TOKENIZER = AutoTokenizer.from_pretrained(demo_path("student"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet=st.sampled_from("ab 18\n\u00e9\u5e2b\N{GRINNING FACE}<|>"), max_size=24))
def test_pieces_add_up_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    found = pieces(TOKENIZER, ids)
    assert len(found) == len(ids)
    assert "".join(found) == TOKENIZER.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


# --- the page --------------------------------------------------------------------------------------------

TITLES = ["Agreement by layer and round", "Confidence", "Consensus", "The loss around the last round"]


def titles(page: str) -> list[str]:
    return [title for h, title in Reader(page).headings if h == "h2"]


def line(name: str, at: tuple[float, ...]) -> LossLine:
    return LossLine(name=name, at=at, losses=tuple(1 + x * x for x in at))


def a_record(names: tuple[str, ...] = ("a", "b")) -> ConsensusRecord:
    students = [(0, None), *((n, t) for n in (1, 2) for t in (*names, None))]
    token = TokenRecord(text=names[0], kind="one", start=-1, branches=(0.5,) * len(names), merged=0.25)
    around = (-1.0, -0.5, 0.0, 0.5, 1.0)
    return ConsensusRecord(
        basis=("x", "y"),
        traces=8,
        questions=6,
        branches=names,
        confidence=tuple(
            StudentConfidence(round=n, branch=t, p=dict.fromkeys(names, 0.5), log_p=dict.fromkeys(names, -1.0))
            for n, t in students
        ),
        rounds=(by_hand(0.1, 0.8), by_hand(0.8, 0.1).model_copy(update={"round": 2})),
        examples=(
            ExampleRecord(teacher=names[0], prompt=names[0], tokens=(token, TokenRecord(text="plain")), more=1234),
        ),
        landscape=LandscapeRecord(
            between=(line(f"{names[0]} to {names[1]}", (0, 0.25, 0.5, 0.75, 1)),),
            update=line("along the update", around),
            random=(line("random 1", around),),
        ),
    )


def with_layers(teachers: tuple[str, ...] = ("a", "b")) -> Any:
    record = a_run(teachers=teachers)
    layers = {f"m.layers.{i}": fold() for i in (0, 10, 2)}
    return record.model_copy(update={"rounds": tuple(r.model_copy(update={"layers": layers}) for r in record.rounds)})


def test_the_page_has_the_sections_and_says_what_was_found() -> None:
    page = report(a_page(record=with_layers(), consensus=a_record()))
    assert titles(page)[4:8] == TITLES
    text = section(page, "Consensus").text
    assert "The claim holds here in part" in text
    assert "The claim does not hold here." in text
    assert "Of lone gains it kept 80%, more than the 10% of agreed ones." in text
    assert "1,234 more tokens follow." in text
    assert 'title="log p -1.00 before; a +0.50, b +0.50; merged +0.25">a</span>plain' in page
    rows = section(page, "Confidence").rows
    assert rows[0] == ["student", "mean p", "traces of a", "traces of b"]
    assert rows[2] == ["a alone, round 1", "0.500", "0.500 (-1.00)", "0.500 (-1.00)"]
    assert "0.33" not in section(page, "Agreement by layer").text
    assert "chance gives 0.50" in section(page, "Agreement by layer").text
    assert "D itself lowered it by 1.000" in section(page, "The loss around").text
    assert "No line has a barrier" in section(page, "The loss around").text
    reader = Reader(page)
    ids = [v for k, v in reader.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert [v for k, v in reader.attributes if k in ("src", "href") and v[:1] != "#"] == ["data:,"]


def test_a_page_that_is_older_than_its_run_says_so() -> None:
    older = a_record().model_copy(update={"basis": ("x",)})
    assert report(a_page(consensus=older)).count("Measured after round 1;") == 3
    assert "Measured after" not in report(a_page(consensus=a_record()))


def test_without_held_out_traces_the_page_says_why() -> None:
    page = a_page()
    assert page.data
    none = page.data.model_copy(
        update={"teachers": tuple(t.model_copy(update={"held_out": 0}) for t in page.data.teachers)}
    )
    assert "No traces were held out (eval.holdout)" in report(replace(page, data=none))
    one = page.record.model_copy(update={"rounds": page.record.rounds[:1], "best": 1})
    assert consensus_part(one, none, None) == consensus_part(one, none, a_record()) == ConsensusPart()
    assert not set(TITLES) & set(titles(report(replace(page, record=one, consensus=a_record()))))


def test_nothing_hostile_becomes_markup() -> None:
    names = (HOSTILE, "b")
    reader = Reader(report(a_page(record=with_layers(names), consensus=a_record(names))))
    assert not {"script", "img"} & set(reader.tags)
    assert not {"onerror", "src"} & {k for k, _ in reader.attributes}
    titled = [v for k, v in reader.attributes if k == "title"]
    assert titled == [f"log p -1.00 before; {HOSTILE} +0.50, b +0.50; merged +0.25"]


def test_layers_go_by_number_and_figures_have_their_values() -> None:
    rounds = with_layers().rounds
    assert consensus_charts.layers_in_order(rounds) == ["m.layers.0", "m.layers.2", "m.layers.10"]
    axes = consensus_charts.agreement_by_layer(rounds, "cosine").axes[0]
    assert axes.collections[0].get_array().tolist() == [[0.25] * 3] * 2
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "2", "10"]
    conflict = consensus_charts.agreement_by_layer(rounds, "sign conflict").axes[0]
    assert conflict.collections[0].get_array().tolist() == [[0.4] * 3] * 2
    merged, a, _ = consensus_charts.confidence_of_students(a_record()).axes[0].lines
    assert list(merged.get_xdata()) == [0, 1, 2]
    assert 0.5 < a.get_xdata()[0] < 1
    around = consensus_charts.loss_around(a_record().landscape).axes[0].lines
    assert [str(x.get_label()) for x in around] == ["along the update", "random 1"]


# --- the command -----------------------------------------------------------------------------------------


def test_report_looks_once_and_shows_what_it_found(call: Any, config: Config, tmp_path: Path) -> None:
    output = shutil.copytree(config.output, tmp_path / "run")
    (output / "consensus.json").unlink(missing_ok=True)
    assert call("report", output, "--quick") == (0, f"{output / 'report.html'}\n", "")
    assert titles((output / "report.html").read_text())[4:6] == [TITLES[0], "The update by layer"]
    with RunDir(output).lock():
        status, out, err = call("report", output, "--json")
    assert (status, json.loads(out)) == (0, {"report": str(output / "report.html"), "consensus": None})
    assert "without consensus" in err
    assert "the run is in progress" in err
    status, out, _ = call("report", output, "--traces", 2)
    assert status == 0
    assert out.startswith("consensus, on at most 2 held-out traces a teacher; --quick leaves it out\n")
    assert "landscape" in out
    page = (output / "report.html").read_text()
    assert titles(page)[4:8] == TITLES
    assert read_page(RunDir(output)).consensus
    (output / "report.html").unlink()
    out = call("report", output, "--quick", "--traces", 5, "--json")[1]  # what was found before is shown
    assert json.loads(out) == {"report": str(output / "report.html"), "consensus": str(output / "consensus.json")}
    assert (output / "report.html").read_text() == page
    assert "--traces" in refused(call("report", output, "--traces", 0))


def test_report_of_one_round_is_what_it_was(call: Any, config: Config, tmp_path: Path) -> None:
    output = shutil.copytree(config.output, tmp_path / "run")
    shutil.rmtree(output / "round-002")
    (output / "consensus.json").unlink(missing_ok=True)
    (output / "config.yaml").write_text(json.dumps({**config.model_dump(mode="json"), "rounds": 1}))
    assert call("report", output) == (0, f"{output / 'report.html'}\n", "")
    assert not set(TITLES) & set(titles((output / "report.html").read_text()))
    assert not (output / "consensus.json").exists()
