"""The plan of a run: whether it fits on a card, and how long it takes."""

from collections.abc import Sequence
from typing import Any

from mot_lora.config import Config
from mot_lora.data.records import DataRecord
from mot_lora.planning.cards import Card
from mot_lora.planning.need import STEP, Need, Part, TeacherPlan, Work, peak_of
from mot_lora.records import Record
from mot_lora.text import size

SHORTEST = 512  # tokens; a shorter max_length is not suggested
SMALL_CHUNK = 256
SMALL_RANK = 8


class PlanRecord(Record):
    """What a run needs, and whether it fits: bytes by part, and peak memory beside the card's capacity.

    `tokens` is the longest trace of the plan, `longest` the longest that fits with these settings. `seconds` is the
    time of all training at half the card's nominal speed, `losing` of all held-out losses, `answering` of all answers
    if each has its maximum length. `change` lists settings with which the run would fit, `remarks` notes on the data.
    """

    student: str
    card: str
    capacity: int
    peak: int
    fits: bool
    offload: bool
    parts: tuple[Part, ...]
    teachers: tuple[TeacherPlan, ...]
    tokens: int
    longest: int | None
    rounds: int
    seconds: float | None
    losing: float | None = None
    answering: float | None = None
    change: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def plan(
    config: Config,
    architecture: str,
    card: Card,
    work: Work | None = None,
    search: bool = True,
) -> PlanRecord:
    """The plan of a run on a card, computed only from the shapes of its tensors.

    architecture: the student's config.json; work: lengths of traces and numbers of questions; a teacher without lengths
    is planned with traces of branch.max_length tokens. One training step is run without data, see `footprint`. With
    `search`, also find the longest trace that fits, and what to change if the run does not.

    Errors: UserError for a model that cannot be run without data.

    >>> plan(config, Path("Qwen3-8B/config.json").read_text(), find_card("RTX 4090")).fits  # doctest: +SKIP
    True
    """
    work = work or Work()
    known = work.lengths
    tokens = max(max(known.get(t.name) or (config.branch.max_length,)) for t in config.teachers)
    need = Need(config, architecture, card)
    parts = need.parts(tokens)
    peak = peak_of(parts)
    fits = peak <= card.bytes
    teachers = tuple(need.teacher(t.name, known.get(t.name, ()), tokens) for t in config.teachers)
    seconds = [t.seconds for t in teachers if t.seconds is not None]
    return PlanRecord(
        student=config.student,
        card=card.name,
        capacity=card.bytes,
        peak=peak,
        fits=fits,
        offload=need.offload(tokens),
        parts=tuple(parts),
        teachers=teachers,
        tokens=tokens,
        longest=need.longest() if search else None,
        rounds=config.rounds,
        seconds=config.rounds * sum(seconds) if seconds else None,
        losing=need.losing(work),
        answering=need.answering(work),
        change=() if fits or not search else changes(config, architecture, card, tokens),
    )


def changes(config: Config, architecture: str, card: Card, tokens: int) -> tuple[str, ...]:
    """The fewest settings with which a trace of `tokens` tokens fits: first those that change the result by rounding
    only, then a smaller rank, then a smaller max_length. Empty if nothing helps.
    """
    b, e = config.branch, config.eval
    one_by_one = {"batch_size": 1, "gradient_accumulation": b.traces}
    settings: list[tuple[bool, str, dict[str, Any]]] = [
        (config.quantization != "nf4", "", {"quantization": "nf4"}),
        (not b.activation_checkpointing, "branch", {"activation_checkpointing": True}),
        (b.batch_size > 1 and not b.batch_tokens, "branch", one_by_one),
        ((b.batch_tokens or 0) > tokens, "branch", {"batch_tokens": tokens}),
        (b.offload == "off" and card.is_gpu, "branch", {"offload": "auto"}),
        (b.loss_chunk > SMALL_CHUNK, "branch", {"loss_chunk": SMALL_CHUNK}),
        (e.data is not None and e.batch_size > 1, "eval", {"batch_size": 1}),
    ]
    wanted = [(section, update) for is_wanted, section, update in settings if is_wanted]
    rank = ("lora", {"r": SMALL_RANK})
    for tried in (wanted, [*wanted, rank] if config.lora.r > SMALL_RANK else wanted):
        if Need(_with(config, tried), architecture, card).fits(tokens):
            return _overrides(_fewest(config, tried, architecture, card, tokens))
    longest = Need(_with(config, wanted), architecture, card).longest()
    if longest < SHORTEST:
        return ()
    return *_overrides(_fewest(config, wanted, architecture, card, longest)), f"branch.max_length={longest}"


Setting = tuple[str, dict[str, Any]]  # a section of the config ("" for the top level), and values of its settings


def _fewest(
    config: Config, settings: Sequence[Setting], architecture: str, card: Card, tokens: int
) -> Sequence[Setting]:
    """The settings without which `tokens` tokens would not fit; the first are dropped first."""
    for setting in settings:
        less = [s for s in settings if s is not setting]
        if Need(_with(config, less), architecture, card).fits(tokens):
            settings = less
    return settings


def _with(config: Config, settings: Sequence[Setting]) -> Config:
    for section, update in settings:
        own = getattr(config, section).model_copy(update=update) if section else None
        config = config.model_copy(update={section: own} if section else update)
    return config


def _overrides(settings: Sequence[Setting]) -> tuple[str, ...]:
    """The settings as overrides on the command line."""
    return tuple(
        f"{f'{section}.' if section else ''}{key}={str(value).lower()}"
        for section, update in settings
        for key, value in update.items()
    )


def refusal(record: PlanRecord, data: DataRecord, host: int) -> str:
    """The message for a run that does not fit on its card, or in `host` free bytes of host memory: which trace is too
    long, and what to do. Empty for a run that fits.
    """
    needs = sum(p.bytes for p in record.parts if p.place == "host") if record.offload else 0
    if record.fits and needs <= host:
        return ""
    longest = max(data.teachers, key=lambda t: t.longest_tokens)
    trace = f"teacher `{longest.teacher}`: {longest.longest_row} has {longest.longest_tokens} tokens; training"
    if record.fits:
        free = f"offloads {size(needs)} to host memory, of which {size(host)} are free"
        return f"{trace} {free}; set branch.offload=off or a smaller branch.max_length, or run anyway with --force"
    has = f"{record.card} has {size(record.capacity)}"
    do = f"set {' '.join(record.change)}" if record.change else "use a smaller student or a larger card"
    enough = f"enough for {record.longest} tokens" if record.longest else f"too little even for {STEP} tokens"
    return (
        f"{trace} {record.student} on that takes {size(record.peak)}, and {has}, {enough}; {do}, or run anyway with "
        "--force"
    )
