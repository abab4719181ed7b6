"""What a run is asked to do: frozen settings, and the one reader of YAML."""

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

LONG = 2048  # tokens; each branch is asked for shorter answers alone, unless that is said
MERGE_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "della", "sce")


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


Role = Literal[
    "messages",
    "question",
    "reasoning",
    "answer",
    "gold",
    "choices",
    "context",
    "system",
    "tools",
    "input_ids",
    "labels",
]


class DataConfig(Settings):
    """How a source of rows is read: `split` and `subset` of a dataset, and what its columns mean, where their names do
    not say it: `columns: {reasoning: my_column}`, with dots what their cells hold: `{gold: reward_model.ground_truth}`.

    A row that cannot be used is left out and counted, or it stops the work.
    """

    split: str | None = None
    subset: str | None = None
    columns: dict[Role, str] = {}
    on_bad_row: Literal["skip", "stop"] = "skip"


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"`{name}` also names a folder: use letters, digits, - and _, beginning with no sign")
    return name


class TeacherConfig(DataConfig):
    """One teacher: `name` also names its folder; `data` is a file, a folder or a Hub dataset, or several that are
    joined; or it is the `union` of other teachers, each chosen as its own settings say.

    `samples` traces are drawn by `seed`. `verified_only` leaves out those whose final answer is not the row's.
    `learning_rate` is this teacher's own, for a branch that would go astray with the others'.
    """

    name: Annotated[str, AfterValidator(_folder_name)]
    data: str | tuple[str, ...] = ()
    union: tuple["TeacherConfig", ...] = ()
    samples: int | None = Field(default=None, ge=1)
    seed: int | None = None
    verified_only: bool = False
    learning_rate: float | None = Field(default=None, gt=0)

    @field_validator("data")
    @classmethod
    def _one_is_no_list(cls, data: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return data[0] if len(data) == 1 and not isinstance(data, str) else data

    @model_validator(mode="after")
    def _has_rows(self) -> "TeacherConfig":
        if bool(self.data) == bool(self.union):
            raise ValueError(f"teacher `{self.name}` needs `data`, or a `union` of teachers, and not both")
        own = (self.samples, self.seed, self.split, self.subset)
        if self.union and (
            any(x is not None for x in own) or self.verified_only or self.columns or self.on_bad_row != "skip"
        ):
            raise ValueError(f"teacher `{self.name}` is a union: how rows are read is set for each of its teachers")
        return self

    @property
    def members(self) -> tuple["TeacherConfig", ...]:
        """The teachers whose rows these are: itself, or those of the union."""
        return tuple(m for t in self.union for m in t.members) or (self,)

    @property
    def sources(self) -> tuple[str, ...]:
        if self.union:
            return tuple(source for member in self.members for source in member.sources)
        return (self.data,) if isinstance(self.data, str) else self.data


class BranchConfig(Settings):
    """How one teacher's adapter is trained in one round. A step sees batch_size * gradient_accumulation traces.

    They are computed in batches of batch_size, or with `batch_tokens` of so many tokens. `offload` keeps the inputs of
    checkpointed layers in host memory; `auto` does it on a GPU where they would take more than a tenth of its memory.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4, ge=1)
    gradient_accumulation: int = Field(default=4, ge=1)
    batch_tokens: int | None = Field(
        default=None, ge=1, description="tokens computed at once, padding included, in place of batch_size traces"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the branch's steps")
    max_grad_norm: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: int = Field(default=4096, ge=2, description="tokens; a longer trace is left out, never cut")
    loss_chunk: int = Field(default=1024, ge=1, description="tokens whose logits are held at once")
    activation_checkpointing: bool = True
    offload: Literal["auto", "on", "off"] = "auto"
    liger: Literal["auto", "on", "off"] = Field(
        default="auto", description="Liger's fused kernels; auto: on a GPU where the package is installed"
    )
    save_steps: int | None = Field(default=None, ge=1, description="steps between two states to go on from")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> object:
        return (value,) if isinstance(value, str) else cast("object", value)

    @property
    def traces(self) -> int:
        """The traces of a step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def most(self) -> int | None:
        """The most traces in what is computed at once; None where their tokens decide."""
        return None if self.batch_tokens else self.batch_size

    def largest(self, longest: int) -> tuple[int, int]:
        """The largest batch that is computed at once, where the longest trace has so many tokens: traces, and tokens
        of each. With `batch_tokens`, as one trace that has as many as all of them.
        """
        if self.batch_tokens is None:
            return self.batch_size, longest
        return 1, max(longest, min(self.batch_tokens, self.traces * longest))

    @field_validator("offload", "liger", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else cast("object", value)  # as YAML has it

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

    @model_validator(mode="after")
    def _has_what_to_offload(self) -> "BranchConfig":
        if self.offload == "on" and not self.activation_checkpointing:
            raise ValueError("`offload: on` moves what checkpointed layers keep: set `activation_checkpointing: true`")
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


def _not_negative(weight: PerModule) -> PerModule:
    _check_numbers(weight, lambda x: x >= 0, "weights must not be negative")
    return weight


def _with_patterns(weight: PerModule) -> PerModule:
    _check_numbers(weight, lambda _: True, "")
    return weight


Weight = Annotated[PerModule, AfterValidator(_not_negative)]
SignedWeight = Annotated[PerModule, AfterValidator(_with_patterns)]


def _name_or_numbers(weights: Any) -> str:
    """Which of the two forms of weights is meant, so that a mistake is told of that one."""
    return "[name]" if isinstance(weights, str) else "[numbers]"


Weights = Annotated[
    Annotated[Literal["uniform", "validation", "greedy"], Tag("[name]")]
    | Annotated[tuple[Weight, ...], Tag("[numbers]")],
    Discriminator(_name_or_numbers),
]


class MethodConfig(Settings):
    """How updates become one, but for their weights.

    `method` is a name (linear, ties, dare_linear, dare_ties, della, sce), or a function of your own, from YAML as
    `module:function`. density and scale may differ by module. `space` is where they meet: the weights' own unless
    given.
    """

    method: Annotated[str, BeforeValidator(_place), AfterValidator(_known_method)] = "linear"
    density: PerModule | None = None
    scale: PerModule = 1.0
    space: Literal["core", "knots"] | None = None

    @field_validator("density")
    @classmethod
    def _density_in_range(cls, density: PerModule | None) -> PerModule | None:
        if density is not None:
            _check_numbers(density, lambda x: 0 < x <= 1, "density must be in (0, 1]")
        return density

    @field_validator("scale")
    @classmethod
    def _scale_in_range(cls, scale: PerModule) -> PerModule:
        _check_numbers(scale, lambda x: x != 0, "scale must not be 0")
        return scale

    @model_validator(mode="after")
    def _density_fits(self) -> "MethodConfig":
        if self.method in MERGE_METHODS and (self.method == "linear") != (self.density is None):
            wants = "takes no" if self.method == "linear" else "needs a"
            raise ValueError(f"method `{self.method}` {wants} `density`")
        return self


class MergeConfig(MethodConfig):
    """The merge spec of `mot-lora merge --spec`: one weight an adapter, which may differ by module.

    With a negative weight, linear and dare_linear are sums and no means; a negative scale turns the merge round.
    """

    weights: tuple[SignedWeight, ...] | None = None


class RoundMergeConfig(MethodConfig):
    """How a run's branches are merged in every round.

    `weights` are numbers, one a teacher, or how they are found: `uniform`; by `eval.validation`, `validation` (each
    branch's accuracy) or `greedy` (a branch joins only if it does not hurt). `momentum` is Nesterov's, over the rounds'
    updates.
    """

    weights: Weights = "uniform"
    momentum: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("scale")
    @classmethod
    def _scale_in_range(cls, scale: PerModule) -> PerModule:
        _check_numbers(scale, lambda x: x > 0, "scale must be above 0")
        return scale

    @field_validator("weights", mode="before")
    @classmethod
    def _none_is_uniform(cls, weights: Any) -> object:
        return "uniform" if weights is None else cast("object", weights)

    @property
    def given(self) -> tuple[PerModule, ...] | None:
        """The weights that are numbers."""
        return None if isinstance(self.weights, str) else self.weights

    @property
    def searched(self) -> bool:
        """Whether the weights are found by `eval.validation`."""
        return self.weights in ("validation", "greedy")


class FinalConfig(Settings):
    """What is asked once when the rounds are done: `eval.data`, of the best or the last round's student, with more
    samples, say. What is not given is as after each round.
    """

    round: Literal["best", "last"] = "best"
    samples: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)


class EvalConfig(DataConfig):
    """What is measured after each round: answers to `data`, and the loss on traces held out of training.

    `validation` has other questions, by which weights are found; `forgetting` names other sets of questions, on which a
    student must not get worse; `traces` are teachers whose held-out traces the loss is on, the run's own unless given.
    """

    data: str | None = None
    validation: str | None = None
    forgetting: dict[Annotated[str, AfterValidator(_folder_name)], str] = {}
    traces: tuple[TeacherConfig, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    branches: bool | None = Field(
        default=None, description="also measure each teacher's own branch; null: where no answer is longer than 2,048"
    )
    batch_size: int = Field(default=16, ge=1, description="questions at once; each may have several samples")
    max_new_tokens: int = Field(default=2048, ge=1)
    samples: int = Field(default=1, ge=1, description="answers a question; the score is avg@n")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    holdout: float = Field(default=0.1, ge=0, lt=1, description="share of the questions whose traces no branch sees")
    overlap: int = Field(
        default=13,
        ge=0,
        description="a trace whose question shares so many words in a row with one of `data` is left out; 0 compares "
        "whole questions",
    )
    final: FinalConfig | None = None

    @field_validator("traces")
    @classmethod
    def _names_differ(cls, traces: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [t.name for t in traces]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"teacher listed twice: {', '.join(sorted(twice))}")
        return traces

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvalConfig":
        for where, e in (("", self), ("final.", self.at_last)):
            if e.samples > 1 and e.temperature == 0:
                raise ValueError(
                    f"`{where}samples` above 1 needs a `temperature` above 0: greedy answers are all alike"
                )
        return self

    @model_validator(mode="after")
    def _final_has_questions(self) -> "EvalConfig":
        if self.final and self.data is None:
            raise ValueError("`final` needs `data`: the questions that are asked")
        return self

    @property
    def each_branch(self) -> bool:
        """Whether each teacher's own branch is measured too."""
        return self.data is None or self.max_new_tokens <= LONG if self.branches is None else self.branches

    @property
    def at_last(self) -> "EvalConfig":
        """With what `final` says."""
        said = self.final.model_dump(exclude={"round"}, exclude_none=True) if self.final else {}
        return self.model_copy(update=said)


class StopConfig(Settings):
    """Stop when `metric` has not improved for `patience` rounds; without patience, all rounds run.

    `auto` is accuracy where `eval.data` is given, else the held-out loss.
    """

    metric: Literal["auto", "accuracy", "loss"] = "auto"
    patience: int | None = Field(default=None, ge=1)


class CompareConfig(Settings):
    """What `mot-lora compare` adds to a run: the noisy teacher of its robustness arms."""

    noisy: TeacherConfig | None = None


class Config(Settings):
    """Everything that decides a run.

    >>> Config(student="Qwen/Qwen3-0.6B", teachers=({"name": "a", "data": "a.jsonl"},)).rounds
    5
    """

    student: str
    teachers: tuple[TeacherConfig, ...]
    rounds: int = Field(default=5, ge=1)
    branch: BranchConfig = BranchConfig()
    lora: LoraConfig = LoraConfig()
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    merge: RoundMergeConfig = RoundMergeConfig()
    eval: EvalConfig = EvalConfig()
    stop: StopConfig = StopConfig()
    compare: CompareConfig = CompareConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    output: str = "runs/run"

    @field_validator("output")
    @classmethod
    def _output_is_a_path(cls, output: str) -> str:
        if not output.strip() or "\0" in output:
            raise ValueError(f"{output!r} is no folder's name")
        return output

    @field_validator("teachers")
    @classmethod
    def _names_differ(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        if not teachers:
            raise ValueError("needs at least one teacher: {name: ..., data: ...}")
        names = [t.name.casefold() for t in teachers]  # some file systems do not tell case apart
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"teacher listed twice: {', '.join(sorted(twice))}")
        return teachers

    @model_validator(mode="after")
    def _weights_fit(self) -> "Config":
        w = self.merge.given
        if w is not None and len(w) != len(self.teachers):
            raise ValueError(f"merge.weights has {len(w)} numbers for {len(self.teachers)} teachers")
        if w is not None and all(x == 0 for x in w):
            raise ValueError("merge.weights must not be all 0")
        if self.merge.searched and self.eval.validation is None:
            raise ValueError(
                f"merge.weights `{self.merge.weights}` needs `eval.validation`: other questions than eval.data"
            )
        noisy = self.compare.noisy
        if noisy and noisy.name.casefold() in (t.name.casefold() for t in self.teachers):
            raise ValueError(f"compare.noisy: `{noisy.name}` is also a teacher; give it a name of its own")
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
