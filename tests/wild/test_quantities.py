"""Numbers: whatever way they are written they are the same, and no other number ever is."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mot_lora.data.moments import moment, same_moment
from mot_lora.data.quantities import quantity, same_quantity
from mot_lora.data.scoring import is_right
from mot_lora.data.units import unit

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
rationals = st.builds(Fraction, st.integers(-(10**12), 10**12), st.integers(1, 10**6))
decimals = st.builds(lambda n, places: Fraction(n, 10**places), st.integers(-(10**14), 10**14), st.integers(0, 9))


def point(value: Fraction) -> str:
    """A finite decimal in full."""
    digits = str(abs(value.numerator) * 10**12 // value.denominator).rjust(12, "0")
    whole, places = digits[:-12] or "0", digits[-12:].rjust(12, "0").rstrip("0")
    return ("-" if value < 0 else "") + whole + (f".{places}" if places else "")


def grouped(value: Fraction, sign: str) -> str:
    whole, dot, places = point(abs(value)).partition(".")
    return ("-" if value < 0 else "") + f"{int(whole):,}".replace(",", sign) + dot + places


FRACTIONS: list[Callable[[Fraction], str]] = [
    lambda v: f"{v.numerator}/{v.denominator}",
    lambda v: rf"\frac{{{v.numerator}}}{{{v.denominator}}}",
    lambda v: rf"\boxed{{\dfrac{{{v.numerator}}}{{{v.denominator}}}}}",
    lambda v: rf"\(-\frac{{{-v.numerator}}}{{{v.denominator}}}\)" if v < 0 else f"${v}$",
    lambda v: f"The answer is {v}." if v.denominator > 1 else f"x = {v}",
    lambda v: f"{3 * v.numerator}/{3 * v.denominator}",
    lambda v: (
        f"{'-' if v < 0 else ''}{abs(v) // 1} {(abs(v) % 1).numerator}/{(abs(v) % 1).denominator}" if v % 1 else str(v)
    ),
    lambda v: str(v).replace("-", "\u2212"),
    lambda v: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in str(v)),
]
DECIMALS: list[Callable[[Fraction], str]] = [
    point,
    lambda v: grouped(v, ","),
    lambda v: grouped(v, "{,}"),
    lambda v: grouped(v, r"\,"),
    lambda v: grouped(v, " "),
    lambda v: grouped(v, "\u202f"),
    lambda v: f"${grouped(v, ',')}" if v >= 0 else f"-${grouped(-v, ',')}",
    lambda v: f"{point(v)}0" if "." in point(v) else f"{point(v)}.0",
    lambda v: f"{point(v * 1000)}e-3",
    lambda v: rf"\boxed{{{point(v / 100)} \times 10^{{2}}}}",
    lambda v: f"**{point(v)}**",
    lambda v: f"The answer is {point(v)} apples.",
]


@pytest.mark.parametrize(("write", "among"), [(w, rationals) for w in FRACTIONS] + [(w, decimals) for w in DECIMALS])
def test_a_number_is_right_in_every_spelling_and_another_in_none(
    write: Callable[[Fraction], str], among: st.SearchStrategy[Fraction]
) -> None:
    @quick
    @given(among, among, st.integers(1, 10**5))
    def check(value: Fraction, other: Fraction, far: int) -> None:
        assert is_right(write(value), str(value))
        assert is_right(str(value), write(value))
        if other != value:
            assert not is_right(write(other), str(value))
        # however near, where it does not round to the same six places
        assert not is_right(write(value), str(value + Fraction(1, 7 * far)))

    check()


@quick
@given(rationals, st.integers(6, 12))
def test_a_decimal_of_six_digits_is_what_it_rounds_to(value: Fraction, places: int) -> None:
    short = round(value, places)
    assume(abs(short) >= 1)
    written = point(short)
    assume(len(written.partition(".")[2]) == places)
    assert is_right(written, str(value))
    for next_to in (short + Fraction(1, 10**places), short - Fraction(1, 10**places)):
        if len(point(next_to).partition(".")[2]) == places:  # a shorter one may be right in its own places
            assert not is_right(point(next_to), str(value))


@quick
@given(st.text(max_size=30), st.text(alphabet=r"0123456789.,-+/\{}^$ xefrac%:()[]", max_size=20))
def test_any_text_is_a_quantity_or_none(text: str, near: str) -> None:
    for t in (text, near):
        q, m = quantity(t), moment(t)
        assert q is None or same_quantity(q, q)
        assert m is None or same_moment(m, m)
        assert is_right(f"<think>{t}", "5") is False


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("cm", "centimeters"),
        ("square feet", "ft^2"),
        ("sq. ft.", "feet squared"),
        ("miles per hour", "mph"),
        ("km/h", "kilometres per hour"),
        ("Rs.", "rupees"),
        ("hrs", "hour"),
        ("inches", "in"),
    ],
)
def test_a_unit_in_two_spellings(text: str, other: str) -> None:
    assert unit(text) == unit(other) is not None


@pytest.mark.parametrize("text", ["apples", "", "x", "M", "m/s/t", "a", "5", "^", "per day", "\u00e9"])
def test_what_is_no_unit(text: str) -> None:
    assert unit(text) is None
