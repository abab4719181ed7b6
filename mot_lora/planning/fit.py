"""Whether a run fits on a card, and how long it takes: told before any weight is loaded."""

from collections.abc import Sequence
from typing import Any

from mot_lora.config import Config
from mot_lora.planning.cards import Card
from mot_lora.planning.need import STEP, Need, Part, TeacherPlan, Work, peak_of
from mot_lora.records import DataRecord, Record
from mot_lora.text import size

SHORTEST = 512  # tokens; it is no use to train on less
SMALL_CHUNK = 256
SMALL_RANK = 8


class PlanRecord(Record):
    """What a run needs, and whether it fits: bytes by part, and the most that is held at once beside what the card has.

    `tokens` has the longest trace that is planned for, `longest` the longest that fits, with these settings. `seconds`
    are of all training, at half of what the card's maker says of it, and `losing` of all held-out losses; `answering`
    of all answers, where each is as long as it may be. `change` has the settings with which it would fit, `remarks`
    what is to be known of the data.
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
    """What a run needs of a card, from the shapes of its tensors alone.

    architecture: the student's config.json; work: what the data has it do, of which each trace is taken to have
    branch.max_length tokens where it is not known. One training step is run without data, see `footprint`. With
    `search`, also the longest trace that fits, and what to change where it does not.

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
    """The fewest settings with which a trace of so many tokens fits: first those that change nothing of what is learned
    but its rounding, then a smaller rank, then a smaller max_length. Empty where nothing helps.
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
    for asked in (wanted, [*wanted, rank] if config.lora.r > SMALL_RANK else wanted):
        if Need(_with(config, asked), architecture, card).fits(tokens):
            return _told(_fewest(config, asked, architecture, card, tokens))
    longest = Need(_with(config, wanted), architecture, card).longest()
    if longest < SHORTEST:
        return ()
    return *_told(_fewest(config, wanted, architecture, card, longest)), f"branch.max_length={longest}"


Setting = tuple[str, dict[str, Any]]  # a section of the config, or "" for its own settings, and some of them


def _fewest(
    config: Config, settings: Sequence[Setting], architecture: str, card: Card, tokens: int
) -> Sequence[Setting]:
    """Those without which so many tokens would not fit; the first are left out first."""
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


def _told(settings: Sequence[Setting]) -> tuple[str, ...]:
    """As the command line takes them."""
    return tuple(
        f"{f'{section}.' if section else ''}{key}={str(value).lower()}"
        for section, update in settings
        for key, value in update.items()
    )


def refusal(record: PlanRecord, data: DataRecord, host: int) -> str:
    """What to say of a run that does not fit on its card, or beside it into `host` free bytes: by whose trace, and what
    to do. Empty for one that fits.
    """
    needs = sum(p.bytes for p in record.parts if p.place == "host") if record.offload else 0
    if record.fits and needs <= host:
        return ""
    longest = max(data.teachers, key=lambda t: t.longest_tokens)
    trace = f"teacher `{longest.teacher}`: {longest.longest_row} has {longest.longest_tokens} tokens; training"
    if record.fits:
        free = f"offloads {size(needs)} to host memory, of which {size(host)} are free"
        return f"{trace} {free}; set branch.offload=off or a smaller branch.max_length, or go on with --force"
    has = f"{record.card} has {size(record.capacity)} for it"
    do = f"set {' '.join(record.change)}" if record.change else "take a smaller student, or a larger card"
    enough = f"enough for {record.longest}" if record.longest else f"too little for any of {STEP}"
    return (
        f"{trace} {record.student} on that takes {size(record.peak)}, and {has}, {enough}; {do}, or go on with --force"
    )
