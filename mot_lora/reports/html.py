"""The pieces of a page: sections, tables, figures, texts; everything from data is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from mot_lora.data.reasoning import THINK_END

LONG = 600  # characters of a text that stand open


def generated(text: str) -> str:
    """A generated text: the answer open, the chain of thought before it folded away, both whole."""
    thought, closed, answer = text.rpartition(THINK_END)
    if not closed and "<think>" in text:
        return folded_away("Reasoning that never ends", text)
    out = folded_away("Reasoning", thought + closed) if closed else ""
    return out + standing_open(answer.strip() or "(nothing)", "Answer")


def standing_open(text: str, what: str) -> str:
    """A text that stands open; of a long one only the end does, and the whole is folded away."""
    long = len(text) > LONG
    shown = f"... {text[-LONG // 2 :]}" if long else text
    return (folded_away(what, text) if long else "") + f'<p class="text" dir="auto">{escape(shown)}</p>'


def folded_away(what: str, text: str) -> str:
    return details(f"{what}, {len(text):,} characters", f'<div class="text" dir="auto">{escape(text)}</div>')


def table(columns: Sequence[str], rows: Iterable[tuple[str, str, Sequence[str]]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr class="{kind}"><th scope="row"><div>{escape(name)}</div></th>'
        + "".join(f"<td>{escape(c)}</td>" for c in cells)
        + "</tr>\n"
        for kind, name, cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def figure(svg: str, caption: str = "") -> str:
    return f"<figure>{svg}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>\n"


def grid(figures: str) -> str:
    return f'<div class="grid">\n{figures}</div>\n' if figures else ""


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def facts(known: Mapping[str, str]) -> str:
    """What one wants to know first, as a list of names and values; what is empty is left out."""
    found = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in known.items() if v)
    return f"<dl>{''.join(found)}</dl>\n"


def page(title: str, body: str) -> str:
    """A whole page around its body, in the package's style, that asks nothing of the network."""
    css = resources.files("mot_lora").joinpath("reports/report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}</main>
</body>
</html>
"""
