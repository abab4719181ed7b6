"""The date that a chat template writes, the same on every day."""

from datetime import date

DATE = date(2024, 7, 26)  # which Llama's own templates fall back on
LETTERS = "aAbBcdeFHIjmMpSuUwWxXyY"


def dated(template: str) -> bool:
    """Whether a template writes today's date into what the student reads."""
    return "strftime_now" in template


def pinned(template: str) -> str:
    """The template with `DATE` as today: what a student reads does not depend on the day."""
    if not dated(template):
        return template
    codes = [f"%{flag}{letter}" for letter in LETTERS for flag in ("-", "")]
    told = "".join(f' | replace("{code}", "{DATE.strftime(code)}")' for code in codes)
    # the line's end is dropped after a block
    return f"{{% macro strftime_now(format) -%}}{{{{ format{told} }}}}{{%- endmacro %}}\n{template}"
