"""Configs: what is read, and that every mistake is one line that names the file and the key."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from pydantic import ValidationError

from mot_lora.config import (
    Config,
    EvalConfig,
)
from mot_lora.errors import UserError
from mot_lora.patterns import first_match, for_module
from mot_lora.reader import demo_path, load_config, load_merge, parse_config

MINIMAL: dict[str, Any] = {"student": "Qwen/Qwen3-0.6B", "teachers": [{"name": "a", "data": "a.jsonl"}]}
FULL: dict[str, Any] = {
    "student": "Qwen/Qwen3-0.6B",
    "teachers": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": ["b.jsonl", "c.jsonl"]}],
    "rounds": 3,
    "branch": {"steps": 20, "learning_rate": 2e-4, "schedule": "linear"},
    "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "rslora": True},
    "quantization": "none",
    "merge": {"method": "ties", "density": 0.5, "weights": [1, 2.5], "scale": 0.9},
    "eval": {"data": "test.jsonl", "samples": 4, "temperature": 0.6},
    "stop": {"metric": "accuracy", "patience": 2},
    "seed": 7,
    "output": "out",
}


U: dict[str, Any] = {"name": "u", "data": "u.jsonl"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a tree, or text, as a config file in a folder of its own."""

    def write(tree: Any) -> Path:
        (tmp_path / "recipes").mkdir(exist_ok=True)
        file = tmp_path / "recipes" / "recipe.yaml"
        file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return file

    return write


Write = Callable[[Any], Path]


def message_of(file: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as e:
        load_config(file, overrides)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- reading -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(write: Write) -> None:
    config = load_config(write(FULL))
    assert config.rounds == 3
    assert config.branch.steps == 20
    assert config.branch.learning_rate == 2e-4
    assert config.branch.schedule == "linear"
    assert (config.lora.r, config.lora.alpha, config.lora.rslora) == (8, 16, True)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.quantization == "none"
    merge = {"method": "ties", "density": 0.5, "weights": (1.0, 2.5), "scale": 0.9, "space": None, "momentum": 0.0}
    assert config.merge.model_dump() == merge
    assert (config.eval.samples, config.eval.temperature) == (4, 0.6)
    assert (config.stop.metric, config.stop.patience, config.seed) == ("accuracy", 2, 7)
    assert [t.name for t in config.teachers] == ["a", "b"]


def test_what_is_left_out_has_the_documented_default(write: Write) -> None:
    config = load_config(str(write(MINIMAL)))
    assert config == Config.model_validate({**MINIMAL, "teachers": [{"name": "a", "data": config.teachers[0].data}]})
    merge = {"method": "linear", "density": None, "weights": "uniform", "scale": 1.0, "space": None, "momentum": 0.0}
    assert config.merge.model_dump() == merge
    assert (config.branch.steps, config.branch.epochs, config.quantization) == (50, None, "nf4")


@pytest.mark.parametrize(
    ("said", "weights", "given", "searched"),
    [
        (None, "uniform", None, False),
        ("uniform", "uniform", None, False),
        ("validation", "validation", None, True),
        ("greedy", "greedy", None, True),
        ([1, 0], (1.0, 0.0), (1.0, 0.0), False),
        ([{"mlp.*": 2, "q_proj": 0}, "3"], ({"mlp.*": 2.0, "q_proj": 0.0}, 3.0), (..., 3.0), False),
    ],
    ids=str,
)
def test_weights_are_numbers_or_the_way_to_find_them(
    write: Write, said: Any, weights: Any, given: Any, searched: bool
) -> None:
    tree = {**MINIMAL, "teachers": FULL["teachers"], "merge": {"weights": said, "momentum": 0.9}}
    config = load_config(write({**tree, "eval": {"validation": "dev.jsonl"}}))
    assert config.merge.weights == weights
    assert (config.merge.given is None, config.merge.searched) == (given is None, searched)
    assert config.merge.given in (None, weights)
    assert config.merge.momentum == 0.9
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_unions_hold_teachers_and_unions(write: Write) -> None:
    inner = [{"name": "x", "data": ["x1.jsonl", "x2.jsonl"], "samples": 3}, {**U, "verified_only": True}]
    union = {"name": "all", "union": [{"name": "two", "union": inner}, {"name": "z", "data": "z.jsonl"}]}
    config = load_config(write({**MINIMAL, "teachers": [{**union, "learning_rate": 1e-3}]}))
    (teacher,) = config.teachers
    assert [(m.name, m.samples, m.verified_only) for m in teacher.members] == [
        ("x", 3, False),
        ("u", None, True),
        ("z", None, False),
    ]
    assert [Path(s).name for s in teacher.sources] == ["x1.jsonl", "x2.jsonl", "u.jsonl", "z.jsonl"]
    assert teacher.members[0].members == (teacher.members[0],)
    assert teacher.learning_rate == 1e-3
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_epochs_take_the_place_of_steps(write: Write) -> None:
    branch = load_config(write({**MINIMAL, "branch": {"epochs": 1.5}})).branch
    assert (branch.steps, branch.epochs) == (None, 1.5)
    branch = load_config(write({**MINIMAL, "branch": {"epochs": None}})).branch
    assert (branch.steps, branch.epochs) == (50, None)


def test_a_teacher_says_what_is_read_of_it(write: Write) -> None:
    teacher = {
        "name": "a",
        "data": "owner/name",
        "split": "train[:10]",
        "subset": "main",
        "columns": {"question": "Frage", "gold": "answer"},
        "samples": 7,
        "seed": 3,
        "verified_only": True,
        "learning_rate": "5e-5",  # YAML reads 5e-5 as text
    }
    tree = {**MINIMAL, "teachers": [teacher, {"name": "b", "data": "b.jsonl"}]}
    tree["eval"] = {"data": "x.jsonl", "split": "test", "subset": "s", "columns": {"gold": "g"}, "overlap": 8}
    tree |= {"branch": {"save_steps": 5, "report_to": "wandb"}, "trust_remote_code": True}
    config = load_config(write(tree))
    assert config.teachers[0].model_dump() == {**teacher, "learning_rate": 5e-5, "union": (), "on_bad_row": "skip"}
    plain = config.teachers[1]
    assert (plain.split, plain.subset, plain.columns, plain.samples, plain.seed) == (None, None, {}, None, None)
    assert (plain.verified_only, plain.learning_rate) == (False, None)
    assert (config.eval.split, config.eval.subset, config.eval.columns) == ("test", "s", {"gold": "g"})
    assert (config.eval.overlap, config.branch.save_steps, config.trust_remote_code) == (8, 5, True)
    assert config.branch.report_to == ("wandb",)
    assert load_config(write({**MINIMAL, "branch": {"report_to": ["trackio", "tensorboard"]}})).branch.report_to == (
        "trackio",
        "tensorboard",
    )
    default = load_config(write(MINIMAL))
    assert (default.branch.report_to, default.branch.save_steps, default.eval.overlap) == ((), None, 13)
    assert default.trust_remote_code is False
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_config_survives_being_written_and_read(write: Write) -> None:
    config = load_config(write(FULL))
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_config_is_frozen(write: Write) -> None:
    config = load_config(write(MINIMAL))
    with pytest.raises(ValidationError):
        config.rounds = 9  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({}, "loss"),
        ({"eval": {"data": "x.jsonl"}}, "accuracy"),
        ({"eval": {"data": "x.jsonl"}, "stop": {"metric": "loss"}}, "loss"),
        ({"eval": {"data": "x.jsonl", "holdout": 0}}, "accuracy"),
    ],
)
def test_the_metric_follows_what_is_measured(write: Write, changes: dict[str, Any], metric: str) -> None:
    assert load_config(write({**MINIMAL, **changes})).metric == metric


