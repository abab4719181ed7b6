"""What a run is asked to do: frozen settings, and the one reader of YAML."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mot_lora.errors import UserError

MERGE_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "della", "sce")
DEMO = "demo:"  # student: demo:student is the student that the package carries


class Settings(BaseModel):
    """The base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


PerModule = float | dict[str, float]
"""A number, or numbers by module pattern: a regular expression that ends a module's name (`q_proj`, `layers.3.mlp.*`),
as in PEFT's rank_pattern; the first that matches counts."""


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that a module's name ends with, at a dot or whole; None when none does.

    >>> first_match(["k_proj", "mlp.*"], "model.layers.0.mlp.up_proj")
    'mlp.*'
    """
    return next((p for p in patterns if compiled(p).fullmatch(module)), None)


def compiled(pattern: str) -> re.Pattern[str]:
    """A module pattern as a regular expression. Errors: ValueError for what is none."""
    try:
        re.compile(pattern)  # `a)(b` is none, but would be one below
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"`{pattern}` is not a pattern of module names ({e})") from e


def for_module(setting: PerModule, module: str, default: float = 1.0) -> float:
    """What a setting is for one module; `default` where no pattern matches.

    >>> for_module({"q_proj": 0.5}, "model.layers.0.self_attn.q_proj")
    0.5
    """
    if not isinstance(setting, dict):
        return setting
    key = first_match(setting, module)
    return default if key is None else setting[key]


S = TypeVar("S", bound=Settings)


class TeacherConfig(Settings):
    """One teacher: `name` also names its folder; `data` is a JSONL file, or several that are joined."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    data: str | Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def files(self) -> tuple[str, ...]:
        return (self.data,) if isinstance(self.data, str) else self.data


class BranchConfig(Settings):
    """How one teacher's adapter is trained in one round. A batch is batch_size * gradient_accumulation traces."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4, ge=1)
    gradient_accumulation: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the branch's steps")
    max_grad_norm: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: int = Field(default=4096, ge=2, description="tokens; a longer trace is left out, never cut")
    loss_chunk: int = Field(default=1024, ge=1, description="tokens whose logits are held at once")
    activation_checkpointing: bool = True

    @model_validator(mode="before")
    @classmethod
    def _fifty_steps(cls, value: Any) -> object:
        if isinstance(value, dict) and "epochs" not in value:
            return {"steps": 50, **cast("dict[str, Any]", value)}
        return cast("object", value)

    @model_validator(mode="after")
    def _one_length(self) -> "BranchConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self


class LoraConfig(Settings):
    """The adapter of every branch: scaling is alpha / r, or alpha / sqrt(r) with rslora."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"


def _check_numbers(setting: PerModule, holds: Callable[[float], bool], must: str) -> None:
    for pattern, number in (setting if isinstance(setting, dict) else {".*": setting}).items():
        compiled(pattern)
        if not holds(number):
            raise ValueError(f"{must}, not {number}")


def _place(method: Any) -> object:
    """A function's place, so that a run's record of it can be read again."""
    name = getattr(method, "__qualname__", None)
    return f"{method.__module__}:{name}" if name else cast("object", method)


def _known_method(method: str) -> str:
    if method not in MERGE_METHODS and not re.fullmatch(r"[\w.]+:[\w.]+", method):
        raise ValueError(f"unknown method `{method}`; use {', '.join(MERGE_METHODS)}, or module:function of your own")
    return method


class MergeConfig(Settings):
    """How several adapters become one update: the merge spec of a run, and of `mot-lora merge --spec`.

    `method` is a name (linear, ties, dare_linear, dare_ties, della, sce), or a function of your own, from YAML as
    `module:function`. weights, density and scale may differ by module. `space` is where they meet: the weights' own
    unless given.
    """

    method: Annotated[str, BeforeValidator(_place), AfterValidator(_known_method)] = "linear"
    weights: tuple[PerModule, ...] | None = None
    density: PerModule | None = None
    scale: PerModule = 1.0
    space: Literal["core", "knots"] | None = None

    @field_validator("weights")
    @classmethod
    def _weights_in_range(cls, weights: tuple[PerModule, ...] | None) -> tuple[PerModule, ...] | None:
        for w in weights or ():
            _check_numbers(w, lambda x: x >= 0, "weights must not be negative")
        return weights

    @field_validator("density")
    @classmethod
    def _density_in_range(cls, density: PerModule | None) -> PerModule | None:
        if density is not None:
            _check_numbers(density, lambda x: 0 < x <= 1, "density must be in (0, 1]")
        return density

    @field_validator("scale")
    @classmethod
    def _scale_in_range(cls, scale: PerModule) -> PerModule:
        _check_numbers(scale, lambda x: x > 0, "scale must be above 0")
        return scale

    @model_validator(mode="after")
    def _density_fits(self) -> "MergeConfig":
        if self.method in MERGE_METHODS and (self.method == "linear") != (self.density is None):
            wants = "takes no" if self.method == "linear" else "needs a"
            raise ValueError(f"method `{self.method}` {wants} `density`")
        return self


