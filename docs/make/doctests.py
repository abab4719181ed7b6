"""Docstrings as Markdown: their examples, which begin with >>>, are code."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """A docstring with its examples as blocks of code.

    >>> fenced("Double it.\\n\\n>>> 2 * 2\\n4")
    'Double it.\\n\\n```pycon\\n>>> 2 * 2\\n4\\n```'
    """
    return EXAMPLE.sub(lambda m: f"```pycon\n{m[0]}\n```", docstring)


class Doctests(Extension):
    """Rewrites every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """As griffe has read an object."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
