"""Units of measure, by the names that answers give them, and their sizes.

A table of our own in place of pint: sizes are exact fractions, dollars and cents are units too, and the names are also
needed as a pattern that finds a unit in a sentence.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = {
    "length": "1/1000 mm millimeter millimetre, 1/100 cm centimeter centimetre, 1/10 dm decimeter decimetre, "
    "1 m meter metre, 1000 km kilometer kilometre, 0.0254 in inch inche, 0.3048 ft foot feet, 0.9144 yd yard, "
    "1609.344 mi mile",
    "length^3": "1/1000000 ml milliliter millilitre, 1/1000 l L liter litre",
    "mass": "1/1000 mg milligram, 1 g gram gm, 1000 kg kilogram kilo, 1000000 t ton tonne, 453.59237 lb pound, "
    "28.349523125 oz ounce",
    "time": "1/1000 ms millisecond, 1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 week",
    "month": "1 month, 12 yr year",
    "dollar": "1 $ \u00a4 usd dollar, 1/100 \u00a2 cent",
    "euro": "1 \u20ac eur euro",
    "yen": "1 \u00a5 jpy yen",
    "rupee": "1 \u20b9 inr rs rupee",
    "angle": "1 ^\\circ \u00b0 degree deg",
    "radian": "1 rad radian",
    "celsius": "1 ^\\circc \u00b0c \u2103 celsius",
    "kelvin": "1 K kelvin",
    "force": "1 N newton, 1000 kN kilonewton",
    "energy": "1 J joule, 1000 kJ kilojoule, 4.184 cal calorie, 4184 kcal kilocalorie",
    "power": "1 W watt, 1000 kW kilowatt, 1000000 MW megawatt",
    "pressure": "1 Pa pascal, 1000 kPa kilopascal, 100000 bar, 101325 atm",
    "frequency": "1 Hz hertz, 1000 kHz kilohertz, 1000000 MHz megahertz",
    "voltage": "1 V volt",
    "current": "1 A ampere amp, 1/1000 mA milliampere",
    "amount": "1 mol mole, 1/1000 mmol millimole",
    "kilobyte": "1 KB kB kilobyte",  # of 1000 or of 1024 bytes
    "megabyte": "1 MB megabyte",
    "gigabyte": "1 GB gigabyte",
    "fahrenheit": "1 ^\\circf \u00b0f \u2109 fahrenheit",
}
_SHORT = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}
_EXPONENTS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3, "2": 2, "3": 3}
_UNIT = re.compile(
    r"(?:(square|sq|cubic|cu)\b\.?\s*)?(\^\\circ\s*[CF]?|[^\s\d{}^/.]+)\.?\s*(?:\^?\s*\{?([23])\}?|(squared|cubed))?"
)


@dataclass(frozen=True)
class Unit:
    """What is measured, and how much of it one is."""

    dimension: str
    size: Fraction


def _read_table() -> dict[str, Unit]:
    rows = [(dimension, row.split()) for dimension, rows in _TABLE.items() for row in rows.split(",")]
    return {name: Unit(dimension, _ratio(size)) for dimension, (size, *names) in rows for name in names}


def _ratio(text: str) -> Fraction:
    top, _, bottom = text.partition("/")
    return Fraction(top) / Fraction(bottom or "1")


_UNITS = _read_table()
_NAMES = "|".join(re.escape(n) for n in sorted({*_UNITS, *_SHORT} - {"in"}, key=len, reverse=True))  # 5 in all
UNIT = (
    rf"(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:{_NAMES})s?(?:\^\{{?[23]\}}?|[\u00b2\u00b3]|(?![a-z]))"
    rf"(?:(?:/|\s+per\s+)(?:{_NAMES})s?(?![a-z]))?"
)
"""A unit behind a number, in a sentence."""


def unit(text: str) -> Unit | None:
    """The unit that a text names, alone or by another one (km/h, dollars per hour); None for any other text.

    >>> unit("square feet") == unit("ft^{2}"), unit("km/h").dimension, unit("apples")
    (True, 'length/time', None)
    """
    text = text.strip()
    above, *below = (_named_unit(t) for t in re.split(r"\s*(?:/|\bper\b)\s*", _SHORT.get(text, text)))
    for u in below[:1]:
        above = above and u and Unit(f"{above.dimension}/{u.dimension}", above.size / u.size)
    return above if len(below) < 2 else None


def _named_unit(text: str) -> Unit | None:
    m = _UNIT.fullmatch(text)
    if not m:
        return None
    name = m[2].replace(" ", "")
    lower = name.lower() if len(name) > 1 else name
    found = _UNITS.get(name) or _UNITS.get(lower) or _UNITS.get(lower.removesuffix("s"))
    exponent = next((_EXPONENTS[g] for g in (m[1], m[3], m[4]) if g), 1)
    return found and Unit(found.dimension + (f"^{exponent}" if exponent > 1 else ""), found.size**exponent)
