"""A line that fits its width: of its parts, what counts least gives way first.

rich's tables would shorten all columns alike and drop none; its file sizes count in thousands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import OverflowMethod
from rich.text import Text

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def sparkline(values: Sequence[float], width: int, in_ascii: bool = False) -> str:
    """Numbers as blocks from the lowest to the highest, averaged down to the width; those not finite leave a gap.

    >>> sparkline([4, 3, 2, 1, float("nan"), 1, 8, 8], 8), sparkline([1, 1, 2, 2, 3, 3], 3)
    ('▄▃▂▁ ▁██', '▁▅█')
    """
    n = min(width, len(values))
    cells = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    finite = [[v for v in cell if abs(v) < 1e300] for cell in cells]
    means = [sum(v / len(cell) for v in cell) if cell else None for cell in finite]
    low, high = min((m for m in means if m is not None), default=0), max((m for m in means if m is not None), default=0)
    blocks = ASCII_BLOCKS if in_ascii else BLOCKS
    return "".join(
        " " if m is None else blocks[round((m - low) / ((high - low) or 1) * (len(blocks) - 1))] for m in means
    )


@dataclass(frozen=True)
class Part:
    """A piece of a line: of two the one with the higher rank gives way; it is drawn between `least` and `most` wide."""

    rank: int
    draw: Callable[[int], Text]
    least: int
    most: int

    @classmethod
    def of(cls, rank: int, text: str, style: str = "") -> "Part":
        return cls(rank, lambda _width: Text(text, style), cell_len(text), cell_len(text))


def fit(parts: Sequence[Part], width: int, overflow: OverflowMethod) -> Text:
    """The parts in one line, two spaces between, without those that find no room."""
    parts = list(parts)
    while (spare := width + 2 - sum(p.least + 2 for p in parts)) < 0 and len(parts) > 1:
        parts.remove(max(parts, key=lambda p: p.rank))
    texts: list[Text] = []
    for p in parts:
        more = min(max(0, spare), p.most - p.least)
        spare -= more
        text = p.draw(p.least + more)
        text.truncate(p.least + more, overflow=overflow)
        texts.append(text)
    line = Text("  ", no_wrap=True).join(texts)
    line.truncate(width, overflow=overflow)
    return line


def clock_time(seconds: float) -> str:
    """As 3:40 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def size(count: int) -> str:
    """Bytes as people read them.

    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
