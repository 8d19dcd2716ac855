"""Read the value that follows an answer's marker: without marks, sentences and explanations around it."""

from __future__ import annotations

import re

from calm_fast.consistency.answers.markers import END_TOKEN

MOST = 10_000  # characters that are read after a marker
_LONGEST_WORDS = 12  # words of an answer that is neither a number nor mathematics

_LEAD = re.compile(r"(?:[ \t]|\*\*|__|[:：=]|\*(?=[ \t\n]))+")
_RULE = re.compile(r"[ \t]*(?:[-=_*]{3,})?[ \t]*\n")
_BULLET = re.compile(r"[ \t]*(?:[-*+•–·▪]|\(?\d{1,2}[.)])[ \t]+(?=\S)")
_QUOTE = re.compile(r"[ \t]*>[ \t]*")
_FENCE = re.compile(r"```[^\n`]*\n(?P<inside>.*?)\n?[ \t]*```|~~~[^\n]*\n(?P<other>.*?)\n?~~~", re.DOTALL)
_DISPLAY = re.compile(
    r"\\\[(?P<a>.*?)\\\]|\$\$(?P<b>.*?)\$\$"
    r"|\\begin\{(?P<env>equation|align|gather|displaymath|eqnarray|aligned|math)(?P<star>\*?)\}(?P<c>.*?)\\end\{(?P=env)(?P=star)\}",
    re.DOTALL,
)
# "$5 and she has $6" is no formula
_MATH = r"\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$(?!\s?\d[\d,.]*[,.;]?\s+[A-Za-z]{2})[^$\n]*[^$\n\\]\$"
_FORMULA = re.compile(_MATH)
_ABBREVIATION = re.compile(r"(?:\b(?:Dr|Mr|Mrs|Ms|St|Prof|No|vs|approx|ca|Jr|Sr)|\b[A-Za-z]\.[A-Za-z])$")
_STOP = re.compile(
    rf"(?P<skip>{_MATH}|\\[.;!?])|\n|(?P<dot>\.)(?=\s|$|[*_`\"'”’)\]]+(?:\s|$))|[!?](?=\s|$)|(?<=\w)!(?=[*_`\"'”’]*(?:\s|$))"
    rf"|;(?=\s|$)|[。！？；]|</|<br|[\"']?,\s*\"[^\"\n]*\"\s*:|\"\s*\}}|{END_TOKEN.pattern}"
)
_NUMBER = r"[-+±]?\s?(?:\\?[$€£¥₹]\s?)?[-+]?(?:\d[\d,.  ]*\d|\d|\.\d+)(?:\s?/\s?\d+)?(?:[eE][-+]?\d+)?(?:\s?%)?"
_LEADING_NUMBER = re.compile(_NUMBER)
_CHOICE = re.compile(
    r"(?:option|choice|answer)?\s*(?:[(\[（]\s*(?P<a>[A-J])\s*[)\]）]|(?P<b>[A-J])(?=$|[).:,;、，）]|\s+(?:because|since|as|which|\()|\s*[(（]))[.:]?"
    # small letters only where brackets or a word say that it is a choice, and no formula goes on
    r"|(?:(?:option|choice)\s+[(\[]?(?P<c>[a-j])\b[)\]]?|[(\[]?(?P<d>[a-e])[)\]](?!.*\s\(?[a-j]\)))(?=$|[.:;,]|\s)(?!\s*[-+*/^=(<>])",
)
_OF = re.compile(r"(?<=[\d%}$])\s+of\s+(?:the|an?|his|her|its|their|our|my|your|all|each|that|this)\b.*", re.DOTALL)
_CJK_NUMBER = re.compile(
    r"(?:有|是|为|為|需要|需|等于|等於|共|得到|剩下|剩|花了|花|用了|用|要)\s*(?P<value>[-+]?\d[\d,.]*(?:/\d+)?%?)(?=[^\x00-\x7f]|\s*$)"
)
_HEDGE = re.compile(
    r"(?:(?:therefore|thus|hence|then|simply|just|only|exactly|precisely|approximately|approx\.?|about|around|roughly"
    r"|nearly|almost|equal to|given by|clearly|indeed|actually|now|also|again|probably|likely|definitely|option|choice"
    r"|(?:la|le|die|the|el|a)(?=\s+(?:option\s+)?[(\[]?[A-J]\b)"
    r"|ungefähr|etwa|circa|ca\.|environ|donc|aproximadamente|aprox\.|also|circa|por tanto)\b[:,]?\s*"
    r"|(?:大约|大約|约为|约|約|およそ|약|等于|等於|选项|選項|选|選|是|为|為)\s*|(?:[≈~≃:=]|\\approx)\s*)+",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"(?:not|n't|neither|incorrect|wrong|correct|right|yet|unclear|because|below|above|in|on|at|by|found|obtained|calculated|computed"
    r"|determined|derived|shown|left|still|what|whether|supposed|expected|going|provided|verified|confirmed|different"
    r"|based|nicht|pas|no es)\b(?!\s*$)",
    re.IGNORECASE,
)
_OPENER = re.compile(
    r"(?:let|we|to|first|since|in|if|given|this|it|i|here|there|now|using|step|for|so|as|because|by|consider|note|when"
    r"|you|based|according|from|after|with|that)\b",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"=|\b(?:is|are|was|were|has|have|had|will|can|must|would|should|takes?|costs?|needs?|equals?|total(?:s|ed)?|remains?"
    r"|gets?|makes?|earns?|pays?|spends?|sold|bought|ate|left|there)\b",
    re.IGNORECASE,
)
_BECAUSE = re.compile(
    r"\s*,?\s+(?:and (?:this|that|it|he|she|they|we|so|there|not)|because|since|so that|so|which|where|when|but|due to"
    r"|after|thus|hence|therefore|i\.e\.|that is|meaning|as)\b.*|\s*[,，]?\s*(?:因为|因為|所以|なので|ので).*"
    r"|\s*,?\s+(?:weil|da|denn|parce que|car|porque|ya que)\b.*",
    re.DOTALL | re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\s*,\s+(?!(?:and|or)\b)[a-zà-ÿ]{2,}.*|\s+—\s+.*|\s+(?:–|--?)\s+[A-Za-z]{2}.*|\s*，\s*(?![\d$\\(（-]).*"
    # words in brackets, not the argument of a function, a pair or a factor
    r"|(?:\s+[(（](?!\s*(?:mod|base)\b)(?=[^()（）]*(?<![\\A-Za-z])[^\W\d_]{2})"
    r"|(?<=[^A-Za-z}\s])(?:\((?=[^()（）]*(?<![\\A-Za-z])[^\W\d_]{3})|（(?=[^()（）]*[^\W\d_])))[^()（）]*[)）].*",
    re.DOTALL,
)
_ENDING = re.compile(
    r"\s*(?:입니다|이에요|예요|이다|임|になります|となります|になる|となる|でした|である|です|でしょう|だ)$"
)
_GROUPS_OF_THREE = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d,])")  # 1.234,5
_EDGE = ' \t\r\n.,;:。，、；：`"“”‘’「」『』'
_PAIRS = (("**", "**"), ("__", "__"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("*", "*"), ("_", "_"),
          ("`", "`"), ("<b>", "</b>"), ("<strong>", "</strong>"), ("{", "}"))  # fmt: skip
_OPEN_TAG = re.compile(r"^(?:<(?:b|i|u|p|em|strong|code|mark|span|center)\b[^<>]*>\s*)+", re.IGNORECASE)
_BARE = re.compile(r"(?:\$[^$]+\$|\\\(.+\\\)|[(\[]?[A-J][)\]]?)")


def read_value(rest: str, *, label: bool = False, comma: bool = False) -> str | None:
    """Return the value at the start of `rest`, the text after a marker; None if there is none.

    label: the marker is a label; a sentence after it may be the solution instead of the answer. comma: the marker's
    language writes decimal commas.
    """
    rest = rest[:MOST]
    lead = _LEAD.match(rest)
    rest = rest[lead.end() :] if lead else rest
    own_line = False
    while (blank := _RULE.match(rest)) is not None:
        rest, own_line = rest[blank.end() :], True
    if own_line:
        lines = rest.split("\n")
        items = [line for line in _while_bullets(lines)]
        if items:
            values = [read_inline(item, label=label, comma=comma) for item in items]
            return ", ".join(value for value in values if value is not None) or None
        quote = _QUOTE.match(rest)
        rest = rest[quote.end() :] if quote else rest
    rest = rest.lstrip().removeprefix("**").lstrip()
    if (fence := _FENCE.match(rest)) is not None:
        lines = [line for line in (fence["inside"] or fence["other"] or "").split("\n") if line.strip()]
        return clean(lines[-1]) if lines else None
    if (display := _DISPLAY.match(rest)) is not None and (found := _formula_of(display)) is not None:
        tail = rest[display.end() :].split("\n")[0]
        return found if not _joins(tail) else read_inline(rest, label=label, comma=comma)
    return read_inline(rest, label=label, comma=comma)


def _while_bullets(lines: list[str]) -> list[str]:
    """Return the items of the list that `lines` begin with, at most ten."""
    items = []
    for line in lines[:10]:
        if (bullet := _BULLET.match(line)) is None:
            break
        items.append(line[bullet.end() :])
    return items


def _formula_of(display: re.Match[str]) -> str | None:
    """Return the contents of a display formula; of several aligned lines the last."""
    inside = next(text for text in (display["a"], display["b"], display["c"]) if text is not None)
    if display["c"] is not None:
        inside = inside.replace("&", "")
        inside = next((line for line in reversed(re.split(r"\\\\(?:\[[^\]]*\])?", inside)) if line.strip()), "")
    return clean(inside)


def _joins(tail: str) -> bool:
    """Return True if a formula's `tail` goes on with another formula: "$1$ and $2$"."""
    return re.match(rf"\s*(?:,|and\b|or\b|,\s*and\b|,\s*or\b)\s*(?:{_MATH})", tail) is not None


def read_inline(text: str, *, label: bool = False, comma: bool = False) -> str | None:
    """Return the value at the start of a sentence."""
    sentence, rest = _sentence(text)
    sentence = _strip_marks(sentence)
    hedge = _HEDGE.match(sentence)
    if hedge is not None and re.match(r"[\s*_(\[]*(?:[-+$€£¥\\]*[\d.]|\$|\\|[(\[]?[A-J]\b)", sentence[hedge.end() :]):
        sentence = _strip_marks(sentence[hedge.end() :])
    if not sentence:
        return None
    if (choice := _CHOICE.match(sentence)) is not None:
        return choice["a"] or choice["b"] or (choice["c"] or choice["d"]).upper()
    formula, number = _FORMULA.match(sentence), _LEADING_NUMBER.match(sentence)
    if formula is not None and number is None:
        return _read_formula(sentence, formula)
    if number is not None:
        sentence = _OF.sub("", _ASIDE.sub("", _BECAUSE.sub("", sentence)))
        return _finish(_ENDING.sub("", sentence), comma)
    return _read_words(sentence, rest, label, comma)


def _read_formula(sentence: str, formula: re.Match[str]) -> str | None:
    """Return a formula with its unit, or several formulas that are joined."""
    tail = sentence[formula.end() :]
    if _joins(tail):
        end = formula.end()
        while _joins(sentence[end:]):
            following = _FORMULA.search(sentence, end)
            assert following is not None  # `_joins` saw it
            end = following.end()
        joined = _FORMULA.sub(lambda match: clean(match.group()) or "", sentence[:end])
        return clean(joined)
    unit = _ENDING.sub("", _ASIDE.sub("", _BECAUSE.sub("", tail))).strip(_EDGE + "*_")
    value = clean(formula.group())
    if value is None or not unit or len(unit.split()) > 2 or not re.fullmatch(r"[^\W\d_][\w²³/%°. ^-]*|[%°]", unit):
        return value
    return None if re.match(r"(?:is|are|was|if|for|and|or)\b", unit) else f"{value} {unit}"


def _read_words(sentence: str, rest: str, label: bool, comma: bool) -> str | None:
    """Return an answer that begins with a word: a name, an equation, or the one number of a sentence."""
    if _REFUSED.match(sentence):
        # "found by adding: 5"
        return read_inline(sentence.split(":", 1)[1], comma=comma) if ":" in sentence else None
    plain = _ENDING.sub("", _BECAUSE.sub("", sentence)).strip()
    words = plain.split()
    if len(re.findall(r"\d[\d,./]*", plain)) == 1 and (number := _CJK_NUMBER.search(plain)) is not None:
        return clean(number["value"])
    values = [*_FORMULA.finditer(plain)] or [*re.finditer(rf"(?<![\w.,]){_NUMBER}(?![\w])", plain)]
    if len(words) > 2 and _VERB.search(plain) and values:
        if len(values) == 1:
            return _finish(values[0].group(), comma)
        if "=" not in plain or label:
            return None if label or len(words) > _LONGEST_WORDS else clean(plain)
    if "=" in plain or "\\" in plain:
        return clean(_ASIDE.sub("", plain) if _FORMULA.search(plain) is None else plain)
    if len(words) > _LONGEST_WORDS or (label and (_OPENER.match(plain) or len(words) > 6)):
        return None
    if label and rest.strip() and len(words) > 3:
        return None
    return clean(plain)


def _finish(value: str, comma: bool) -> str | None:
    """Return a numeric answer: the result of a calculation, with a decimal point."""
    value = _strip_marks(value)
    if "=" in value:
        left, _, right = value.rpartition("=")
        value = right if not re.search(r"[^\W\d_]{1}", left) else value
    if comma:
        value = _GROUPS_OF_THREE.sub(lambda number: number[1].replace(".", "") + "." + number[2], value)
        value = re.sub(r"(?<![\d.,])(\d+),(\d{1,2}|\d{4,})(?![\d,.])", r"\1.\2", value)
    return clean(value)


def _sentence(text: str) -> tuple[str, str]:
    """Split `text` after its first sentence or line."""
    for stop in _STOP.finditer(text):
        if stop["skip"] is not None:
            continue
        if stop["dot"] is not None and _ABBREVIATION.search(text, max(0, stop.start() - 8), stop.start()):
            if text[stop.end() :].strip():
                continue
        return text[: stop.start()], text[stop.end() :]
    return text, ""


def _strip_marks(text: str) -> str:
    """Return `text` without emphasis and punctuation at its edges that belong to no pair inside."""
    text = _OPEN_TAG.sub("", text.strip())
    for _ in range(4):
        before = text
        for start, end in _PAIRS:
            inside = text[len(start) : len(text) - len(end)]
            if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
                if start not in inside and end not in inside and not (start == "{" and "," in inside):
                    text = inside.strip()
        for mark in ("**", "__"):
            if text.count(mark) % 2:
                text = text[len(mark) :].strip() if text.startswith(mark) else text.removesuffix(mark).strip()
        if text.endswith("*") and text.count("*") % 2 and not text.endswith("**"):
            text = text[:-1].strip()
        text = text.rstrip(_EDGE) if not text.endswith("...") else text
        text = text.lstrip(' \t\r\n,;:。，、；：`"“”‘’「」『』')
        text = text + ")" if text.count("(") == 1 + text.count(")") and text.startswith("(") and "," in text else text
        if text.endswith("}") and text.count("}") > text.count("{"):
            text = text[:-1].rstrip()
        if text == before:
            break
    return text


def clean(value: str) -> str | None:
    """Return `value` without marks around it, None if it says nothing: punctuation alone is no answer."""
    for part in END_TOKEN.split(value):
        if part.strip():
            value = part
            break
    value = _strip_marks(value)
    if value.count("$") == 1 and value.endswith("$"):
        value = value[:-1].strip()
    return value if says_something(value) else None


def says_something(value: str) -> bool:
    """Return True if `value` has a letter, a digit, a comparison or a mathematical sign."""
    bare = re.sub(r"\\(?:text|mathrm|mathbf|left|right|quad|qquad|displaystyle|begin|end)\b|\\[()\[\],;:! ]", "", value)
    if any(character.isalnum() for character in bare):
        return True
    return any(character in "<>=≤≥≠∞∅√°π+−×÷±" for character in bare) and len(bare.strip()) <= 3


def is_bare_value(text: str) -> bool:
    """Return True if the whole of `text` is a number, a formula or the letter of a choice, with no more than a unit."""
    plain = _strip_marks(text)
    if "\n" in plain or len(plain) > 60:
        return False
    if _BARE.fullmatch(text.strip().strip("*").rstrip(".")) or _BARE.fullmatch(plain):
        return True
    number = _LEADING_NUMBER.match(plain)
    return number is not None and re.fullmatch(r"\s?[^\W\d_]{0,12}\.?", plain[number.end() :]) is not None
