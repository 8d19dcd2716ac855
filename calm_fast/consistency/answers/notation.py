"""One notation for answers: Unicode, programming and calculator notation become LaTeX before anything is compared."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ", "0123456789+-nx", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPER)}]+")
_LOWERED = re.compile(f"[{''.join(_SUB)}]+")
_GREEK = {
    "π": "pi", "θ": "theta", "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "λ": "lambda",
    "μ": "mu", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega",
}  # fmt: skip
_SIGNS = {
    "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∞": r"\infty ",
    "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "…": r"\ldots ", "⋯": r"\ldots ", "→": r"\to ",
    "≈": r"\approx ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "∣": "|", "′": "'", "∶": ":", "∖": r"\setminus ",
    "，": ", ", "、": ", ", "；": "; ", "٫": ".", "٬": ",",
    **dict.fromkeys("−–—‒﹣－‐‑⁃", "-"), **{letter: f"\\{name} " for letter, name in _GREEK.items()},
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", ""),
}  # fmt: skip
_SIGN = re.compile(f"[{re.escape(''.join(_SIGNS))}]")
_ROOT = re.compile(r"(?P<which>[√∛∜])\s*(?:\((?P<group>[^()]*)\)|(?P<one>\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+))")
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sqrt|cbrt)\s*(?=\()")
_NAMES = re.compile(r"(?<![\\A-Za-z{])(pi|infinity|infty|inf|oo|theta|alpha|beta)(?![A-Za-z])", re.IGNORECASE)
_GROUPED = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\\,|\\ |\\;|\\:|\\!|~|[\u00a0\u2007\u2009\u202f_'’]|\\thinspace ?)\d{3})+)(?![\d])"
)
_GAP = re.compile(r"\\[,;:! ]|~|[\u00a0\u2007\u2009\u202f_'’]|\\thinspace ?")
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mathtt|operatorname|mbox|boldsymbol|bm|bf|rm)\s*"
)
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?")
_REALS = re.compile(
    r"(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?:the )?(?:set of )?(?:all )?(?:the )?(?:real numbers|reals)\s*\}?\.?",
    re.IGNORECASE,
)
# the real root, which every school means; sympy's would be complex
_ODD_ROOT = re.compile(
    r"\\sqrt\s*\[\s*(\d*[13579])\s*\]\s*\{\s*-\s*(\d+(?:\.\d+)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})\s*\}"
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


@lru_cache(maxsize=65536)
def to_latex(answer: str) -> str:
    """Return `answer` in LaTeX: its digits ASCII, its signs commands, its powers braced."""
    text = answer
    if not text.isascii():
        text = _from_unicode(text)
    if "\\$" in text or "$" in text:
        text = _without_delimiters(text)
    text = text.replace("**", "^") if re.search(r"\w\s*\*\*\s*[\w(-]", text) else text
    text = _FUNCTION.sub(lambda name: "\\sqrt" if name[1] == "sqrt" else "\\sqrt[3]", text)
    text = re.sub(r"(\\sqrt(?:\[3\])?)\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}", text)
    text = _NAMES.sub(
        lambda name: (
            r"\pi " if name[1].lower() == "pi" else r"\infty " if name[1][0] in "iIoO" else f"\\{name[1].lower()} "
        ),
        text,
    )
    text = re.sub(r"\^\s*(-?\d{2,}|-\d)", r"^{\1}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\\(?:[dt]?binom)\s*(\d)\s*(\d)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\(?:degree|degrees)(?![A-Za-z])", r"^\\circ ", text)
    text = _GROUPED.sub(lambda number: number[1] + _GAP.sub("", number[2]), text)
    if re.fullmatch(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if "\\circ" in text and _TRIG.search(text):
        text = _DEGREES.sub(r"{\\frac{\1\\pi}{180}}", text)
    text = _ODD_ROOT.sub(r"(-\\sqrt[\1]{\2})", text).strip()
    return "\\mathbb{R}" if _REALS.fullmatch(text) else text


def _from_unicode(text: str) -> str:
    # before NFKC, which turns 5½ into 51/2 and x² into x2
    text = re.sub(r"[\u00bc-\u00be\u2150-\u215e\u2189]", _fraction, text)
    text = _RAISED.sub(lambda run: "^{" + "".join(_SUPER[sign] for sign in run.group()) + "}", text)
    text = _LOWERED.sub(lambda run: "_{" + "".join(_SUB[sign] for sign in run.group()) + "}", text)
    text = re.sub(r"(\d)\u0304|(\d)\u0305", lambda digit: rf"\overline{{{digit[1] or digit[2]}}}", text)
    text = _SIGN.sub(lambda sign: _SIGNS[sign.group()], text)
    text = "".join(character if character in _KEPT else unicodedata.normalize("NFKC", character) for character in text)
    text = _SIGN.sub(lambda sign: _SIGNS[sign.group()], text)
    text = "".join(_digit(character) for character in text)
    while (root := _ROOT.search(text)) is not None:
        inside = root["group"] if root["group"] is not None else root["one"]
        text = f"{text[: root.start()]}\\sqrt{_ROOTS[root['which']]}{{{inside}}}{text[root.end() :]}"
    return text


_KEPT = "\u00a0\u2007\u2009\u202f"  # spaces between groups of digits


def _fraction(sign: re.Match[str]) -> str:
    """Return a vulgar fraction as \\frac{a}{b}, which after a digit makes a mixed number."""
    above, _, below = unicodedata.normalize("NFKC", sign.group()).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _digit(character: str) -> str:
    if character.isascii() or not character.isdecimal():
        return character
    return str(unicodedata.decimal(character))


def _without_delimiters(text: str) -> str:
    """Return `text` without the $ around mathematics; one that stands before a number alone is a currency."""
    if text.count("$") - text.count("\\$") >= 2:
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.replace("\\$", "$")


def without_text_commands(text: str) -> str:
    r"""Return `text` with the words of \text{words} in their place."""
    for _ in range(3):
        replaced = re.sub(rf"{_TEXT_COMMAND.pattern}\{{([^{{}}]*)\}}", r" \1 ", text)
        if replaced == text:
            break
        text = replaced
    return text
