"""Units, currencies, number words and months, as data."""

from __future__ import annotations

from fractions import Fraction

# name -> (dimension, size in the dimension's first unit)
UNITS: dict[str, tuple[str, Fraction]] = {}


def _add(dimension: str, size: Fraction | int | str, *names: str) -> None:
    for name in names:
        UNITS[name] = (dimension, Fraction(size))


_add("length", 1, "m", "meter", "meters", "metre", "metres")
_add("length", "1/100", "cm", "centimeter", "centimeters", "centimetre", "centimetres")
_add("length", "1/1000", "mm", "millimeter", "millimeters", "millimetre", "millimetres")
_add("length", 1000, "km", "kilometer", "kilometers", "kilometre", "kilometres", "千米", "公里")
_add("length", "0.0254", "inch", "inches", "in")
_add("length", "0.3048", "ft", "foot", "feet")
_add("length", "0.9144", "yd", "yard", "yards")
_add("length", "1609.344", "mi", "mile", "miles")
_add("area", 1, "m^2", "square meters", "square metres", "sq m")
_add("area", "1/10000", "cm^2", "square centimeters", "square centimetres", "sq cm")
_add("area", "0.09290304", "ft^2", "square feet", "sq ft")
_add("area", "0.00064516", "in^2", "square inches", "sq in")
_add("volume", 1, "l", "liter", "liters", "litre", "litres")
_add("volume", "1/1000", "ml", "milliliter", "milliliters", "millilitre", "millilitres", "cm^3", "cubic centimeters")
_add("volume", 1000, "m^3", "cubic meters", "cubic metres")
_add("mass", 1, "g", "gram", "grams")
_add("mass", 1000, "kg", "kilogram", "kilograms", "公斤", "千克")
_add("mass", "1/1000", "mg", "milligram", "milligrams")
_add("mass", "453.59237", "lb", "lbs", "pound", "pounds")
_add("mass", "28.349523125", "oz", "ounce", "ounces")
_add("time", 1, "s", "sec", "secs", "second", "seconds", "秒")
_add("time", 60, "min", "mins", "minute", "minutes", "分钟")
_add("time", 3600, "h", "hr", "hrs", "hour", "hours", "小时")
_add("time", 86400, "day", "days")
_add("time", 604800, "week", "weeks")
_add("months", 1, "month", "months")
_add("months", 12, "year", "years")
_add("speed", 1, "m/s", "meters per second", "metres per second")
_add("speed", "5/18", "km/h", "kmh", "kph", "kilometers per hour", "kilometres per hour")
_add("speed", "0.44704", "mph", "miles per hour", "mi/h")
_add("angle", 1, "degree", "degrees", "deg", "^\\circ", "度")
_add("radians", 1, "rad", "rads", "radian", "radians")
_add("celsius", 1, "^\\circ c", "degrees celsius", "celsius", "c")
_add("fahrenheit", 1, "^\\circ f", "degrees fahrenheit", "fahrenheit", "f")
_add("dollars", 1, "$", "usd", "dollar", "dollars", "us$")
_add("dollars", "1/100", "cent", "cents", "¢")
_add("euros", 1, "€", "eur", "euro", "euros")
_add("pounds sterling", 1, "£", "gbp")
_add("yen", 1, "¥", "yen", "jpy", "円")
_add("rupees", 1, "₹", "inr", "rupee", "rupees")

# one letter is a unit only in \text{} or after a space, and these two only after a degree sign
ONE_LETTER = ("m", "l", "g", "s", "h")

SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: number for number, word in enumerate(_ONES)}
NUMBER_WORDS |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
NUMBER_WORDS |= {f"{ten}-{one}": 10 * t + o for t, ten in enumerate(_TENS, 2) for o, one in enumerate(_ONES[1:10], 1)}
NUMBER_WORDS |= {"hundred": 100, "thousand": 1000, "one hundred": 100, "a hundred": 100, "one thousand": 1000}

_MONTHS = "january february march april may june july august september october november december".split()
MONTHS = {name: number for number, name in enumerate(_MONTHS, 1)} | {
    name[:3]: number for number, name in enumerate(_MONTHS, 1)
}

# words that stand for no solution or no value
SYNONYMS = {
    "no solution": "no solution", "no solutions": "no solution", "no real solution": "no solution",
    "no real solutions": "no solution", "empty set": "no solution", "\\emptyset": "no solution",
    "\\varnothing": "no solution", "dne": "does not exist", "does not exist": "does not exist",
}  # fmt: skip
# words after a number that change its value
NOT_UNITS = frozenset(
    "and or mod sin cos tan log ln sqrt times pi plus minus over divided to the if for when where x y z of is base "
    "infinity frac cdot".split()
)
