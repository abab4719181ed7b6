"""The arms of a comparison, each a config of the same loop (Merge-of-Thought's baselines, arXiv 2509.08814)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mot_lora.analysis.comparison import Budget
from mot_lora.config import MERGE_METHODS, Config, TeacherConfig
from mot_lora.errors import UserError

PAPER = ("base", "std", "mtd", "one_shot", "linear", "ties", "dare_linear", "dare_ties", "vote")
DENSITY = 0.5  # for methods that need one, if the config gives none
BOTH: tuple[Budget, ...] = ("steps", "total")


@dataclass(frozen=True)
class Arm:
    """One arm: its name, the budgets that it belongs to, and the run that it is."""

    name: str
    budgets: tuple[Budget, ...]
    config: Config

    def at(self, folder: Path) -> "Arm":
        """The same arm with this output folder."""
        return replace(self, config=self.config.model_copy(update={"output": str(folder)}))

    @property
    def folder(self) -> str:
        """The name of its folder.

        >>> from mot_lora.config import Config
        >>> config = Config(student="s", teachers=({"name": "a", "data": "a.jsonl"},))
        >>> Arm("std:a", ("total",), config).folder
        'std-a-total'
        """
        return re.sub(r"[^\w+]+", "-", self.name) + ("-total" if self.budgets == ("total",) else "")


def known_arms(config: Config) -> tuple[str, ...]:
    """The arms that a config can have; a merge method that is not built in is an arm of its own."""
    own = () if config.merge.method in PAPER else (config.merge.method,)
    weights = ("validation", "greedy") if config.eval.validation else ()
    noisy = ("noisy",) if config.compare.noisy else ()
    return (*PAPER[:-1], *own, PAPER[-1], *weights, *noisy, "repeated")


def arms(config: Config, names: Sequence[str] = PAPER, budgets: Sequence[Budget] = BOTH) -> list[Arm]:
    """The runs of the requested arms, ordered so that later ones can reuse work of earlier ones.

    With K teachers, R rounds and S steps per branch, the budget `steps` gives every branch S steps: a single teacher
    takes R S steps, a merge K R S. In `total` every arm takes K R S: a single teacher and the union get K S a round.
    One-shot is one round with R S steps per branch. All rounds run: the config's `stop.patience` and `eval.final` are
    ignored. In every arm the loss is on the held-out traces of the config's teachers.

    Errors: UserError for fewer than two teachers, branch.epochs, and an arm that is unknown or lacks a setting.

    >>> teachers = ({"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"})
    >>> [(a.name, a.budgets, a.config.branch.steps) for a in arms(Config(student="s", teachers=teachers), ["mtd"])]
    [('mtd', ('steps',), 50), ('mtd', ('total',), 100)]
    """
    if len(config.teachers) < 2:
        raise UserError("a comparison needs at least two teachers")
    if config.branch.steps is None:
        raise UserError("a comparison needs branch.steps instead of branch.epochs, so that budgets are exactly equal")
    if not set(names) - {"base"}:
        raise UserError("a comparison needs another arm beside base")
    for name in names:
        _check(config, name, names)
    plain = _varied(
        config,
        stop={**config.stop.model_dump(), "patience": None},
        compare={},
        eval={
            **config.eval.model_dump(),
            "branches": False,
            "final": None,
            "traces": config.eval.traces or config.teachers,
        },
    )
    named = (arm for name in known_arms(config) if name in names for arm in _runs(plain, config.compare.noisy, name))
    chosen = [arm for arm in named if set(arm.budgets) & set(budgets)]
    folders = [arm.folder.casefold() for arm in chosen]
    if twice := [arm.name for arm in chosen if folders.count(arm.folder.casefold()) > 1]:
        raise UserError(f"arms {' and '.join(twice)} would share a folder; rename a teacher")
    return chosen


def placed(
    config: Config, seed: int, out: str | Path, names: Sequence[str] = PAPER, budgets: Sequence[Budget] = BOTH
) -> list[Arm]:
    """The runs of a seed, each with its folder as output."""
    chosen = arms(config.model_copy(update={"seed": seed}), names, budgets)
    return [a.at(Path(out) / f"seed-{seed}" / a.folder) for a in chosen]


def choose(config: Config, names: str = "", budgets: str = ",".join(BOTH)) -> tuple[list[str], list[Budget]]:
    """The arms and budgets named in a text: `std,mtd,linear`; `all`; empty for the paper's.

    Errors: UserError for unknown names.
    """
    chosen = [n.strip() for n in names.split(",") if n.strip()] or list(PAPER)
    if "all" in chosen:
        chosen = list(known_arms(config))
    for name in chosen:
        _check(config, name, chosen)
    which: list[Budget] = [b for b in BOTH if b in [x.strip() for x in budgets.split(",")]]
    if not which or len(which) < len({x.strip() for x in budgets.split(",") if x.strip()}):
        raise UserError(f"--budgets {budgets}: give steps, total or both")
    return chosen, which


def numbers(seeds: str) -> list[int]:
    """The seeds listed in a text.

    Errors: UserError unless the text is a list of distinct whole numbers.

    >>> numbers("0,1,2")
    [0, 1, 2]
    """
    try:
        listed = [int(s) for s in seeds.split(",")]
    except ValueError as e:
        raise UserError(f"--seeds {seeds}: give whole numbers, e.g. 0,1,2") from e
    if len(set(listed)) < len(listed):
        raise UserError(f"--seeds {seeds}: a seed is repeated; give each once")
    return listed


def _runs(c: Config, noisy: TeacherConfig | None, name: str) -> Iterator[Arm]:
    teachers = c.teachers
    if name == "std":
        for teacher in teachers:
            yield from _alone(c, f"std:{teacher.name}", teacher, len(teachers))
    elif name == "mtd":
        yield from _alone(c, name, _union(teachers), len(teachers))
    elif name == "one_shot":
        merge = {"method": "linear", "weights": c.merge.weights if c.merge.given else "uniform"}
        steps = c.rounds * (c.branch.steps or 0)
        yield Arm(name, BOTH, _varied(c, rounds=1, merge=merge, branch={**c.branch.model_dump(), "steps": steps}))
    elif name in ("validation", "greedy"):
        yield Arm(name, BOTH, _merged(c, "linear", weights=name))
    elif name == "repeated":
        again = teachers[0].model_copy(update={"name": _free(f"{teachers[0].name}_again", teachers)})
        yield Arm("linear+repeated", BOTH, _merged(_with(c, again), "linear"))
    elif name == "noisy" and noisy:
        all_ = _with(c, noisy)
        yield from _alone(c, f"std:{noisy.name}", noisy, len(teachers), total=False)
        yield from _alone(c, "mtd+noisy", _union(all_.teachers), len(all_.teachers))
        yield Arm("linear+noisy", BOTH, _merged(all_, "linear"))
        if c.eval.validation:
            yield from (Arm(f"{w}+noisy", BOTH, _merged(all_, "linear", weights=w)) for w in ("validation", "greedy"))
    elif name not in ("base", "vote"):
        yield Arm(name, BOTH, _merged(c, name))


def _alone(c: Config, name: str, teacher: TeacherConfig, k: int, total: bool = True) -> Iterator[Arm]:
    """One branch a round: with S steps, and with K S steps."""
    one = _varied(c, teachers=(teacher,), merge={})
    yield Arm(name, ("steps",), one)
    if total:
        yield Arm(name, ("total",), _varied(one, branch={**c.branch.model_dump(), "steps": k * (c.branch.steps or 0)}))


def _merged(c: Config, method: str, **settings: Any) -> Config:
    own = c.merge.model_dump()
    density = None if method == "linear" else own["density"] or (DENSITY if method in MERGE_METHODS else None)
    return _varied(c, merge={**own, "method": method, "density": density, **settings})


def _with(c: Config, teacher: TeacherConfig) -> Config:
    """With one more teacher, and uniform weights, since given ones no longer match in number."""
    return _varied(c, teachers=(*c.teachers, teacher), merge={**c.merge.model_dump(), "weights": "uniform"})


def _free(name: str, teachers: Sequence[TeacherConfig]) -> str:
    """A name that no teacher has."""
    taken = {t.name.casefold() for t in teachers}
    return _free(f"{name}_again", teachers) if name.casefold() in taken else name


def _union(teachers: Sequence[TeacherConfig]) -> TeacherConfig:
    return TeacherConfig(name="union", union=tuple(teachers))


def _varied(c: Config, **settings: Any) -> Config:
    """A config with some settings replaced, validated as a whole."""
    return Config.model_validate({**dict(c), **settings})


def _check(config: Config, name: str, names: Sequence[str]) -> None:
    known = known_arms(config)
    if name == "vote" and "std" not in names:
        raise UserError("arm `vote` needs arm `std`, whose students vote")
    if name in known:
        return
    needs = {
        "noisy": "compare.noisy: {name: ..., data: ...}",
        "validation": "eval.validation",
        "greedy": "eval.validation",
    }
    if name in needs:
        raise UserError(f"arm `{name}` needs {needs[name]} in the config")
    raise UserError(f"unknown arm `{name}`; known arms: {', '.join(known)}")