# --- settings by module ------------------------------------------------------------------------------


def test_a_merge_may_differ_by_module_and_be_a_function_of_ones_own(write: Write) -> None:
    merge = {
        "method": "my.merges:largest",
        "weights": [1, {"mlp.*": 2, "q_proj": 0}],
        "density": {r"layers\.\d+\.mlp": 0.25},
        "scale": {"lm_head": 1.5},
        "space": "core",
    }
    config = load_config(write({**FULL, "merge": merge}))
    assert config.merge.method == "my.merges:largest"
    assert config.merge.weights == (1.0, {"mlp.*": 2.0, "q_proj": 0.0})
    assert config.merge.density == {r"layers\.\d+\.mlp": 0.25}
    assert config.merge.scale == {"lm_head": 1.5}
    assert config.merge.space == "core"
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config
    # which pattern comes first counts, and survives
    both: Any = {"b.*": 1.0, "a.*": 2.0}
    config = load_config(write(yaml.safe_dump({**MINIMAL, "merge": {"scale": both}}, sort_keys=False)))
    assert list(config.merge.model_dump()["scale"]) == ["b.*", "a.*"]


def test_a_function_of_ones_own_may_take_a_density_or_not() -> None:
    for density in (None, 0.5, {"a": 0.5}):
        merge = parse_config({**MINIMAL, "merge": {"method": "mine:f", "density": density}}, "x").merge
        assert merge.density == density


def test_the_first_pattern_that_matches_counts_and_no_match_is_the_default() -> None:
    setting = {"mlp.up_proj": 1.0, "mlp.*": 2.0, ".*": 3.0}
    assert for_module(setting, "model.layers.0.mlp.up_proj") == 1
    assert for_module(setting, "model.layers.0.mlp.down_proj") == 2
    assert for_module(setting, "lm_head") == 3
    assert for_module({"mlp.*": 2.0}, "lm_head") == 1
    assert for_module({"mlp.*": 2.0}, "lm_head", 0.5) == 0.5
    assert for_module(0.25, "lm_head") == 0.25


SEGMENTS = ["model", "layers", "0", "1", "10", "mlp", "self_attn", "q_proj", "kq_proj", "proj", "lm_head"]
names = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5).map(".".join)
EXPRESSIONS = ["q_proj|kq_proj", "proj|lm_head", "(k|q)_proj", r"layers\.\d+\..*", ".*", ".*proj", "l.*d", r"\d"]
EXPRESSIONS += ["[01]", "[^.]+", "", "^model.*", "q_pro.", "mlp.q_proj", "layers.1"]
expressions = st.sampled_from(EXPRESSIONS)
suffixes = st.tuples(names, st.integers(0, 30)).map(lambda x: x[0][x[1] % len(x[0]) :])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(names, st.lists(names | expressions | suffixes, max_size=4))
def test_a_pattern_means_what_it_means_in_pefts_rank_pattern(name: str, patterns: list[str]) -> None:
    found = first_match(patterns, name)
    assert (name if found is None else found) == get_pattern_key(patterns, name)


def test_every_pattern_alone_means_what_it_means_in_pefts_rank_pattern() -> None:
    for n in (1, 2, 3):
        for name in map(".".join, itertools.product(SEGMENTS, repeat=n)):
            for pattern in EXPRESSIONS:
                assert (first_match([pattern], name) is not None) == (get_pattern_key([pattern, ".*"], name) == pattern)


# --- a merge alone -----------------------------------------------------------------------------------


