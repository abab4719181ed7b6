"""The live display of long work: lines that renew themselves in a terminal or a notebook, a log elsewhere.

rich.progress would write nothing to a log before the end, need ipywidgets in a notebook, and shorten all columns alike
on a narrow terminal; on a terminal it is rich that draws.
"""

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from threading import Lock

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from mot_lora.progress import Progress, silent
from mot_lora.reports.timeleft import Pace, TimeLeft
from mot_lora.text import Part, clock_time, fit, sparkline

LOG_WIDTH = 110  # as wide as the tables are
ROUND = re.compile(r"^round (\d+)\b")
SPARKS = 24  # columns of the sparkline
LOSSES = 10 * SPARKS  # the last ones, which it shows
HTML = '<pre style="margin:0;white-space:pre;overflow-x:auto;line-height:1.3">{code}</pre>'


class _Quiet(Console):
    """A console on which nothing is shown of work that goes on."""


def screen(as_json: bool = False, quiet: bool = False) -> Console:
    """Where people read: standard output, or standard error beside JSON; quiet shows nothing of work that goes on.

    >>> screen(quiet=True).print("the last line")
    the last line
    """
    on_terminal = (sys.stderr if as_json else sys.stdout).isatty()
    # with FORCE_COLOR rich would take a log for a terminal
    console = (_Quiet if quiet else Console)(stderr=as_json, force_interactive=None if on_terminal else False)
    if not on_terminal:
        console.width = LOG_WIDTH
    if isinstance(console.file, TextIOWrapper):
        console.file.reconfigure(errors="replace")  # a log in another encoding than UTF-8 is no reason to stop
    return console


