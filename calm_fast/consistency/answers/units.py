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
_add("energy", 1, "j", "joule", "joules")
_add("energy", 1000, "kj", "kilojoule", "kilojoules")
_add("power", 1, "w", "watt", "watts")
_add("power", 1000, "kw", "kilowatt", "kilowatts")
_add("force", 1, "n", "newton", "newtons")
_add("voltage", 1, "v", "volt", "volts")
_add("current", 1, "amp", "amps", "ampere", "amperes")
_add("resistance", 1, "ohm", "ohms")
_add("kelvin", 1, "k", "kelvin", "kelvins")
_add("frequency", 1, "hz", "hertz")
_add("frequency", 1000, "khz", "kilohertz")
_add("pressure", 1, "pa", "pascal", "pascals")
_add("pressure", 1000, "kpa", "kilopascals")
_add("amount", 1, "mol", "mole", "moles")
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

# letters that are a unit only in \text{} or after a space
NEED_SPACE = ("m", "l", "g", "s", "h", "j", "w", "n", "v", "k", "pa", "kw", "kj", "hz", "mol", "amp")
CAPITALS = ("j", "w", "n", "v", "k")  # of these, the ones that are a unit as capitals only
# after a number and a slash: "18/day"; of UNITS those that are written out count too
PER = ("person", "item", "unit", "piece", "student", "gallon", "ticket", "share", "page")

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
LARGE_WORDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# no "second", which is a time
PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000,
}  # fmt: skip
PARTS |= {f"{word}s": number for word, number in PARTS.items() if word != "half"} | {"halves": 2}

_MONTHS = "january february march april may june july august september october november december".split()
MONTHS = {name: number for number, name in enumerate(_MONTHS, 1)} | {
    name[:3]: number for number, name in enumerate(_MONTHS, 1)
}

# words that stand for no solution or no value
SYNONYMS = {
    "no solution": "no solution", "no solutions": "no solution", "no real solution": "no solution",
    "no real solutions": "no solution", "empty set": "no solution", "\\emptyset": "no solution",
    "\\varnothing": "no solution", "\\{\\}": "no solution", "\\{ \\}": "no solution",
    "dne": "does not exist", "does not exist": "does not exist",
}  # fmt: skip
# words after a number that change its value
NOT_UNITS = frozenset(
    "and or mod sin cos tan log ln sqrt times pi plus minus over divided to the if for when where x y z of is base "
    "infinity frac cdot".split()
)
