"""Docstrings as Markdown: their examples, which begin with >>>, are code, and what else stands in them is text."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)
SKIPPED = re.compile(r"  # doctest: \+\w+$", re.MULTILINE)
CODE = re.compile(r"(`[^`]*`)")


def markdown(docstring: str) -> str:
    """A docstring with its examples as blocks of code.

    >>> markdown("The product <a, b>.\\n\\n>>> dot(a, b)  # doctest: +SKIP\\n4")
    'The product &lt;a, b>.\\n\\n```pycon\\n>>> dot(a, b)\\n4\\n```'
    """
    text, at = "", 0
    for example in EXAMPLE.finditer(docstring):
        text += _escaped(docstring[at : example.start()]) + f"```pycon\n{SKIPPED.sub('', example[0])}\n```"
        at = example.end()
    return text + _escaped(docstring[at:])


def _escaped(text: str) -> str:
    """What is not code, without what Markdown would take for HTML."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in CODE.split(text))


class Doctests(Extension):
    """Rewrites every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """As griffe has read an object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
