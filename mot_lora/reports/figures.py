"""What all figures of the pages share: their style, their parts, and how one becomes SVG."""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1f"  # axes and text; on a page it becomes the page's own colour
# apart for colour-blind eyes, with a contrast of 3 or more on white and on near-black; the first three: Okabe and Ito
COLORS = ("#0072b2", "#d55e00", "#009e73", "#8a3ffc", "#be7daa", "#e1004b")
MARKS = "os^DvPX*"
WIDTH = 4.8  # inches: text of 10 points is then 10 pixels or more on a phone
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,  # a $ in a teacher's name is a $
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
P = ParamSpec("P")


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """A drawing function in the style of the page's figures."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        from matplotlib import rc_context  # half a second to load, only where something is drawn

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def short_names(names: Sequence[str], longest: int = 17) -> list[str]:
    """Names that fit a figure: the middle of a long one is left out, and where two then look alike all get numbers.

    >>> short_names(["gains_first", "a-teacher-with-a-very-long-name"])
    ['gains_first', 'a-teache\N{HORIZONTAL ELLIPSIS}ong-name']
    """
    half = longest // 2
    short = [n if len(n) <= longest else f"{n[:half]}\N{HORIZONTAL ELLIPSIS}{n[-half:]}" for n in names]
    if len(set(short)) < len(set(names)):
        short = [f"{i} {n[: longest - 3]}" for i, n in enumerate(names, 1)]
    return short


def svg(figure: "Figure", name: str, label: str) -> str:
    """A figure as one inline <svg>: text stays text in the page's font, and INK becomes `currentColor`.

    name: begins every id, so that several figures share a page; label: what a screen reader says. The same figure
    gives the same bytes.

    >>> from matplotlib.figure import Figure
    >>> svg(Figure((1, 1)), "empty", "an empty figure")[:59]
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"'
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has its own fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", out.getvalue(), flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]*)"', text)
    body = re.sub(r"<[^>]+>", lambda tag: _for_page(tag[0], name), text[text.index(">", text.index("<svg")) + 1 :])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size[1] if size else ""}" role="img" '
        f'stroke-linejoin="round" aria-label="{html.escape(label)}">{body}'
    )


def _for_page(tag: str, name: str) -> str:
    tag = tag.replace(' id="QuadMesh', ' shape-rendering="crispEdges" id="QuadMesh')  # no seams between cells
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag).replace("xlink:href", "href")
    tag = re.sub(r"font: (?:\w+ )*([\d.]+px)[^;\"]*", r"font-size: \1", tag)  # as matplotlib 3.9 writes it
    return re.sub(r"font-family: [^;\"]*;? ?", "", tag).replace(INK, "currentColor")


def blank(height: float) -> tuple["Figure", Any]:
    """A figure as wide as all of them, and its axes; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: "Figure") -> None:
    """Name the marks above the axes, in as many columns as fit."""
    labels = [str(label) for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    if labels:
        columns = max(1, 52 // (max(map(len, labels)) + 6))
        rows = math.ceil(len(labels) / columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * rows)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.5, columnspacing=1.2, borderpad=0)


def heat(
    figure: "Figure",
    axes: Any,
    values: Sequence[Sequence[float | None]],
    colors: str,
    low: float,
    high: float,
    numbers: bool = False,
) -> None:
    """Values as coloured cells with their bar, None as a hole; `numbers` also writes them into the cells."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps[colors].resampled(41)  # few enough that the bar is drawn in vectors too
    cells = [[math.nan if x is None else x for x in row] for row in values]
    edges = [[at - 0.5 for at in range(n + 1)] for n in (len(cells[0]) if cells else 0, len(cells))]
    mesh = axes.pcolormesh(*edges, cells, cmap=shades, vmin=low, vmax=high)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar: Any = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    for y, row in enumerate(values if numbers else ()):
        for x, value in enumerate(row):
            if value is not None:
                color = _readable(mesh.to_rgba(value))
                axes.text(x, y, f"{value:z.2f}", ha="center", va="center", color=color)


def _readable(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG's relative luminance)."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3])
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "white"


def color_of(i: int) -> str:
    """The colour of the i-th teacher."""
    return COLORS[i % len(COLORS)]
