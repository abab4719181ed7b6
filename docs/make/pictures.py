"""The two pictures of How it works, as SVG. `python docs/make/pictures.py` draws them anew.

The packages are drawn from the layers that import-linter holds, so that the picture cannot say anything else.
"""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
ABOUT = {
    "cli": "the commands",
    "reports": "tables, charts, pages, live displays",
    "analysis": "questions asked of finished runs",
    "runs": "the loop and its folder",
    "planning": "does it fit, how long does it take",
    "training": "the student in memory, one branch of it",
    "adapters": "PEFT adapters in and out",
    "data": "rows to traces to tokens",
    "checkpoints": "full models on disk",
    "merging": "pure functions of tensors",
}
WIDTH, ROW, GAP, EDGE = 720, 46, 20, 16
BLUE, GREEN, GREY = ("#eaf1fb", "#3b6ea8"), ("#eaf6ec", "#3f8a4f"), ("#f3f3f3", "#8a8a8a")


def layers() -> list[list[str]]:
    """The layers of `mot_lora` from the top, each with the packages and modules that stand on it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    of = next(c["layers"] for c in contracts if c["containers"] == ["mot_lora"])
    return [[name.strip() for name in layer.replace(":", "|").split("|")] for layer in of]


def packages() -> str:
    """The packages, one below the other; the modules at the root, which all may use, at the foot."""
    rows = layers()
    above = [row for row in rows if set(row) <= set(ABOUT)]
    foot = [name for row in rows if row not in above for name in row]
    parts: list[str] = []
    for i, row in enumerate(above):
        top, width = EDGE + i * (ROW + GAP), (WIDTH - 2 * EDGE - GAP * (len(row) - 1)) / len(row)
        for k, name in enumerate(row):
            left = EDGE + k * (width + GAP)
            parts += _box(left, top, width, ROW, BLUE, name, ABOUT[name])
        parts += _arrow([(WIDTH / 2, top + ROW), (WIDTH / 2, top + ROW + GAP)])
    top = EDGE + len(above) * (ROW + GAP)
    parts += _box(EDGE, top, WIDTH - 2 * EDGE, ROW, GREY, "modules at the root", ", ".join(sorted(foot)))
    return _svg(WIDTH, top + ROW + EDGE, "The packages of mot_lora: each imports only from those below it", parts)


def loop() -> str:
    """One round, and what is kept of it."""
    parts = [
        *_box(16, 120, 130, 60, GREY, "W_0", "the base, read-only"),
        *_box(186, 120, 150, 60, BLUE, "student", "W_0 + ledger, in NF4"),
        *(
            part
            for i in range(3)
            for part in _box(386, 30 + 90 * i, 150, 60, GREEN, f"branch {i + 1}", f"LoRA on teacher {i + 1}")
        ),
        *_box(586, 120, 150, 60, BLUE, "merge", "of the true updates"),
        *_box(386, 330, 150, 60, GREY, "ledger", "adapters on disk"),
        *_box(16, 330, 170, 60, GREY, "export", "W_0 + ledger, in bf16"),
        *_arrow([(146, 150), (186, 150)]),
        *(part for y in (60, 150, 240) for part in _arrow([(336, 150), (361, 150), (361, y), (386, y)])),
        *(part for y in (60, 240) for part in _line([(536, y), (561, y), (561, 150)])),
        *_arrow([(536, 150), (586, 150)]),
        *_arrow([(661, 180), (661, 360), (536, 360)]),
        *_arrow([(386, 350), (261, 350), (261, 180)]),
        *_arrow([(386, 370), (186, 370)]),
        *_arrow([(81, 180), (81, 330)]),
        _text(324, 342, "next round", 12, "#444"),
    ]
    return _svg(752, 406, "One round: a branch for each teacher, their merge, the ledger, and the next student", parts)


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        'font-family="system-ui, sans-serif">'
    )
    tip = '<path d="M0 0 8 4 0 8z" fill="#444"/>'
    marker = f'<marker id="tip" markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto">{tip}</marker>'
    paper = f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<defs>{marker}</defs>", paper, *parts, "</svg>", ""])


def _box(x: float, y: float, width: float, height: float, colors: tuple[str, str], name: str, about: str) -> list[str]:
    fill, stroke = colors
    middle = x + width / 2
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}"/>',
        _text(middle, y + height / 2 - 4, name, 15, "#111", bold=True),
        _text(middle, y + height / 2 + 14, about, 12, "#444"),
    ]


def _text(x: float, y: float, said: str, size: int, color: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    look = f'text-anchor="middle" font-size="{size}"{weight} fill="{color}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(said)}</text>'


def _line(points: list[tuple[float, float]], more: str = "") -> list[str]:
    through = " ".join(f"{x:g},{y:g}" for x, y in points)
    return [f'<polyline points="{through}" fill="none" stroke="#444" stroke-width="1.5"{more}/>']


def _arrow(points: list[tuple[float, float]]) -> list[str]:
    return _line(points, ' marker-end="url(#tip)"')


DRAWN = {"packages.svg": packages, "loop.svg": loop}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")
