"""The settings of a run, in the order of its YAML: each with its default, its bounds and what it does.

`settings.py` makes the template of `mot-lora init`, the reference and the help from what is said here.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast, get_args

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

from mot_lora.patterns import PerModule, compiled

LONG = 2048  # tokens; where answers may be longer, branches are not asked unless `eval.branches` says so
MERGE_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "della", "sce")


class Settings(BaseModel):
    """A group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def inner(cls, name: str) -> type["Settings"] | None:
        """The kind of settings that a field holds: one, one or none, or a list of them. None for a single setting.

        >>> Config.inner("teachers").__name__, EvalConfig.inner("final").__name__, Config.inner("seed")
        ('TeacherConfig', 'FinalConfig', None)
        """
        annotation = cls.model_fields[name].annotation
        kinds = [k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, Settings)]
        return kinds[0] if kinds else None


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"`{name}` also names a folder: use letters, digits, - and _, and begin with a letter or a digit"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
Choice = Literal["auto", "on", "off"]
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


# --- teachers ----------------------------------------------------------------------------------------


class DataConfig(Settings):
    """How a source of rows is read."""

    split: str | None = Field(default=None, examples=["train"], description="which split of a dataset")
    subset: str | None = Field(default=None, examples=["main"], description="which subset (configuration) of a dataset")
    columns: dict[Role, str] = Field(
        default={},
        examples=[{"question": "problem", "reasoning": "thinking", "gold": "reward_model.ground_truth"}],
        description="what columns mean where their names do not say it; dots reach into a cell",
    )
    on_bad_row: Literal["skip", "stop"] = Field(
        default="skip",
        examples=["stop"],
        description="a row that cannot be used is left out and counted, or ends the run",
    )


class TeacherConfig(DataConfig):
    """Teachers, each with a LoRA branch of its own in every round."""

    name: FolderName = Field(
        examples=["first"], description="letters, digits, - and _; also the name of the teacher's folder"
    )
    data: str | tuple[str, ...] = Field(
        default=(),
        examples=["traces/first.jsonl"],
        description=".jsonl, .json, .csv, .tsv (each also .gz), .parquet, a saved dataset's folder, or a Hub name; "
        "several are joined",
    )
    samples: int | None = Field(
        default=None, ge=1, examples=[1000], description="draw this many traces; all unless given"
    )
    seed: int | None = Field(default=None, examples=[0], description="seed of that draw; the run's unless given")
    verified_only: bool = Field(
        default=False,
        examples=[True],
        description="leave out traces whose final answer is not the row's right one (gold)",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, examples=[5e-5], description="in place of branch.learning_rate, for this teacher alone"
    )
    union: tuple["TeacherConfig", ...] = Field(
        default=(),
        examples=[[{"name": "third", "data": "traces/third.jsonl"}, {"name": "fourth", "data": "traces/fourth.jsonl"}]],
        description="in place of data: the traces of several teachers, each read as its own settings say, in one "
        "branch",
    )

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
        """The places of its rows."""
        if self.union:
            return tuple(source for member in self.members for source in member.sources)
        return (self.data,) if isinstance(self.data, str) else self.data


# --- branch ------------------------------------------------------------------------------------------


