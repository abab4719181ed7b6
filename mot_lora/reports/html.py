"""Pages made from the templates beside this module; whatever comes from data is escaped."""

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Figure:
    """A picture on a page: an inline <svg>, which is the one markup that a template takes as it is, and its caption."""

    svg: str
    caption: str = ""


def render(template: str, **values: object) -> str:
    """A template filled with values. Errors: jinja2.UndefinedError for a value that the template has and nobody gave.

    >>> "<h1>a &amp; b</h1>" in render("base.html", title="a & b", overview={})
    True
    """
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("mot_lora.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
