"""The settings as people read them: template, reference and help say every setting of the model, and agree with it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mot_lora.config import (
    BranchConfig,
    CompareConfig,
    Config,
    EvalConfig,
    FinalConfig,
    LoraConfig,
    RoundMergeConfig,
    Settings,
    StopConfig,
    TeacherConfig,
)
from mot_lora.reader import load_config
from mot_lora.settings import keys, reference, template

GROUPS: dict[str, type[Settings]] = {
    "teachers": TeacherConfig,
    "branch": BranchConfig,
    "lora": LoraConfig,
    "merge": RoundMergeConfig,
    "eval": EvalConfig,
    "eval.final": FinalConfig,
    "stop": StopConfig,
    "compare": CompareConfig,
}
SETTINGS = {f"{group}.{key}" for group, kind in GROUPS.items() for key in kind.model_fields} | set(Config.model_fields)
SETTINGS -= set(GROUPS)
CHOSEN = {"student", "teachers", "output", "stop.patience"}
CHOSEN |= {f"branch.{key}" for key in ("batch_size", "gradient_accumulation", "save_steps")}


def uncommented(text: str) -> dict[str, Any]:
    """The template's settings, with those that stand in comments."""
    return yaml.safe_load(re.sub(r"^( *)# (?=(  )*[a-z_]+:( |$))", r"\1", text, flags=re.MULTILINE))


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """The single settings of a tree by dotted key."""
    if isinstance(tree, dict) and (not key or key in GROUPS):
        return {k: v for name, inner in tree.items() for k, v in flat(inner, f"{key}.{name}".strip(".")).items()}
    return {key: tree}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], Config]:
    """Read a tree, or text, as a config."""

    def load(tree: Any) -> Config:
        (tmp_path / "mine.yaml").write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
        return load_config(tmp_path / "mine.yaml")

    return load


# --- the template ------------------------------------------------------------------------------------


def test_the_template_is_the_defaults_but_for_what_a_new_config_chooses(load: Callable[[Any], Config]) -> None:
    config = load(template())
    assert config.student == "Qwen/Qwen3-0.6B"
    assert [t.name for t in config.teachers] == ["first", "second"]
    assert all(t == TeacherConfig(name=t.name, data=t.data) for t in config.teachers)
    default = Config(student=config.student, teachers=config.teachers)
    mine, usual = flat(config.model_dump()), flat(default.model_dump())
    assert {key for key in mine if mine[key] != usual[key]} | {"student", "teachers"} == CHOSEN
    assert (config.branch.batch_size, config.branch.gradient_accumulation) == (1, 16)
    assert (config.branch.save_steps, config.stop.patience, config.output) == (25, 2, "runs/mine")


def test_the_template_has_every_setting_once_in_force_or_in_a_comment() -> None:
    tree = uncommented(template())
    first, second = tree["teachers"]
    assert flat({**tree, "teachers": first}).keys() == SETTINGS
    assert second == {"name": "second", "data": "traces/second.jsonl"}
    lines = re.findall(r"^ *(?:- )?(?:# )? *([a-z_]+):(?: |$)", template(), re.MULTILINE)
    assert sorted(lines) == sorted([*(s.rpartition(".")[2] for s in (*SETTINGS, *GROUPS)), "name", "data"])


def test_every_example_of_the_template_is_one(load: Callable[[Any], Config]) -> None:
    tree = uncommented(template())
    branch, merge, (first, second) = tree["branch"], tree["merge"], tree["teachers"]
    union = first.pop("union")  # in the place of data
    epochs, density = branch.pop("epochs"), merge.pop("density")  # in the place of steps; linear takes none
    config = load(tree)
    assert (config.teachers[0].samples, config.teachers[0].on_bad_row) == (1000, "stop")
    assert config.teachers[0].columns["gold"] == "reward_model.ground_truth"
    assert (config.eval.samples, config.eval.at_last.samples) == (4, 16)
    del branch["steps"]
    config = load(
        {
            **tree,
            "teachers": [{"name": "all", "union": union}, second],
            "branch": {**branch, "epochs": epochs},
            "merge": {**merge, "method": "ties", "density": density},
        }
    )
    assert [m.name for m in config.teachers[0].members] == ["third", "fourth"]
    assert (config.branch.steps, config.branch.epochs, config.merge.density) == (None, 1, 0.5)


def test_a_comment_of_the_template_says_choices_and_another_default() -> None:
    text = re.sub(r"\n *# {20,}#", "", template())  # a comment that goes on is one line
    for line in (
        "  schedule: cosine              # constant, linear or cosine: the learning rate after the warm-up",
        "  batch_size: 1                 # traces computed at once; memory grows with it (default: 4)",
        "  # temperature: 0.6            # of sampling; 0 is greedy (default: 0.0)",
        "  # final:                      # ask the student once more when all rounds are done",
        "  #   round: best               # best or last: whose student is asked",
        "    # verified_only: true       # leave out traces whose final answer is not the row's right one (gold) "
        "(default: false)",
    ):
        assert line in text.splitlines()
    assert max(map(len, template().splitlines())) <= 120


# --- the reference -----------------------------------------------------------------------------------


def rows() -> dict[str, tuple[str, str, str]]:
    """The reference by setting: values, default, what it does."""
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in reference().splitlines() if "| `" in line]
    assert all(len(row) == 4 for row in cells)
    return {key.strip("`| "): (values, default, about.strip("| ")) for key, values, default, about in cells}


def test_the_reference_names_every_setting_once() -> None:
    named = re.findall(r"^\| `([a-z_.]+)` \|", reference(), re.MULTILINE)
    assert sorted(named) == sorted(SETTINGS)
    assert re.findall(r"^## (.*)$", reference(), re.MULTILINE) == ["The run", *(f"`{group}`" for group in GROUPS)]
    assert all(len(about) > 3 for _, _, about in rows().values())


def test_the_reference_has_the_defaults_of_the_model() -> None:
    for group, kind in {"": Config, **GROUPS}.items():
        for key, field in kind.model_fields.items():
            if (name := f"{group}.{key}".strip(".")) in GROUPS:
                continue
            _, default, _ = rows()[name]
            if field.is_required():
                assert default == "required", name
            elif default == "-":
                assert field.default in (None, (), {}), name
            else:
                assert yaml.safe_load(default.strip("`")) == field.default, name


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("student", "text"),
        ("rounds", "whole number, at least 1"),
        ("quantization", "nf4, int8 or none"),
        ("trust_remote_code", "true or false"),
        ("branch.warmup", "number, at least 0, below 1"),
        ("branch.learning_rate", "number, above 0"),
        ("branch.report_to", "`[tensorboard, wandb or trackio, ...]`"),
        ("teachers.data", "text or `[text, ...]`"),
        ("teachers.union", "`[teacher, ...]`"),
        ("merge.density", "number or `{text: number}`"),
        ("merge.weights", "uniform, validation, greedy or `[number or {text: number}, ...]`"),
        ("merge.space", "core or knots"),
        ("eval.top_p", "number, above 0, at most 1"),
        ("eval.forgetting", "`{text: text}`"),
        ("compare.noisy", "teacher"),
    ],
)
def test_the_reference_says_what_a_setting_takes(key: str, values: str) -> None:
    assert rows()[key][0] == values


# --- help --------------------------------------------------------------------------------------------


def test_the_keys_are_those_of_the_model() -> None:
    top, *groups = keys().split("\n\n")
    said = {re.sub(r" \(.*", "", group): group.rpartition("): ")[2].split(", ") for group in groups}
    assert {f"{group}.{key}" for group, inner in said.items() for key in inner} | set(top.split(", ")) == SETTINGS