class BranchConfig(Settings):
    """How one teacher's adapter is trained in one round."""

    steps: int | None = Field(default=50, ge=1, description="optimizer steps")
    epochs: float | None = Field(
        default=None, gt=0, examples=[1.0], description="in place of steps: passes over the teacher's traces"
    )
    batch_size: int = Field(default=4, ge=1, examples=[1], description="traces computed at once; memory grows with it")
    gradient_accumulation: int = Field(
        default=4, ge=1, examples=[16], description="a step sees batch_size * gradient_accumulation traces"
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        examples=[16384],
        description="tokens computed at once, padding included, in place of batch_size traces: short ones go together",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="its peak, after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="the learning rate after the warm-up"
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps; the last of them has the full learning rate"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="larger gradients are scaled down to this norm")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_length: int = Field(default=4096, ge=2, description="tokens; a longer trace is left out and counted, never cut")
    loss_chunk: int = Field(default=1024, ge=1, description="tokens whose logits are held at once")
    activation_checkpointing: bool = Field(default=True, description="less memory, a third more time")
    offload: Choice = Field(
        default="auto",
        description="keep the inputs of checkpointed layers in host memory; auto is on a GPU where they would take "
        "more than a tenth of its memory",
    )
    liger: Choice = Field(
        default="auto", description="Liger's fused kernels; auto is on a GPU where liger-kernel is installed"
    )
    save_steps: int | None = Field(
        default=None, ge=1, examples=[25], description="save a state to resume from every so many steps"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(),
        examples=["tensorboard"],
        description="log every step to tensorboard, wandb or trackio; one, or a list",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> object:
        return (value,) if isinstance(value, str) else cast("object", value)

    @field_validator("offload", "liger", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else cast("object", value)  # as YAML has it

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, value: Any) -> object:
        if isinstance(value, dict) and "steps" not in value and cast("dict[str, Any]", value).get("epochs") is not None:
            return {"steps": None, **cast("dict[str, Any]", value)}
        return cast("object", value)

    @model_validator(mode="after")
    def _one_length(self) -> "BranchConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self

    @model_validator(mode="after")
    def _has_what_to_offload(self) -> "BranchConfig":
        if self.offload == "on" and not self.activation_checkpointing:
            raise ValueError(
                "`offload: on` moves the inputs of checkpointed layers: set `activation_checkpointing: true`"
            )
        return self

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


# --- lora --------------------------------------------------------------------------------------------


class LoraConfig(Settings):
    """The adapter of every branch."""

    r: int = Field(default=16, ge=1, description="rank")
    alpha: float = Field(default=32, gt=0, description="the update is alpha / r * B @ A")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's inputs, while it trains")
    rslora: bool = Field(default=False, description="alpha / sqrt(r) in place of alpha / r")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="the layers that are adapted: all linear ones, a pattern, or [q_proj, v_proj]"
    )


# --- merge -------------------------------------------------------------------------------------------


def _check_numbers(setting: PerModule, holds: Callable[[float], bool], must: str) -> None:
    """Errors: ValueError for a pattern that is none; for a number that does not hold, as `must` says of {}."""
    for pattern, number in (setting if isinstance(setting, dict) else {".*": setting}).items():
        compiled(pattern)
        if not holds(number):
            raise ValueError(must.format(number))


def _place(method: Any) -> object:
    """A function's place, so that a run's record of it can be read again."""
    name = getattr(method, "__qualname__", None)
    return f"{method.__module__}:{name}" if name else cast("object", method)


def _known_method(method: str) -> str:
    if method not in MERGE_METHODS and not re.fullmatch(r"[\w.]+:[\w.]+", method):
        raise ValueError(f"unknown method `{method}`; use {', '.join(MERGE_METHODS)}, or module:function of your own")
    return method


def _not_negative(weight: PerModule) -> PerModule:
    _check_numbers(weight, lambda x: x >= 0, "weights must not be negative, but one is {}")
    return weight


def _with_patterns(weight: PerModule) -> PerModule:
    _check_numbers(weight, lambda _: True, "")
    return weight


Weight = Annotated[PerModule, AfterValidator(_not_negative)]
SignedWeight = Annotated[PerModule, AfterValidator(_with_patterns)]


def _name_or_numbers(weights: Any) -> str:
    """Which of the two forms of weights is meant, so that an error speaks of that one."""
    return "[name]" if isinstance(weights, str) else "[numbers]"


Weights = Annotated[
    Annotated[Literal["uniform", "validation", "greedy"], Tag("[name]")]
    | Annotated[tuple[Weight, ...], Tag("[numbers]")],
    Discriminator(_name_or_numbers),
]


class MethodConfig(Settings):
    """How updates become one, but for their weights."""

    method: Annotated[str, BeforeValidator(_place), AfterValidator(_known_method)] = Field(
        default="linear",
        description="the exact mean; or "
        f"{', '.join(MERGE_METHODS[1:])}; or module:function, a Python function of your own",
    )
    density: PerModule | None = Field(
        default=None, examples=[0.5], description="share of entries kept; every method but linear needs one"
    )
    scale: PerModule = Field(default=1.0, description="factor of the merged update")
    space: Literal["core", "knots"] | None = Field(
        default=None,
        examples=["core"],
        description="merge in the adapters' common space; in that of the weights unless given",
    )

    @field_validator("density")
    @classmethod
    def _density_in_range(cls, density: PerModule | None) -> PerModule | None:
        if density is not None:
            _check_numbers(density, lambda x: 0 < x <= 1, "density must be in (0, 1], not {}")
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
    """The merge spec of `mot-lora merge --spec`: one weight for each adapter, which may differ by module.

    With a negative weight, linear and dare_linear are sums and no means; a negative scale subtracts the merge.
    """

    weights: tuple[SignedWeight, ...] | None = None


class RoundMergeConfig(MethodConfig):
    """How the branches of a round become one update. Numbers may differ by module: `{mlp.*: 0.3, .*: 0.5}`, the first
    pattern that matches counts.
    """

    weights: Weights = Field(
        default="uniform",
        description="uniform is the plain mean; [1, 2] has a number for each teacher; validation weighs each branch by "
        "its accuracy on eval.validation; greedy lets a branch join only if the merge does not get worse there",
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Nesterov's, over the updates of the rounds")

    @field_validator("scale")
    @classmethod
    def _scale_in_range(cls, scale: PerModule) -> PerModule:
        _check_numbers(scale, lambda x: x > 0, "scale must be above 0, not {}")
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


# --- eval --------------------------------------------------------------------------------------------


class FinalConfig(Settings):
    """Ask the student once more when all rounds are done. What is not given is as after each round."""

    round: Literal["best", "last"] = Field(default="best", description="whose student is asked")
    samples: int | None = Field(default=None, ge=1, examples=[16], description="answers to each question")
    temperature: float | None = Field(default=None, ge=0, examples=[0.6], description="of sampling; 0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1, examples=[0.95], description="of sampling")
    max_new_tokens: int | None = Field(default=None, ge=1, examples=[8192], description="tokens of an answer at most")
    limit: int | None = Field(default=None, ge=1, examples=[500], description="ask only the first questions")
    batch_size: int | None = Field(default=None, ge=1, examples=[8], description="questions at once")


class EvalConfig(DataConfig):
    """What is measured after each round, and decides which round is best."""

    data: str | None = Field(
        default=None,
        examples=["heldout.jsonl"],
        description="questions with right answers; without them the loss on held-out traces decides",
    )
    validation: str | None = Field(
        default=None, examples=["dev.jsonl"], description="other questions, by which merge.weights are found"
    )
    forgetting: dict[FolderName, str] = Field(
        default={},
        examples=[{"sums": "reasoning_gym:chain_sum", "own": "short.jsonl"}],
        description="sets of questions on which the student must not get worse",
    )
    traces: tuple[TeacherConfig, ...] = Field(
        default=(),
        examples=[[{"name": "other", "data": "traces/other.jsonl"}]],
        description="teachers on whose held-out traces the loss is measured; the run's own unless given",
    )
    limit: int | None = Field(
        default=None, ge=1, examples=[200], description="ask only the first questions of each set"
    )
    branches: bool | None = Field(
        default=None,
        examples=[True],
        description=f"also measure each teacher's branch; unless given, where answers have at most {LONG:,} tokens",
    )
    batch_size: int = Field(
        default=16, ge=1, description="questions at once, each with all its samples; halved where memory runs out"
    )
    max_new_tokens: int = Field(default=2048, ge=1, description="tokens of an answer at most")
    samples: int = Field(
        default=1,
        ge=1,
        examples=[4],
        description="answers to each question; the score is avg@n. More than 1 needs a temperature above 0",
    )
    temperature: float = Field(default=0.0, ge=0, examples=[0.6], description="of sampling; 0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, examples=[0.95], description="of sampling")
    holdout: float = Field(
        default=0.1, ge=0, lt=1, description="share of the questions whose traces are only measured, never trained on"
    )
    overlap: int = Field(
        default=13,
        ge=0,
        description="leave out traces whose question shares this many words in a row with one of eval.data; 0 compares "
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


# --- stop and compare --------------------------------------------------------------------------------


class StopConfig(Settings):
    """When a run ends early, and which of its rounds is the best."""

    metric: Literal["auto", "accuracy", "loss"] = Field(
        default="auto",
        description="by which rounds are compared; auto is accuracy where eval.data is given, else the held-out loss",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        examples=[2],
        description="stop after so many rounds without improvement; never unless given",
    )


class CompareConfig(Settings):
    """What `mot-lora compare` adds to a run."""

    noisy: TeacherConfig | None = Field(
        default=None,
        examples=[{"name": "noisy", "data": "traces/noisy.jsonl"}],
        description="the noisy teacher of the robustness arms",
    )


# --- the run -----------------------------------------------------------------------------------------


class Config(Settings):
    """Everything that decides a run.

    >>> Config(student="Qwen/Qwen3-0.6B", teachers=({"name": "a", "data": "a.jsonl"},)).rounds
    5
    """

    student: str = Field(
        examples=["Qwen/Qwen3-0.6B"],
        description="a Hub name or a folder, stored in 16 or 32 bits; it is quantized in memory",
    )
    teachers: tuple[TeacherConfig, ...]
    rounds: int = Field(default=5, ge=1, description="train every branch, merge, fold, measure; and again")
    branch: BranchConfig = BranchConfig()
    lora: LoraConfig = LoraConfig()
    quantization: Literal["nf4", "int8", "none"] = Field(
        default="nf4", description="how the student is kept in memory while it trains and answers"
    )
    merge: RoundMergeConfig = RoundMergeConfig()
    eval: EvalConfig = EvalConfig()
    stop: StopConfig = StopConfig()
    compare: CompareConfig = CompareConfig()
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where it runs; auto is a GPU where there is one"
    )
    trust_remote_code: bool = Field(default=False, description="run the code that a student on the Hub brings along")
    seed: int = Field(default=0, description="of everything that is drawn at random")
    output: str = Field(
        default="runs/run",
        examples=["runs/mine"],
        description="the run's folder, seen from where the command is called",
    )

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
        return self

    @model_validator(mode="after")
    def _noisy_teacher_is_another(self) -> "Config":
        noisy = self.compare.noisy
        if noisy and noisy.name.casefold() in (t.name.casefold() for t in self.teachers):
            raise ValueError(f"compare.noisy: `{noisy.name}` is also a teacher; give it a name of its own")
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self) -> "Config":
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