def test_a_merge_spec_is_the_merge_part_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text("method: ties\ndensity: {'mlp.*': 0.3, '.*': 0.5}\nweights: [1, {q_proj: 2}]\nspace: knots\n")
    spec = load_merge(file)
    config = parse_config({**MINIMAL, "teachers": FULL["teachers"], "merge": yaml.safe_load(file.read_text())}, "x")
    assert {**spec.model_dump(), "momentum": 0.0} == config.merge.model_dump()
    other = load_merge(
        str(file), density="0.25", scale="q_proj=2,mlp.*=3", weights=[1, 1, 1], method=None, space="core"
    )
    assert (other.density, other.scale, other.weights) == (0.25, {"q_proj": 2.0, "mlp.*": 3.0}, (1, 1, 1))
    assert (other.method, other.space) == ("ties", "core")
    assert load_merge() == load_merge(method=None)
    assert load_merge(method="sce", density=0.5).density == 0.5
    assert load_merge(method="sce", density={"q_proj": 0.5}).density == {"q_proj": 0.5}
    assert load_merge(scale=r"layers\.(0|1)\..*=2").scale == {r"layers\.(0|1)\..*": 2.0}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "tie"}, ["merge: `method`", "`tie`"]),
        ({"method": "ties"}, ["merge: method `ties` needs a `density`"]),
        ({"density": "0.5"}, ["merge: method `linear` takes no `density`"]),
        ({"method": "ties", "density": "half"}, ["density 'half'", "PATTERN=NUMBER"]),
        ({"method": "ties", "density": "mlp=half"}, ["density 'mlp=half'", "PATTERN=NUMBER"]),
        ({"method": "ties", "density": "mlp=.5,"}, ["density 'mlp=.5,'", "PATTERN=NUMBER"]),
        ({"method": "ties", "density": "mlp=2"}, ["merge: `density`", "not 2.0"]),
        ({"scale": "q(=2"}, ["merge: `scale`", "`q(`"]),
        ({"scale": "nan"}, ["merge: `scale`", "finite"]),
        ({"scale": ""}, ["scale ''", "PATTERN=NUMBER"]),
        ({"scale": "0"}, ["merge: `scale`", "not be 0"]),
        ({"weights": [{"q(": -1}]}, ["merge: `weights.0`", "`q(`"]),
        ({"weights": "greedy"}, ["merge: `weights`", "tuple"]),
        ({"momentum": 0.5}, ["merge: `momentum` is not a setting"]),
        ({"space": "cor"}, ["merge: `space`", "'core'"]),
        ({"desnity": 1}, ["merge: `desnity` is not a setting", "`density`"]),
    ],
    ids=str,
)
def test_each_mistake_of_a_merge_spec_is_named(given: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as e:
        load_merge(**given)
    assert all(n in str(e.value) for n in named), str(e.value)
    assert "\n" not in str(e.value)


def test_a_merge_spec_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    for text, named in (("[1", "not YAML"), ("- 1", "key: value"), ("methd: ties", "did you mean `method`?")):
        file.write_text(text)
        with pytest.raises(UserError, match=named) as e:
            load_merge(file)
        assert str(file) in str(e.value)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_merge(tmp_path / "none.yaml")


# --- paths -------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = {**FULL, "student": "../student"}
    tree["teachers"] = [{"name": "a", "data": "../data/a.jsonl"}, {"name": "b", "data": ["b.jsonl", "/abs/c.jsonl"]}]
    (tmp_path / "student").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = write(tree)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (file, Path("../recipes/recipe.yaml")):
        config = load_config(path)
        assert config.student == str(tmp_path / "student")
        assert config.teachers[0].sources == (str(tmp_path / "data" / "a.jsonl"),)
        assert config.teachers[1].sources == (str(tmp_path / "recipes" / "b.jsonl"), "/abs/c.jsonl")
        assert config.eval.data == str(tmp_path / "recipes" / "test.jsonl")


def test_the_output_is_in_the_working_folder(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write({**MINIMAL, "output": "runs/one"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(load_config(file).output).resolve() == tmp_path / "elsewhere" / "runs" / "one"
    assert Path(load_config(file, ["output=two"]).output).resolve() == tmp_path / "elsewhere" / "two"


def test_paths_of_overrides_are_relative_to_the_working_folder(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(FULL)
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(
        file, ["eval.data=x.jsonl", "student=model", "teachers=[{name: z, data: y.jsonl}]", "merge={}"]
    )
    assert config.eval.data == str(tmp_path / "elsewhere" / "x.jsonl")
    assert config.student == str(tmp_path / "elsewhere" / "model")
    assert config.teachers[0].sources == (str(tmp_path / "elsewhere" / "y.jsonl"),)


def test_a_student_that_is_no_folder_is_a_name_on_the_hub(write: Write) -> None:
    assert load_config(write(MINIMAL)).student == "Qwen/Qwen3-0.6B"
    assert load_config(write(MINIMAL), ["student=Qwen/Qwen3-8B"]).student == "Qwen/Qwen3-8B"


def test_a_name_on_the_hub_in_the_file_is_not_looked_up_in_the_working_folder(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(MINIMAL)
    (tmp_path / "elsewhere" / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(file).student == "Qwen/Qwen3-0.6B"


def test_demo_paths_are_files_of_the_package(write: Write) -> None:
    tree = {**MINIMAL, "student": "demo:student", "eval": {"data": "demo:heldout.jsonl"}}
    tree["teachers"] = [{"name": "a", "data": "demo:teachers/steps.jsonl"}]
    config = load_config(write(tree))
    assert config.student == str(demo_path("student"))
    assert Path(config.student).is_dir()
    assert config.teachers[0].sources == (str(demo_path("teachers/steps.jsonl")),)
    assert config.eval.data == str(demo_path("heldout.jsonl"))
    assert load_config(write(MINIMAL), ["student=demo:student"]).student == config.student


HUB = ["open-r1/OpenR1-Math-220k", "gsm8k", "owner/name.v1.2", "my_org/data-set"]
FILES = [
    "traces/qwq.jsonl",
    "qwq.jsonl",
    "a/b/c",
    "./data",
    "../data",
    "x.parquet",
    "x.csv.gz",
    "a b",
    "owner/name/",
    "x.txt",
]


def test_data_may_be_on_the_hub_and_a_path_is_one_also_where_nothing_is(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = {**MINIMAL, "teachers": [{"name": "a", "data": [*HUB, *FILES]}], "eval": {"data": HUB[0]}}
    file = write(tree)
    (tmp_path / "elsewhere" / HUB[0]).mkdir(parents=True)  # of the working folder, which the file knows nothing of
    monkeypatch.chdir(tmp_path / "elsewhere")
    for overrides in ((), ("rounds=2",), ("eval.limit=3",), ("eval.limit=3", "eval.batch_size=2")):
        config = load_config(file, overrides)
        sources = config.teachers[0].sources
        assert sources[: len(HUB)] == tuple(HUB)
        assert sources[len(HUB) :] == tuple(str((tmp_path / "recipes" / f).resolve()) for f in FILES)
        assert config.eval.data == HUB[0]
    assert load_config(file, [f"eval.data={HUB[0]}"]).eval.data == str(tmp_path / "elsewhere" / HUB[0])
    assert load_config(file, [f"eval={{data: {HUB[1]}}}"]).eval.data == HUB[1]
    # what is there beside the file is meant
    (tmp_path / "recipes" / "gsm8k").mkdir()
    assert load_config(file).teachers[0].sources[1] == str(tmp_path / "recipes" / "gsm8k")


def paths_in(tree: dict[str, Any], path: Callable[[str], str]) -> dict[str, Any]:
    """A config with every key that names data, each made by `path` from a word."""

    def teacher(word: str) -> dict[str, Any]:
        return {"name": word, "data": path(word)}

    return {
        **tree,
        "teachers": [
            {"name": "all", "union": [teacher("one"), {"name": "more", "union": [teacher("two"), teacher("three")]}]},
            {"name": "joined", "data": [path("four"), path("five")]},
        ],
        "eval": {
            "data": path("six"),
            "validation": path("seven"),
            "forgetting": {"short": path("eight"), "the-long": path("nine")},
            "traces": [teacher("ten"), {"name": "both", "union": [teacher("eleven")]}],
        },
        "compare": {"noisy": teacher("twelve")},
    }


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def data_of(config: Config) -> list[str]:
    """What is read, in the order of WORDS."""
    e, noisy = config.eval, config.compare.noisy
    assert e.data
    assert e.validation
    assert noisy
    asked = [e.data, e.validation, *e.forgetting.values()]
    traces = [s for t in e.traces for s in t.sources]
    return [*(s for t in config.teachers for s in t.sources), *asked, *traces, *noisy.sources]


def test_every_key_that_names_data_is_a_path_from_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    file = write(paths_in(MINIMAL, lambda word: f"../data/{word}.jsonl"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert data_of(load_config(file)) == [str(tmp_path / "data" / f"{word}.jsonl") for word in WORDS]
    for prefix, becomes in (("demo:", f"{demo_path()}/"), ("reasoning_gym:", "reasoning_gym:"), ("hub/", "hub/")):
        config = load_config(write(paths_in(MINIMAL, lambda word, prefix=prefix: prefix + word)))
        assert data_of(config) == [becomes.replace("//", "/") + word for word in WORDS]
        assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config
    said = [
        "teachers.0.union.1.union.0.data=x.jsonl",
        "eval.validation=y.jsonl",
        "eval.forgetting.short=demo:short.jsonl",
        "eval.traces.0.data=z.jsonl",
        "compare.noisy.data=reasoning_gym:chain_sum:7",
    ]
    got = data_of(load_config(file, said))
    here = tmp_path / "elsewhere"
    assert [got[WORDS.index(w)] for w in ("two", "seven", "eight", "ten", "twelve")] == [
        str(here / "x.jsonl"),
        str(here / "y.jsonl"),
        str(demo_path("short.jsonl")),
        str(here / "z.jsonl"),
        "reasoning_gym:chain_sum:7",
    ]


def test_home_is_known(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(write({**MINIMAL, "eval": {"data": "~/test.jsonl"}}))
    assert config.eval.data == str(tmp_path / "home" / "test.jsonl")


# --- overrides ---------------------------------------------------------------------------------------


def test_overrides_reach_inner_keys_and_hold_yaml(write: Write) -> None:
    file = write(FULL)
    config = load_config(
        file,
        [
            "rounds=9",
            "branch.learning_rate=3e-5",
            "branch.steps=null",
            "branch.epochs=2",
            "merge.weights=[3, 4]",
            "eval.data=a=b.jsonl",
            "lora.rslora=false",
        ],
    )
    assert (config.rounds, config.branch.learning_rate, config.branch.epochs) == (9, 3e-5, 2)
    assert config.merge.weights == (3, 4)
    assert config.merge.density == 0.5
    assert config.eval.data is not None
    assert config.eval.data.endswith("/a=b.jsonl")
    assert config.lora.rslora is False
    assert load_config(file, ["rounds=1", "rounds=2"]).rounds == 2


def test_overrides_reach_into_lists_by_number(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        write(FULL),
        ["teachers.0.name=z", "teachers.1.data.0=x.jsonl", "teachers.1.columns.gold=y", "merge.weights.1=9"],
    )
    assert [t.name for t in config.teachers] == ["z", "b"]
    assert config.teachers[1].sources == (str(tmp_path / "x.jsonl"), str(tmp_path / "recipes" / "c.jsonl"))
    assert config.teachers[1].columns == {"gold": "y"}
    assert config.merge.weights == (1, 9)


def test_overrides_make_groups_that_the_file_lacks(write: Write) -> None:
    assert load_config(write(MINIMAL), ["branch.steps=3", "branch.batch_size=2"]).branch.steps == 3


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rounds", ["`rounds`", "not key=value"]),
        ("=3", ["`=3`", "not key=value"]),
        ("rounds.x=3", ["`rounds.x=3`", "`rounds` has no inner keys"]),
        ("teachers.2.name=z", ["`teachers.2.name=z`", "`2` is not one of 0 to 1"]),
        ("teachers.-1.name=z", ["`-1` is not one of 0 to 1"]),
        ("teachers.+1.name=z", ["`+1` is not one of 0 to 1"]),
        ("teachers.a.name=z", ["`a` is not one of 0 to 1"]),
        (f"teachers.{'9' * 5000}.name=z", ["is not one of 0 to 1"]),
        ("teachers.0.name.first=z", ["`name` has no inner keys"]),
        ("teachers.0.name=b", ["twice: b"]),
        ("rounds=[1", ["`rounds=[1`", "not YAML"]),
        ("rounds=!!int ", ["`rounds=!!int `", "not YAML"]),
        ("branch.max_lenght=3", ["`branch.max_lenght`", "did you mean `max_length`?"]),
        ("rounds=2026-13-45", ["rounds"]),
        ("seed=0x_", ["seed"]),
        ("rouds=3", ["recipe.yaml", "`rouds`", "`rounds`"]),
        ("branch.step=3", ["recipe.yaml", "`branch.step`", "`steps`"]),
        ("rounds=three", ["recipe.yaml", "`rounds`"]),
    ],
)
def test_wrong_overrides_are_named(write: Write, override: str, named: list[str]) -> None:
    message = message_of(write(FULL), (override,))
    assert all(n in message for n in named), message


# --- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rouds": 3}, ["`rouds` is not a setting", "did you mean `rounds`?"]),
        ({"branch": {"lerning_rate": 1}}, ["`branch.lerning_rate`", "did you mean `learning_rate`?"]),
        ({"merge": {"desnity": 1}}, ["`merge.desnity`", "did you mean `density`?"]),
        ({"lora": {"alhpa": 1}}, ["`lora.alhpa`", "did you mean `alpha`?"]),
        ({"eval": {"tempreature": 1}}, ["`eval.tempreature`", "did you mean `temperature`?"]),
        ({"stop": {"patients": 1}}, ["`stop.patients`", "did you mean `patience`?"]),
        ({"teachers": [{"name": "a", "date": "x"}]}, ["teachers.0.date", "did you mean `data`?"]),
        ({"teachers": [{"name": "a", "data": "x", "dat": "x"}]}, ["`teachers.0.dat`", "did you mean `data`?"]),
        ({"stop": {"zzzzzz": 1}}, ["`stop.zzzzzz`", "metric, patience"]),
        ({"eval": {"data": "x", "final": {"ruond": "last"}}}, ["`eval.final.ruond`", "did you mean `round`?"]),
        ({"branch": {"steps": 3, "epochs": 1}}, ["`branch`", "either `steps` or `epochs`"]),
        ({"branch": {"steps": None}}, ["`branch`", "either `steps` or `epochs`"]),
        ({"branch": {"steps": 0}}, ["`branch.steps`", "greater than or equal to 1"]),
        ({"branch": {"epochs": 0}}, ["`branch.epochs`", "greater than 0"]),
        ({"branch": {"warmup": 1}}, ["`branch.warmup`", "less than 1"]),
        ({"branch": {"schedule": "step"}}, ["`branch.schedule`", "'cosine'"]),
        ({"branch": {"learning_rate": float("inf")}}, ["`branch.learning_rate`", "finite"]),
        ({"branch": {"learning_rate": "1 e-4"}}, ["`branch.learning_rate`", "number"]),
        ({"branch": None}, ["`branch`"]),
        ({"lora": {"r": 0}}, ["`lora.r`"]),
        ({"lora": {"r": 2.5}}, ["`lora.r`", "integer"]),
        ({"lora": {"alpha": 0}}, ["`lora.alpha`"]),
        ({"quantization": "int4"}, ["`quantization`", "'nf4', 'int8' or 'none'"]),
        ({"merge": {"method": "tie"}}, ["`merge.method`", "`tie`", " ties, ", "sce", "module:function"]),
        ({"merge": {"method": "mine.f"}}, ["`merge.method`", "`mine.f`", "module:function"]),
        ({"merge": {"method": "a b:f"}}, ["`merge.method`", "`a b:f`"]),
        ({"merge": {"method": "tie\ns"}}, ["`merge.method`", "tie s"]),
        ({"merge": {"method": 3}}, ["`merge.method`", "string"]),
        *(
            ({"merge": {"method": m}}, ["`merge`", f"`{m}` needs a `density`"])
            for m in ("ties", "dare_linear", "dare_ties", "della", "sce")
        ),
        ({"merge": {"space": "coer"}}, ["`merge.space`", "'core' or 'knots'"]),
        ({"merge": {"density": 0.5}}, ["`merge`", "`linear` takes no `density`"]),
        ({"merge": {"density": {"mlp.*": 0.5}}}, ["`merge`", "`linear` takes no `density`"]),
        ({"merge": {"method": "ties", "density": 0}}, ["`merge.density`", "must be in (0, 1], not 0"]),
        ({"merge": {"method": "ties", "density": 1.1}}, ["`merge.density`", "must be in (0, 1], not 1.1"]),
        ({"merge": {"method": "mine:f", "density": -1}}, ["`merge.density`", "must be in (0, 1], not -1"]),
        ({"merge": {"method": "ties", "density": {"a": 0.5, "b": 2}}}, ["`merge.density`", "(0, 1], not 2"]),
        ({"merge": {"method": "ties", "density": {"(": 0.5}}}, ["`merge.density`", "`(`", "pattern"]),
        ({"merge": {"method": "ties", "density": {"a": "x"}}}, ["`merge.density.a`", "number"]),
        ({"merge": {"scale": {"a)(b": 1}}}, ["`merge.scale`", "`a)(b`", "pattern"]),
        ({"merge": {"scale": {"(?i)q_proj": 1}}}, ["`merge.scale`", "`(?i)q_proj`", "pattern"]),
        ({"merge": {"scale": {"a{99999999999}": 1}}}, ["`merge.scale`", "`a{99999999999}`", "pattern"]),
        ({"merge": {"scale": {"[\n": 1}}}, ["`merge.scale`", "pattern"]),
        ({"merge": {"scale": {"a": 0}}}, ["`merge.scale`", "above 0"]),
        ({"merge": {"scale": -1}}, ["`merge.scale`", "above 0"]),
        ({"merge": {"scale": {"a": float("inf")}}}, ["`merge.scale.a`", "finite"]),
        ({"merge": {"weights": [{"a": -1}]}}, ["`merge.weights", "negative"]),
        ({"merge": {"weights": [{"+": 1}]}}, ["`merge.weights", "`+`", "pattern"]),
        ({"merge": {"weights": [{"a": "x"}]}}, ["`merge.weights.0.a`", "number"]),
        ({"merge": {"weights": [{"a": 1}, 1]}}, ["merge.weights", "2 numbers for 1 teachers"]),
        ({"merge": {"weights": [1, 2]}}, ["merge.weights", "2 numbers for 1 teachers"]),
        ({"merge": {"weights": [-1]}}, ["merge.weights", "must not be negative, but one is -1"]),
        ({"merge": {"weights": [0]}}, ["merge.weights", "all 0"]),
        ({"merge": {"weights": [float("nan")]}}, ["merge.weights", "finite"]),
        ({"merge": {"weights": [float("inf")]}}, ["merge.weights", "finite"]),
        ({"merge": {"weights": ["x"]}}, ["merge.weights"]),
        ({"merge": {"weights": "greed"}}, ["`merge.weights`", "'uniform', 'validation' or 'greedy'"]),
        ({"merge": {"weights": 3}}, ["`merge.weights`", "tuple"]),
        ({"merge": {"weights": []}}, ["merge.weights", "0 numbers for 1 teachers"]),
        *(
            ({"merge": {"weights": w}, "eval": {"data": "x"}}, [f"merge.weights `{w}` needs `eval.validation`"])
            for w in ("validation", "greedy")
        ),
        ({"merge": {"momentum": 1}}, ["`merge.momentum`", "less than 1"]),
        ({"merge": {"momentum": -0.1}}, ["`merge.momentum`", "greater than or equal to 0"]),
        ({"merge": {"momentum": {"mlp": 0.5}}}, ["`merge.momentum`", "number"]),
        ({"merge": {"momntum": 0.5}}, ["`merge.momntum`", "did you mean `momentum`?"]),
        ({"eval": {"validatoin": "x"}}, ["`eval.validatoin`", "did you mean `validation`?"]),
        ({"eval": {"validation": ["a", "b"]}}, ["`eval.validation`", "string"]),
        ({"eval": {"forgetting": "x.jsonl"}}, ["`eval.forgetting`", "dictionary"]),
        ({"eval": {"forgetting": {"a/b": "x"}}}, ["`eval.forgetting.a/b`", "letters, digits"]),
        ({"eval": {"forgetting": {"a": ["x"]}}}, ["`eval.forgetting.a`", "string"]),
        ({"eval": {"traces": [{"name": "a"}]}}, ["`eval.traces.0`", "teacher `a` needs `data`"]),
        ({"eval": {"traces": [{**U, "nmae": "x"}]}}, ["`eval.traces.0.nmae`", "did you mean `name`?"]),
        ({"eval": {"traces": [U, {**U, "data": "z"}]}}, ["`eval.traces`", "twice: u"]),
        ({"compare": {"niosy": U}}, ["`compare.niosy`", "did you mean `noisy`?"]),
        ({"compare": {"noisy": {**U, "sample": 3}}}, ["`compare.noisy.sample`", "did you mean `samples`?"]),
        ({"compare": {"noisy": "x.jsonl"}}, ["`compare.noisy`"]),
        ({"compare": {"noisy": {"name": "A", "data": "x"}}}, ["compare.noisy", "`A` is also a teacher"]),
        ({"merge": {"scale": 0}}, ["`merge.scale`"]),
        ({"merge": {"scale": float("inf")}}, ["`merge.scale`", "finite"]),
        ({"eval": {"samples": 4}}, ["`eval`", "`samples`", "`temperature`"]),
        ({"eval": {"top_p": 0}}, ["`eval.top_p`"]),
        ({"eval": {"holdout": 1}}, ["`eval.holdout`"]),
        ({"eval": {"temperature": -1}}, ["`eval.temperature`"]),
        ({"stop": {"metric": "accuracy"}}, ["stop.metric", "needs `eval.data`"]),
        ({"stop": {"metric": "loss"}, "eval": {"holdout": 0}}, ["stop.metric", "`eval.holdout`"]),
        ({"eval": {"holdout": 0}}, ["stop.metric", "`eval.holdout`"]),
        ({"stop": {"patience": 0}}, ["`stop.patience`"]),
        ({"teachers": []}, ["`teachers`", "at least one"]),
        ({"teachers": "a.jsonl"}, ["`teachers`"]),
        ({"teachers": ["a.jsonl"]}, ["`teachers.0`"]),
        ({"teachers": [{"name": "a"}]}, ["`teachers.0`", "teacher `a` needs `data`, or a `union`"]),
        ({"teachers": [{"name": "a/b", "data": "x"}]}, ["`teachers.0.name`"]),
        ({"teachers": [{"name": "..", "data": "x"}]}, ["`teachers.0.name`"]),
        ({"teachers": [{"name": "-x", "data": "x"}]}, ["`teachers.0.name`"]),
        ({"teachers": [{"name": "", "data": "x"}]}, ["`teachers.0.name`"]),
        ({"teachers": [{"name": "a\n", "data": "x"}]}, ["`teachers.0.name`"]),
        ({"teachers": [{"name": "a", "data": "x"}, {"name": "a", "data": "y"}]}, ["`teachers`", "twice: a"]),
        ({"teachers": [{"name": "a", "data": "x"}, {"name": "A", "data": "y"}]}, ["`teachers`", "twice: a"]),
        ({"teachers": [{"name": "Straße", "data": "x"}]}, ["`teachers.0.name`", "letters, digits"]),
        ({"teachers": [{"name": "a.b", "data": "x"}]}, ["`teachers.0.name`", "`a.b` also names a folder"]),
        ({"teachers": [{"name": 7, "data": "x"}]}, ["`teachers.0.name`", "string"]),
        ({"teachers": [{"name": "a", "data": []}]}, ["`teachers.0`", "teacher `a` needs `data`, or a `union`"]),
        ({"teachers": [{"name": "a", "data": "x", "union": [U]}]}, ["`teachers.0`", "and not both"]),
        ({"teachers": [{"name": "a", "union": []}]}, ["`teachers.0`", "teacher `a` needs `data`"]),
        ({"teachers": [{"name": "a", "union": [{"name": "b"}]}]}, ["`teachers.0.union.0`", "teacher `b` needs"]),
        ({"teachers": [{"name": "a", "union": [{**U, "name": "."}]}]}, ["`teachers.0.union.0.name`"]),
        ({"teachers": [{"name": "a", "union": [{**U, "sampels": 3}]}]}, ["union.0.sampels", "mean `samples`?"]),
        *(
            ({"teachers": [{"name": "a", "union": [U], **how}]}, ["`teachers.0`", "`a` is a union", "each of its"])
            for how in (
                {"samples": 3},
                {"verified_only": True},
                {"split": "train"},
                {"subset": "main"},
                {"columns": {"gold": "x"}},
            )
        ),
        ({"teachers": [{"name": "a", "data": {"x": "y"}}]}, ["teachers.0.data"]),
        ({"teachers": [{"name": "a", "data": ["x", 7]}]}, ["teachers.0.data"]),
        ({"teachers": [{"name": "a", "data": "x", "samples": 0}]}, ["`teachers.0.samples`", "1"]),
        ({"teachers": [{"name": "a", "data": "x", "samples": 1.5}]}, ["`teachers.0.samples`", "integer"]),
        ({"teachers": [{"name": "a", "data": "x", "seed": "x"}]}, ["`teachers.0.seed`", "integer"]),
        ({"teachers": [{"name": "a", "data": "x", "verified_only": "often"}]}, ["`teachers.0.verified_only`", "bool"]),
        ({"teachers": [{"name": "a", "data": "x", "learning_rate": 0}]}, ["`teachers.0.learning_rate`"]),
        ({"teachers": [{"name": "a", "data": "x", "verified": True}]}, ["did you mean `verified_only`?"]),
        ({"teachers": [{"name": "a", "data": "x", "spilt": "t"}]}, ["`teachers.0.spilt`", "did you mean `split`?"]),
        ({"teachers": [{"name": "a", "data": "x", "columns": {"gold": 3}}]}, ["`teachers.0.columns.gold`", "string"]),
        (
            {"teachers": [{"name": "a", "data": "x", "columns": {"goal": "y"}}]},
            ["columns.goal", "'gold'", "'reasoning'"],
        ),
        ({"teachers": [{"name": "a", "data": "x", "columns": ["gold"]}]}, ["`teachers.0.columns`", "dictionary"]),
        ({"eval": {"columns": {"answers": "y"}}}, ["`eval.columns.answers", "'answer'"]),
        ({"eval": {"overlap": -1}}, ["`eval.overlap`"]),
        ({"eval": {"limit": 0}}, ["`eval.limit`"]),
        ({"eval": {"data": ["a", "b"]}}, ["`eval.data`", "string"]),
        ({"branch": {"save_steps": 0}}, ["`branch.save_steps`"]),
        ({"branch": {"report_to": "tensorbord"}}, ["`branch.report_to", "'tensorboard'"]),
        ({"branch": {"max_length": 1}}, ["`branch.max_length`"]),
        ({"trust_remote_code": "perhaps"}, ["`trust_remote_code`", "bool"]),
        ({"student": "x\ud800"}, ["`student`", "not a usable path"]),
        ({"output": "x\ud800"}, ["half a character"]),
        ({"output": "x\0y"}, ["`output`", "no folder's name"]),
        ({"output": ""}, ["`output`", "no folder's name"]),
        ({"student": None}, ["`student`"]),
        ({"student": 5}, ["`student`"]),
        ({"rounds": 0}, ["`rounds`"]),
        ({"device": "tpu"}, ["`device`", "'cuda'"]),
        ({5: 6}, ["5"]),
    ],
    ids=str,
)
def test_each_mistake_names_the_file_and_the_key(write: Write, changes: dict[Any, Any], named: list[str]) -> None:
    file = write({**MINIMAL, **changes})
    message = message_of(file)
    assert message.startswith(f"{file}: ")
    assert all(n in message for n in named), message


@pytest.mark.parametrize("key", ["student", "teachers"])
def test_a_missing_key_is_named(write: Write, key: str) -> None:
    message = message_of(write({k: v for k, v in MINIMAL.items() if k != key}))
    assert f"recipe.yaml: `{key}`: field required" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "key: value"),
        ("- a\n- b\n", "key: value"),
        ("just text", "key: value"),
        ("a: [1,\nb: 2\n", "not YAML"),
        ("a: b: c\n", "not YAML"),
        ("\tstudent: x\n", "not YAML"),
        ("student: !!python/object:os.system x\n", "not YAML"),
        ("seed: 2026-13-45\n", "not YAML"),
        ("seed: 0x_\n", "not YAML"),
        ("seed: !!int ''\n", "not YAML"),
        ("seed: !!bool x\n", "not YAML"),
        ("seed: !!timestamp x\n", "not YAML"),
        ("[" * 2000, "not YAML"),
        ("[a]: b\n? {c: d}\n: e\n", "recipe.yaml"),
        ("eval: {data: &x [*x]}\nstudent: s\nteachers: [{name: a, data: b}]\n", "eval.data"),
        (yaml.safe_dump({**MINIMAL, "student": "~nobody-of-this-name/x"}), "student"),
        (yaml.safe_dump({**MINIMAL, "student": "x\0y"}), "student"),
        (yaml.safe_dump({**MINIMAL, "eval": {"data": "x\0y"}}), "data"),
    ],
)
def test_a_file_that_is_no_config_is_named(write: Write, text: str, named: str) -> None:
    file = write(text)
    message = message_of(file)
    assert str(file) in message
    assert named in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in message_of(tmp_path / "none.yaml")
    assert str(tmp_path) in message_of(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"student: \xff\xfe")
    assert "not YAML" in message_of(tmp_path / "bytes.yaml")


def test_a_tree_from_elsewhere_names_its_source() -> None:
    with pytest.raises(UserError, match=r"^somewhere: `rounds`: "):
        parse_config({**MINIMAL, "rounds": -1}, "somewhere")


# --- anything else -----------------------------------------------------------------------------------

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.binary(max_size=4)
    | st.text(max_size=8)
    | st.sampled_from(["~", "~x", "demo:", "..", "/", "loss", "ties", "x" * 300])
)
trees = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=3)
)


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [path, *(p for k, v in items for p in paths_of(v, (*path, k)))]


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_tree_raises_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tree: Any = copy.deepcopy(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(tree)[1:] or [()]))
        if not path:
            break
        node = tree
        for key in path[:-1]:
            node = node[key]
        change = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            node[path[-1]] = data.draw(trees)
        elif change == "remove":
            del node[path[-1]]
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=6))] = data.draw(trees)
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
    try:
        load_config(file)
        message = str(file)
    except UserError as e:
        message = str(e)
    assert str(file) in message
    assert len(message.splitlines()) == 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_text_raises_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = yaml.safe_dump(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        inserted = data.draw(
            st.text(max_size=4) | st.sampled_from(["[", "&a ", "*a", "<<: ", "!!int ", ": ", "\n  ", "|"])
        )
        text = text[:at] + inserted + text[at + data.draw(st.integers(0, 3)) :]
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(file)
        message = str(file)
    except UserError as e:
        message = str(e)
    assert str(file) in message


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["rounds", "branch.steps", "merge", "student", "teachers", "eval.data", "a.b.c", "lora."]),
    st.text(max_size=8),
)
def test_no_override_raises_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "plain.yaml"
    file.write_text(yaml.safe_dump(FULL))
    try:
        load_config(file, [f"{key}={value}"])
        message = key
    except UserError as e:
        message = str(e)
    assert message


