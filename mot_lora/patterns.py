"""Numbers by module: patterns of module names, as in PEFT's rank_pattern."""

import re
from collections.abc import Iterable

PerModule = float | dict[str, float]
"""A number, or numbers by module pattern: a regular expression for the end of a module's name (`q_proj`,
`layers.3.mlp.*`); the first match applies."""


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that matches a module's whole name or its end after a dot; None if none does.

    >>> first_match(["k_proj", "mlp.*"], "model.layers.0.mlp.up_proj")
    'mlp.*'
    """
    return next((p for p in patterns if compiled(p).fullmatch(module)), None)


def compiled(pattern: str) -> re.Pattern[str]:
    """A module pattern as a regular expression. Errors: ValueError for an invalid one."""
    try:
        re.compile(pattern)  # `a)(b` is invalid, but would be valid in the parentheses below
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"`{pattern}` is not a pattern of module names ({e})") from e


def for_module(setting: PerModule, module: str, default: float = 1.0) -> float:
    """The value of a setting for one module; `default` if no pattern matches.

    >>> for_module({"q_proj": 0.5}, "model.layers.0.self_attn.q_proj")
    0.5
    """
    if not isinstance(setting, dict):
        return setting
    key = first_match(setting, module)
    return default if key is None else setting[key]