@contextmanager
def live(
    console: Console | None = None,
    plan: Sequence[str] = (),
    quiet: bool = False,
    *,
    every: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show work that goes on, with the time left of the stage, the branch and of the run that `plan` names in order.

    A terminal and a notebook have a display that renews itself; anything else gets a line as a stage begins and then
    one every so many seconds.

    >>> with live(plan=["round 1, story, train"]) as progress:
    ...     progress("round 1, story, train", 0, 50)
    round 1, story, train  0/50
    """
    console = console or screen()
    if quiet or isinstance(console, _Quiet):
        yield silent
        return
    work = Work(plan, clock, console.encoding)
    show = _in_notebook if console.is_jupyter else _on_terminal if console.is_interactive else _as_log
    with show(console, work, every) as renew:

        def watch(
            stage: str,
            done: int,
            total: int,
            note: str = "",
            *,
            loss: float | None = None,
            tokens: int | None = None,
        ) -> None:
            begins = stage != work.stage
            work.update(stage, done, total, note, loss, tokens)
            renew(begins)

        yield watch


Renew = Callable[[bool], None]  # its argument: whether a stage begins


@contextmanager
def _on_terminal(console: Console, work: "Work", _every: float) -> Iterator[Renew]:
    with Live(work, console=console, transient=True):  # renews itself, so that the clock goes on in a long step
        yield lambda _begins: None


@contextmanager
def _as_log(console: Console, work: "Work", every: float) -> Iterator[Renew]:
    said, middle = 0.0, False

    def renew(begins: bool) -> None:
        nonlocal said, middle
        now, whole = work.now(), work.done >= work.total
        if begins or (middle if whole else now - said >= every):
            console.print(Text(work.line()), soft_wrap=True)
            said, middle = now, not (begins or whole)

    yield renew


@contextmanager
def _in_notebook(console: Console, work: "Work", _every: float) -> Iterator[Renew]:
    """One output that takes its own place: rich's live display needs ipywidgets, and is lost in a saved notebook."""
    from IPython.display import display

    handle, shown_at = None, -math.inf

    def put(shown: Work | Text) -> None:
        nonlocal handle
        paper = Console(
            file=StringIO(), record=True, width=console.width, color_system="truecolor", force_jupyter=False
        )
        paper.print(shown)
        html = paper.export_html(inline_styles=True, code_format=HTML, clear=False)
        bundle = {"text/html": html, "text/plain": paper.export_text().rstrip()}
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    def renew(begins: bool) -> None:
        nonlocal shown_at
        if begins or work.now() - shown_at >= 0.5:
            shown_at = work.now()
            put(work)

    end = "stopped at {0.stage} {0.done}/{0.total} after {0.elapsed}"
    try:
        yield renew
        end = "done in {0.elapsed}"
    finally:
        if handle:
            put(Text(end.format(work)))


class Work:
    """What is known of the work that goes on; rich draws it as one or two lines that fit the width."""

    def __init__(self, plan: Sequence[str], clock: Callable[[], float], encoding: str) -> None:
        self.now = clock
        self.stage = ""
        self.done = self.total = 0
        self._began = self._stage_began = clock()
        self._encoding = encoding
        self._ascii = not encoding.startswith("utf")
        self._note = ""
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._tokens = Pace()
        self._left = TimeLeft(plan)
        self._rounds = max((int(r[1]) for s in plan if (r := ROUND.match(s))), default=0)
        self._lock = Lock()  # a thread draws it on a terminal

    def update(self, stage: str, done: int, total: int, note: str, loss: float | None, tokens: int | None) -> None:
        """Take in what a progress was called with."""
        now = self.now()
        with self._lock:
            if stage != self.stage:
                self.stage, self._stage_began = stage, now
                self._losses.clear()
                self._tokens = Pace()
            self.done, self.total, self._note = done, total, note
            self._left.update(stage, done, total, now)
            if loss is not None:
                self._losses.append(loss)
            if tokens is not None:
                self._tokens.see(tokens, now)

    @property
    def elapsed(self) -> str:
        """Time since the work began, as 1:02:03."""
        return clock_time(self.now() - self._began)

    def line(self) -> str:
        """All of it, as a line of a log."""
        left = ", ".join(filter(None, self._times()))
        parts = (self.stage, f"{self.done}/{self.total}", self._note, self._loss(), self._speed(), left)
        return self._clean("  ".join(filter(None, parts)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            lines = self._lines() if self.stage else []
        for parts in lines:
            if parts := [p for p in parts if p.most]:
                yield fit(parts, options.max_width, "crop" if self._ascii else "ellipsis")

    def _lines(self) -> list[list["Part"]]:
        name = self._clean(self.stage)
        if self._rounds:
            name = ROUND.sub(rf"\g<0> of {self._rounds}", name)
        left, branch, run = self._times()
        spent = clock_time(self.now() - self._stage_began)
        losses = list(self._losses)
        sparks = min(SPARKS, len(losses)) if len(losses) > 1 else 0
        return [
            [
                Part(0, lambda _width: Text(name, "bold"), min(24, cell_len(name)), cell_len(name)),
                Part(3, lambda width: Text(self._bar(width), "cyan"), 6, 24),
                Part.of(1, f"{self.done}/{self.total}"),
                Part.of(5, spent, "dim"),
                Part.of(2, left),
                Part.of(4, branch.replace("branch", "branch left")),
            ],
            [
                Part.of(0, self._loss()),
                Part(3, lambda width: Text(sparkline(losses, width, self._ascii), "cyan"), min(8, sparks), sparks),
                Part.of(2, self._speed()),
                Part.of(1, run.replace("run", "run left")),
                Part.of(4, self._clean(self._note), "dim"),
            ],
        ]

    def _times(self) -> tuple[str, str, str]:
        """Time left of the stage, of its branch and of the run; empty where unknown, or the same as the one before."""
        now = self.now()
        stage, branch, run = self._left.stage(now), self._left.branch(now), self._left.run(now)
        return (
            "" if stage is None else f"left {clock_time(stage)}",
            "" if branch is None or branch == stage else f"branch {clock_time(branch)}",
            "" if run is None else f"run {clock_time(run)}",
        )

    def _loss(self) -> str:
        return f"loss {self._losses[-1]:.3f}" if self._losses else ""

    def _speed(self) -> str:
        return f"{1 / self._tokens.seconds:,.0f} tokens/s" if self._tokens.seconds else ""

    def _bar(self, width: int) -> str:
        halves = round(2 * width * min(1.0, max(0.0, self.done / self.total))) if self.total > 0 else 0
        full, half, rest = ("#", "#", "-") if self._ascii else ("━", "╾", "─")
        return (full * (halves // 2) + half * (halves % 2)).ljust(width, rest)

    def _clean(self, text: str) -> str:
        text = "".join(c if c.isprintable() else " " for c in text)
        return text.encode(self._encoding, "replace").decode(self._encoding)