# --- what is measured ----------------------------------------------------------------------------------


def test_branches_are_not_asked_for_long_answers_unless_it_is_said() -> None:
    for said, expected in (
        ({}, True),  # the loss alone
        ({"max_new_tokens": 8192}, True),
        ({"data": "q.jsonl"}, True),
        ({"data": "q.jsonl", "max_new_tokens": 2048}, True),
        ({"data": "q.jsonl", "max_new_tokens": 2049}, False),
        ({"data": "q.jsonl", "max_new_tokens": 2049, "branches": True}, True),
        ({"data": "q.jsonl", "branches": False}, False),
    ):
        e = EvalConfig.model_validate(said)
        assert e.each_branch is expected
        assert e.branches is said.get("branches")


def test_what_final_does_not_say_is_as_after_each_round() -> None:
    asked = {"data": "q.jsonl", "limit": 20, "temperature": 0.6, "max_new_tokens": 100, "branches": False}
    e = EvalConfig.model_validate({**asked, "final": {"samples": 16, "limit": 50, "round": "last"}})
    assert e.at_last == EvalConfig.model_validate({**asked, "samples": 16, "limit": 50, "final": e.final})
    assert EvalConfig.model_validate(asked).at_last == EvalConfig.model_validate(asked)
    with pytest.raises(ValidationError, match=r"`final\.samples` above 1 needs a `temperature` above 0"):
        EvalConfig.model_validate({"data": "q.jsonl", "final": {"samples": 16}})
    EvalConfig.model_validate({"data": "q.jsonl", "final": {"samples": 16, "temperature": 1}})
    with pytest.raises(ValidationError, match="`final` needs `data`"):
        EvalConfig.model_validate({"final": {}})
