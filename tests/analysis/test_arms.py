"""The arms of a comparison: that each config is what its name says, and that equal budgets are equal to the step."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mot_lora.analysis.arms import PAPER, Arm, arms, known_arms
from mot_lora.config import Config
from mot_lora.data.dataset import load_data
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.errors import UserError
from mot_lora.reader import demo_path, parse_config

MakeConfig = Callable[..., Config]
ALL = (*PAPER, "validation", "greedy", "noisy", "repeated")
NOISY = {"noisy": {"name": "hasty", "data": "hasty.jsonl", "samples": 9}}
MERGE = {"method": "ties", "density": 0.3, "weights": [3, 1], "scale": {"mlp.*": 2.0}, "momentum": 0.5, "space": "core"}


def config(**changes: Any) -> Config:
    """A config in which no setting that an arm may touch is the default."""
    tree: dict[str, Any] = {
        "student": "s",
        "teachers": [
            {"name": "a", "data": "a.jsonl", "samples": 7, "learning_rate": 2e-3},
            {"name": "b", "data": ["b1.jsonl", "b2.jsonl"], "verified_only": True},
        ],
        "rounds": 3,
        "branch": {"steps": 5, "batch_size": 3, "learning_rate": 1e-3, "warmup": 0.2},
        "lora": {"r": 4, "alpha": 8},
        "quantization": "int8",
        "merge": MERGE,
        "eval": {"data": "q.jsonl", "validation": "v.jsonl", "forgetting": {"old": "o.jsonl"}, "samples": 2}
        | {"temperature": 0.5, "limit": 11},
        "stop": {"metric": "loss", "patience": 1},
        "compare": NOISY,
        "seed": 6,
    }
    return parse_config({**tree, **changes}, "test")


def by_name(c: Config, *names: str) -> dict[str, Arm]:
    """The arms, by their folders."""
    return {arm.folder: arm for arm in arms(c, names or known_arms(c))}


def changed(arm: Arm, c: Config) -> set[str]:
    """The settings in which an arm is not the config, beside those that differ in every arm."""
    a, b = arm.config.model_dump(), c.model_dump()
    every = {"branches": False, "traces": a["eval"]["traces"]}
    assert a["eval"] == {**b["eval"], **every}
    assert a["stop"] == {"metric": "loss", "patience": None}
    assert arm.config.compare.noisy is None
    return {key for key in a if a[key] != b[key]} - {"eval", "stop", "compare"}


def planned(arm: Arm) -> int:
    return arm.config.rounds * len(arm.config.teachers) * (arm.config.branch.steps or 0)


# --- what each is ----------------------------------------------------------------------------------------


def test_the_arms_are_these_in_this_order() -> None:
    assert [(a.name, a.budgets) for a in arms(config(), ALL)] == [
        ("std:a", ("steps",)),
        ("std:a", ("total",)),
        ("std:b", ("steps",)),
        ("std:b", ("total",)),
        ("mtd", ("steps",)),
        ("mtd", ("total",)),
        *((name, ("steps", "total")) for name in ("one_shot", "linear", "ties", "dare_linear", "dare_ties")),
        ("validation", ("steps", "total")),
        ("greedy", ("steps", "total")),
        ("std:hasty", ("steps",)),
        ("mtd+noisy", ("steps",)),
        ("mtd+noisy", ("total",)),
        *((f"{name}+noisy", ("steps", "total")) for name in ("linear", "validation", "greedy")),
        ("linear+repeated", ("steps", "total")),
    ]
    assert [a.name for a in arms(config(), ["linear", "mtd", "base"])] == ["mtd", "mtd", "linear"]
    assert [a.name for a in arms(config())] == [a.name for a in arms(config(), PAPER)]


def test_of_one_budget_there_are_its_arms_alone() -> None:
    for budget in ("steps", "total"):
        found = arms(config(), ALL, [budget])
        assert [a.folder for a in found] == [a.folder for a in arms(config(), ALL) if budget in a.budgets]
    assert {a.budgets for a in arms(config(), ALL, ["total"])} == {("total",), ("steps", "total")}


@pytest.mark.parametrize(("name", "steps"), [("std-a", 5), ("std-a-total", 10), ("std-b", 5), ("std-b-total", 10)])
def test_a_single_teacher_is_that_teacher_and_nothing_else(name: str, steps: int) -> None:
    c = config()
    arm = by_name(c)[name]
    assert arm.config.teachers == tuple(t for t in c.teachers if t.name == name[4])
    assert arm.config.branch.model_dump() == {**c.branch.model_dump(), "steps": steps}
    assert changed(arm, c) == {"teachers", "merge"} | ({"branch"} if steps == 10 else set())
    # one branch: there is nothing to merge
    plain = arm.config.merge
    assert (plain.method, plain.weights, plain.scale, plain.momentum, plain.space) == ("linear", "uniform", 1, 0, None)


@pytest.mark.parametrize(("name", "steps"), [("mtd", 5), ("mtd-total", 10)])
def test_the_union_is_one_teacher_of_all_teachers(name: str, steps: int) -> None:
    c = config()
    arm = by_name(c)[name]
    (union,) = arm.config.teachers
    assert union.members == c.teachers  # each with its own samples and filters
    assert arm.config.branch.steps == steps
    assert changed(arm, c) <= {"teachers", "merge", "branch"}


def test_one_shot_is_one_round_with_all_the_steps_and_the_plain_mean() -> None:
    c = config()
    arm = by_name(c)["one_shot"]
    assert (arm.config.rounds, arm.config.branch.steps) == (1, 15)
    assert arm.config.branch.model_dump() == {**c.branch.model_dump(), "steps": 15}
    assert arm.config.teachers == c.teachers
    merge = arm.config.merge
    assert (merge.method, merge.density, merge.weights) == ("linear", None, (3.0, 1.0))
    assert changed(arm, c) == {"rounds", "branch", "merge"}
    searched = config(merge={"weights": "greedy"})
    assert by_name(searched)["one_shot"].config.merge.weights == "uniform"


def test_the_merges_keep_the_configs_weights_scale_momentum_and_space() -> None:
    c, found = config(), by_name(config())
    own = c.merge.model_dump()
    for name in ("linear", "ties", "dare_linear", "dare_ties"):
        density = None if name == "linear" else 0.3
        assert found[name].config.merge.model_dump() == {**own, "method": name, "density": density}
        assert changed(found[name], c) == (set() if name == "ties" else {"merge"})
    for name in ("validation", "greedy"):
        merge = found[name].config.merge.model_dump()
        assert merge == {**own, "method": "linear", "density": None, "weights": name}
    by_module = config(merge={**MERGE, "density": {"mlp.*": 0.2, ".*": 0.6}})
    assert by_name(by_module)["dare_ties"].config.merge.density == {"mlp.*": 0.2, ".*": 0.6}


def test_methods_that_need_a_density_get_one_where_the_config_has_none() -> None:
    found = by_name(config(merge={}))
    densities = {name: found[name].config.merge.density for name in PAPER[4:8]}
    assert densities == {"linear": None, "ties": 0.5, "dare_linear": 0.5, "dare_ties": 0.5}


def test_a_method_of_ones_own_is_an_arm_as_the_config_has_it() -> None:
    for own in ({"method": "mine:f"}, {"method": "mine:f", "density": 0.2}, {"method": "sce", "density": 0.1}):
        c = config(merge=own)
        arm = by_name(c)[own["method"].replace(":", "-")]
        assert arm.name == own["method"]
        assert arm.config.merge == c.merge  # a function may take no density
        assert by_name(c)["ties"].config.merge.density == own.get("density", 0.5)


def test_the_noisy_teacher_comes_beside_the_others() -> None:
    c = config()
    found, noisy = by_name(c), c.compare.noisy
    assert found["std-hasty"].config.teachers == (noisy,)
    for name in ("mtd+noisy", "mtd+noisy-total"):
        assert found[name].config.teachers[0].members == (*c.teachers, noisy)
    for name, weights in (("linear", "uniform"), ("validation", "validation"), ("greedy", "greedy")):
        arm = found[f"{name}+noisy"]
        assert arm.config.teachers == (*c.teachers, noisy)
        # weights that are given fit the config's own teachers alone
        merge = {**c.merge.model_dump(), "method": "linear", "density": None, "weights": weights}
        assert arm.config.merge.model_dump() == merge
    assert "validation+noisy" not in by_name(config(eval={"data": "q.jsonl"}), "noisy")


def test_a_repeated_teacher_is_the_first_once_more_under_another_name() -> None:
    c = config()
    arm = by_name(c)["linear+repeated"]
    first, second, third = arm.config.teachers
    assert (first, second) == c.teachers
    assert third == c.teachers[0].model_copy(update={"name": third.name})
    assert third.name == "a_again"
    taken = config(teachers=[*c.model_dump()["teachers"], {"name": "A_again", "data": "x.jsonl"}], merge={})
    names = [t.name.casefold() for t in by_name(taken)["linear+repeated"].config.teachers]
    assert len(names) == len(set(names)) == 4


def test_the_loss_is_on_the_same_traces_in_every_arm() -> None:
    c = config()
    assert all(arm.config.eval.traces == c.teachers for arm in arms(c, ALL))
    own = config(eval={"validation": "v.jsonl", "traces": [{"name": "t", "data": "t.jsonl"}]})
    assert all(arm.config.eval.traces == own.eval.traces for arm in arms(own, known_arms(own)))


def test_an_arm_is_placed_without_another_change() -> None:
    for arm in arms(config(), ALL):
        placed = arm.at(Path("here") / arm.folder)
        assert placed.config == arm.config.model_copy(update={"output": f"here/{arm.folder}"})
        assert (placed.name, placed.budgets) == (arm.name, arm.budgets)
        assert re.fullmatch(r"[\w+-]+", arm.folder)


# --- budgets ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 6), st.integers(1, 7), st.integers(1, 200))
def test_equal_budgets_are_equal_to_the_step(k: int, r: int, s: int) -> None:
    teachers = [{"name": f"t{i}", "data": f"{i}.jsonl"} for i in range(k)]
    found = arms(config(teachers=teachers, rounds=r, branch={"steps": s}, merge={}), ALL)
    for arm in found:
        one = arm.name.startswith(("std", "mtd"))
        branches = k + (arm.name.endswith(("+noisy", "+repeated")))
        whole = branches * r * s
        if "total" in arm.budgets:
            assert planned(arm) == whole, arm.folder
        elif one:
            assert planned(arm) == r * s, arm.folder
        # in `steps` no branch of a round is longer than another arm's, but for the one round that is all of them
        if "steps" in arm.budgets:
            steps = r * s if arm.name == "one_shot" else s
            assert arm.config.branch.steps == steps, arm.folder
    names = Counter(arm.name for arm in found if "total" in arm.budgets)
    assert set(names.values()) == {1}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(["a", "A-total", "a-total", "mtd", "b_b", "b-b", "total"]), min_size=2, unique=True))
def test_no_two_arms_share_a_folder(names: list[str]) -> None:
    if len({n.casefold() for n in names}) < len(names):
        return
    teachers = [{"name": n, "data": "x.jsonl"} for n in names]
    c = config(teachers=teachers, merge={})
    if {"a", "a-total"} <= {n.casefold() for n in names}:  # they would
        with pytest.raises(UserError, match=r"^arms .+ would share a folder; rename a teacher$"):
            arms(c, ALL)
        return
    folders = [a.folder.casefold() for a in arms(c, ALL)]
    assert len(folders) == len(set(folders))


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"teachers": [{"name": "a", "data": "x"}], "merge": {}}, PAPER, "a comparison needs at least two teachers"),
        ({"branch": {"epochs": 1}}, PAPER, r"needs branch\.steps instead of branch\.epochs"),
        ({}, ["linaer"], r"unknown arm `linaer`; known arms: base, std, mtd, .+, repeated"),
        ({}, ["std:a"], "unknown arm `std:a`"),
        ({"compare": {}}, ["noisy"], r"arm `noisy` needs compare\.noisy: \{name: \.\.\., data: \.\.\.\} in the config"),
        ({"eval": {"data": "q"}}, ["linear", "validation"], r"arm `validation` needs eval\.validation"),
        ({"eval": {"data": "q"}}, ["greedy"], r"arm `greedy` needs eval\.validation"),
        ({}, ["base"], "needs another arm beside base"),
        ({}, ["mtd", "vote"], "arm `vote` needs arm `std`"),
    ],
)
def test_an_arm_that_cannot_be_is_a_users_mistake(changes: dict[str, Any], names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        arms(config(**changes), names)
    assert "\n" not in str(e.value)


def test_the_arms_that_there_are_follow_from_the_config() -> None:
    assert known_arms(config()) == ALL
    assert known_arms(config(compare={}, eval={"data": "q"}, merge={})) == (*PAPER, "repeated")
    own = known_arms(config(merge={"method": "mine:f"}))
    assert set(own) == {*ALL, "mine:f"}
    assert own.index("mine:f") < own.index("vote")


# --- what an arm trains on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_path("student"))


@pytest.fixture
def mixed(make_config: MakeConfig, tmp_path: Path) -> Config:
    """Teachers whose rows are chosen in ways of their own; some rows are the same."""
    rows = [json.loads(line) for line in Path(make_config().teachers[0].sources[0]).read_text().splitlines()]

    def write(name: str, rows: list[dict[str, str]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    checked = [{**row, "gold": row["answer"]} for row in rows]
    wrong = write("wrong.jsonl", [{**row, "answer": f"1{row['answer']}"} for row in checked])
    named = [{"question": r["question"], "thoughts": "so", "answer": r["answer"]} for r in rows[:9]]
    a = make_config().teachers[0].model_dump(exclude_unset=True)
    return make_config(
        teachers=[
            {**a, "samples": 10, "seed": 4},
            {"name": "same", "data": write("same.jsonl", rows[::2]), "learning_rate": 1.0},
            {"name": "b", "data": [write("checked.jsonl", checked), wrong], "verified_only": True},
            {"name": "named", "data": write("named.jsonl", named), "columns": {"reasoning": "thoughts"}},
        ],
        compare={"noisy": {"name": "wrong", "data": wrong, "samples": 3}},
    )


def test_the_union_trains_on_just_what_the_teachers_train_on(mixed: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    apart = load_data(mixed, tokenizer)
    found = by_name(mixed)
    union = load_data(found["mtd"].config, tokenizer)
    assert union.train.keys() == {"union"}
    together = Counter(e for examples in apart.train.values() for e in examples)
    assert Counter(union.train["union"]) == together
    assert max(together.values()) == 3  # what several teachers say alike counts so often
    (record,) = union.record.teachers
    assert record.used == sum(t.used for t in apart.record.teachers) == together.total()
    assert record.rows == sum(t.rows for t in apart.record.teachers)
    left_out = sum((Counter(t.left_out) for t in apart.record.teachers), Counter[str]())
    assert Counter(record.left_out) == left_out
    assert left_out["not drawn"] > 0
    assert record.tokens == sum(t.tokens for t in apart.record.teachers)
    noisy = load_data(found["mtd+noisy"].config, tokenizer).train["union"]
    more = Counter(noisy) - together
    assert more == Counter(load_data(found["std-wrong"].config, tokenizer).train["wrong"])
    assert 0 < more.total() <= 3


def test_every_arm_trains_and_measures_what_its_teachers_have(
    mixed: Config, tokenizer: PreTrainedTokenizerBase
) -> None:
    apart = load_data(mixed, tokenizer)
    for folder in ("std-a", "std-same-total", "one_shot", "linear+repeated", "linear+noisy"):
        arm = by_name(mixed)[folder]
        data = load_data(arm.config, tokenizer)
        assert data.held_out == apart.held_out  # though most of these teachers are not trained
        assert data.train.keys() == {t.name for t in arm.config.teachers}
        for name in data.train.keys() & apart.train.keys():
            assert data.train[name] == apart.train[name]
        if folder == "linear+repeated":
            assert data.train["a_again"] == data.train["a"]