class EvalConfig(Settings):
    """What is measured after each round: answers to `data`, and the loss on traces held out of training."""

    data: str | None = None
    limit: int | None = Field(default=None, ge=1)
    branches: bool = Field(default=True, description="also answer with each teacher's own branch")
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=2048, ge=1)
    samples: int = Field(default=1, ge=1, description="answers a question; the score is avg@n")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    holdout: float = Field(default=0.1, ge=0, lt=1, description="share of the questions whose traces no branch sees")

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvalConfig":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("`samples` above 1 needs a `temperature` above 0: greedy answers are all alike")
        return self


class StopConfig(Settings):
    """Stop when `metric` has not improved for `patience` rounds; without patience, all rounds run.

    `auto` is accuracy where `eval.data` is given, else the held-out loss.
    """

    metric: Literal["auto", "accuracy", "loss"] = "auto"
    patience: int | None = Field(default=None, ge=1)


class Config(Settings):
    """Everything that decides a run.

    >>> Config(student="Qwen/Qwen3-0.6B", teachers=({"name": "a", "data": "a.jsonl"},)).rounds
    5
    """

    student: str
    teachers: tuple[TeacherConfig, ...] = Field(min_length=1)
    rounds: int = Field(default=5, ge=1)
    branch: BranchConfig = BranchConfig()
    lora: LoraConfig = LoraConfig()
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    merge: MergeConfig = MergeConfig()
    eval: EvalConfig = EvalConfig()
    stop: StopConfig = StopConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    output: str = "runs/run"

    @field_validator("teachers")
    @classmethod
    def _names_differ(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [t.name for t in teachers]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"teacher listed twice: {', '.join(sorted(twice))}")
        return teachers

    @model_validator(mode="after")
    def _weights_fit(self) -> "Config":
        w = self.merge.weights
        if w is not None and len(w) != len(self.teachers):
            raise ValueError(f"merge.weights has {len(w)} numbers for {len(self.teachers)} teachers")
        if w is not None and all(x == 0 for x in w):
            raise ValueError("merge.weights must not be all 0")
        if self.metric == "accuracy" and self.eval.data is None:
            raise ValueError("stop.metric `accuracy` needs `eval.data`")
        if self.metric == "loss" and self.eval.holdout == 0:
            raise ValueError("stop.metric `loss` needs `eval.holdout` above 0")
        return self

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """The metric by which rounds are compared."""
        if self.stop.metric != "auto":
            return self.stop.metric
        return "accuracy" if self.eval.data else "loss"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config; `overrides` are `key=value`, with dots for inner keys and YAML values.

    Relative paths of what is read are taken from the file's folder, in overrides from the working folder; so is
    `output`, always. `demo:NAME` is a file of the package.

    Errors: UserError, one line that names the file and the key.

    >>> load_config("recipes/quickstart.yaml", ["rounds=2"]).rounds  # doctest: +SKIP
    2
    """
    path = Path(path)
    tree = _rebase(_read_tree(path), path.parent, str(path))
    for override in overrides:
        key, eq, value = override.partition("=")
        if not eq or not key:
            raise UserError(f"override `{override}` is not key=value, e.g. rounds=2 or branch.steps=20")
        node: Any = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = cast("dict[str, Any]", node).setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override `{override}`: `{parent}` has no inner keys")
        try:
            node[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise UserError(f"override `{override}`: the value is not YAML") from e
    # what the file says is absolute by now, or a Hub name, which a folder here must not shadow
    given = {o.split("=")[0].split(".")[0] for o in overrides}
    rebased = _rebase({k: v for k, v in tree.items() if k in given}, Path(), str(path))
    return parse_config({**tree, **rebased}, str(path))


def parse_config(tree: Any, source: str) -> Config:
    """Check a tree of settings; every error names `source` and the key, and the nearest right one."""
    return _parse(Config, tree, source)


def load_merge(path: str | Path | None = None, **settings: Any) -> MergeConfig:
    """A merge spec from a YAML file, the `merge:` part of a config alone, and settings that replace the file's.

    A setting of text is a number, or `PATTERN=NUMBER,PATTERN=NUMBER,...` by module. None is left out.

    Errors: UserError, one line that names the file or the option.

    >>> load_merge(method="ties", density="mlp.*=0.3,.*=0.5").density
    {'mlp.*': 0.3, '.*': 0.5}
    """
    tree = {} if path is None else _read_tree(Path(path))
    for key, value in settings.items():
        if value is not None:
            tree[key] = _per_module(key, value) if key in ("density", "scale") else value
    return _parse(MergeConfig, tree, "merge" if path is None else str(path))


def _per_module(key: str, text: Any) -> PerModule:
    if not isinstance(text, str):
        return text
    try:
        if "=" not in text:
            return float(text)
        pairs = [item.rpartition("=") for item in text.split(",")]
        return {pattern: float(number) for pattern, _, number in pairs}
    except ValueError as e:
        raise UserError(f"{key} {text!r}: give a number, or PATTERN=NUMBER,PATTERN=NUMBER,...") from e


def _parse(kind: type[S], tree: Any, source: str) -> S:
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        # of the branches of a union, the one that was meant
        first = next((x for x in errors if "dict[str,float]" in x["loc"][:-1]), errors[0])
        keys = [x for x in first["loc"] if x not in ("float", "dict[str,float]")]
        loc = " ".join(".".join(map(str, keys)).split())  # one line, whatever the key
        if first["type"] == "extra_forbidden":
            known = _keys_beside(kind, first["loc"])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(known)}"
            raise UserError(f"{source}: `{loc}` is not a setting; {hint}") from e
        what = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(f"{source}: {f'`{loc}`: ' if loc else ''}{what[0].lower()}{what[1:]}") from e


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); give the path of a YAML config") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a config: it must hold `key: value` lines")
    return cast("dict[str, Any]", tree)


def demo_path(name: str = "") -> Path:
    """The path of a file that the package carries, e.g. demo_path("student")."""
    return Path(str(resources.files("mot_lora") / "demo" / name))


def _keys_beside(kind: type[Settings], loc: tuple[int | str, ...]) -> list[str]:
    groups: dict[str, type[Settings]] = {
        "teachers": TeacherConfig,
        "branch": BranchConfig,
        "lora": LoraConfig,
        "merge": MergeConfig,
        "eval": EvalConfig,
        "stop": StopConfig,
    }
    group = groups.get(str(loc[0]), kind) if len(loc) > 1 else kind
    return list(group.model_fields)


def _rebase(tree: dict[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Make the paths of a tree absolute; what does not exist as a file stays as it is (a Hub name)."""

    def path(key: str, value: Any, must_be_file: bool = True) -> Any:
        if isinstance(value, list):
            return [x if isinstance(x, list) else path(key, x) for x in cast("list[Any]", value)]
        if not isinstance(value, str):
            return value
        if value.startswith(DEMO):
            return str(demo_path(value.removeprefix(DEMO)))
        try:
            file = (folder / Path(value).expanduser()).resolve()
            return str(file) if must_be_file or file.exists() else value
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"{source}: `{key}`: {value!r} is not a usable path ({e})") from e

    tree = dict(tree)
    if "student" in tree:
        tree["student"] = path("student", tree["student"], must_be_file=False)
    teachers = tree.get("teachers")
    if isinstance(teachers, list):
        tree["teachers"] = [
            {**t, "data": path("teachers.data", t["data"])} if isinstance(t, dict) and "data" in t else t
            for t in cast("list[Any]", teachers)
        ]
    if isinstance(tree.get("eval"), dict) and "data" in tree["eval"]:
        tree["eval"] = {**tree["eval"], "data": path("eval.data", tree["eval"]["data"])}
    return tree
