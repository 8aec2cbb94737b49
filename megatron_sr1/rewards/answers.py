r"""Normal forms of short answers: text, numbers, quantities, options; without algebra.

Text is as written, plain or LaTeX. A parameter `cleaned` is text that `clean` returned.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_NUMBER_CHARACTERS = 60
DECIMAL_CLOSENESS = Fraction(2, 10**6)
"""Relative tolerance between a decimal and an exact number, such as 0.333333 and 1/3."""
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "’": "'", "‘": "'"}
    | {"⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "∨": r"\lor ", "∧": r"\land "}
    | {"≮": r"\ge ", "≯": r"\le ", "≰": ">", "≱": "<", "±": r"\pm "}
    | {"“": '"', "”": '"', "º": "°", "。": ".", "∅": r"\emptyset "}
    | {sup: f"^{digit}" for digit, sup in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4"}
)
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=\\\\)\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", ""),  # \\[2pt]: space below a row
        # A backslash after a backslash is part of a row's end: "\\ 2" in a matrix.
        (r"\\[$]|(?<!\\)[$]|(?<!\\)\\[()\[\]]", ""),  # dollar signs and math delimiters
        (r"\\(?:not\s*=|neq(?![A-Za-z]))|(?<=\s)!=", r"\\ne "),
        (r"\\not\s*<|\\nless(?![A-Za-z])", r"\\ge "),
        (r"\\not\s*>|\\ngtr(?![A-Za-z])", r"\\le "),
        (r"\\not\s*\\leq?(?![A-Za-z])|\\nleq(?:slant)?(?![A-Za-z])", ">"),
        (r"\\not\s*\\geq?(?![A-Za-z])|\\ngeq(?:slant)?(?![A-Za-z])", "<"),
        (r"\\begin\s*\{array\}\s*(?:\[\w*\]\s*)?\{[^{}]*\}", r"\\begin{matrix}"),
        (r"\\end\s*\{array\}", r"\\end{matrix}"),
        (r"[\^_]\s*\{\s*\}", ""),  # an empty exponent or index
        (r"\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ","),  # thousands
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
        (r"\\%", "%"),
        (r"(?<=\d)\*\*(?=\d)", "^"),
        (r"\*\*|__|`", ""),
    )
)
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUE = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {
    f"{ten} {_NUMBER_WORDS[one]}" if one else ten: str(10 * (place + 2) + one)
    for place, ten in enumerate(_TENS)
    for one in range(10)
}
_MONTH = r"((?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)"
_KEY_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=[a-z])-(?=[a-z])", " "),
        (r"^(?:an?|the) (?=\w)", ""),
        (r"\b([ap])\.\s?m\b\.?", r"\1m"),
        (r"^0(?=\d:\d\d)", ""),
        (rf"^(\d{{1,2}})(?:st|nd|rd|th)? {_MONTH},? (\d{{4}})$", r"\2 \1 \3"),
        (rf"^{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?, ?(\d{{4}})$", r"\1 \2 \3"),
        (r"\s*([^\w\s])\s*", r"\1"),
    )
)


@lru_cache(maxsize=1024)  # responses of a group repeat each other
def clean(text: str) -> str:
    """Strip LaTeX delimiters and text commands, emphasis, quotes and end punctuation."""
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS))
    if not text.isascii():  # invisible marks: zero width, direction of writing
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    for _ in range(3):  # nested text commands
        text = _TEXT_COMMAND.sub(r" \1 ", text)
    text = " ".join(text.split())
    for _ in range(3):  # nested too: quotes in braces before a full stop
        text = text.strip(" \"'").rstrip(" .,;:\"'")
        if re.search(r"[A-Za-z][!?]+$", text[-9:]):  # after a digit it is a factorial
            text = text.rstrip("!?")
        inside = re.fullmatch(r"\{([^{}]*)\}", text)
        text = inside.group(1) if inside else text
    return text


@lru_cache(maxsize=1024)
def text_key(cleaned: str) -> str:
    """Return a key that is the same whatever the case, article, hyphens, spaces or date order."""
    key = cleaned.casefold()
    for pattern, new in _KEY_REWRITES:
        key = pattern.sub(new, key)
    return _WORD_VALUE.get(key, key)


def number_spellings(cleaned: str) -> list[str]:
    """Return a text and, for a small whole number, its other spelling: 14 and fourteen."""
    key = text_key(cleaned)
    words = [word for word, digits in _WORD_VALUE.items() if digits == key]
    return [cleaned, *({key, *words} - {cleaned} if words else ())]


@dataclass(frozen=True)
class Quantity:
    """An exact number with its canonical unit ("" for none); form: whole | decimal | ratio."""

    value: Fraction
    unit: str
    form: str


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:
        (?P<whole>\d+)?\s*\\frac\s*\{{?\s*(?P<top>\d+)\s*\}}?\s*\{{\s*(?P<below>\d+)\s*\}}
        |\\frac\s*(?P<top1>\d)\s*(?P<below1>\d)(?!\d)
        |(?:(?P<whole2>\d+)\s+)?(?P<top2>\d+)\s*/\s*(?P<below2>\d+)(?![\d.])
        |(?P<plain>{_DECIMAL})
         (?:(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?|[eE])(?P<power>[-+]?\d{{1,3}})\}}?)?
    )""",
    re.VERBOSE,
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_UNIT_TABLE = """
° degree degrees deg | °c celsius | °f fahrenheit | % percent pct | $ dollar dollars usd | € euro
euros | £ pound-sterling | ¥ yen | cm centimeter centimeters centimetre centimetres | mm millimeter
millimeters millimetre millimetres | m meter meters metre metres | km kilometer kilometers
kilometre kilometres | in inch inches | ft foot feet | mi mile miles | yd yard yards | kg kilogram
kilograms | g gram grams | mg milligram milligrams | lb lbs pound pounds | oz ounce ounces | s sec
secs second seconds | ms millisecond milliseconds | min mins minute minutes | h hr hrs hour hours |
l liter liters litre litres | ml milliliter milliliters | m/s | km/h kph | mph | n newton newtons |
j joule joules | kj | w watt watts | kw | v volt volts | hz hertz | khz | mhz | pa | kpa | mol |
rad radian radians | cm^2 | m^2 | mm^2 | km^2 | in^2 | ft^2 | cm^3 | m^3 | mm^3 | in^3 | ft^3 |
m/s^2 | n/m | g/cm^3 | kg/m^3
"""
_UNITS = {n: names[0] for row in _UNIT_TABLE.split("|") for names in [row.split()] for n in names}
_NOT_UNITS = frozenset(
    "or and not minus plus times over squared cubed to half less more than about out of sin cos "
    "tan log sqrt trillion".split()
)


def quantity(cleaned: str) -> Quantity | None:
    """Parse a number, alone or with a unit or a counted noun; None for anything else."""
    currency = re.match(r"(-?)\s*([€£¥])\s*(.*)$", cleaned)
    if currency:
        cleaned = f"{currency[1]}{currency[3]} {currency[2]}"
    found = _NUMBER.match(cleaned)
    if found is None or found.end() > MAX_NUMBER_CHARACTERS:
        return None
    value, rest = _value(found), cleaned[found.end() :]
    if value is None:
        return None
    scale = re.match(r"\s+([a-z]+)\b", rest, re.IGNORECASE)
    if scale and scale[1].casefold() in _SCALES:
        value, rest = value * _SCALES[scale[1].casefold()], rest[scale.end() :]
    unit = _unit(rest) if rest.strip() else ""
    if unit is None:
        return None
    plain = found["plain"]
    form = "ratio" if plain is None else "decimal" if "." in plain else "whole"
    return Quantity(value, unit, form)


def same_quantity(one: Quantity, other: Quantity) -> bool:
    """Compare numbers, whose units may be missing on one side; 50 % equals 50 and 0.5."""
    if one.unit and other.unit:
        return one.unit == other.unit and _same_value(one, other)
    if _same_value(one, other):
        return True
    if "%" not in (one.unit, other.unit):
        return False
    percent, plain = (one, other) if one.unit == "%" else (other, one)
    return percent.value / 100 == plain.value


def split_unit(cleaned: str) -> tuple[str, str]:
    r"""Split a formula from the unit after it, as in `2\sqrt{3} cm`; the unit is "" for none."""
    found = re.fullmatch(r"(.+?)(\s+[A-Za-z][\w/^ {}]*|\s*[°%])", cleaned)
    unit = _unit(found[2]) if found else None
    return (cleaned, "") if found is None or unit is None else (found[1], unit)


def _same_value(one: Quantity, other: Quantity) -> bool:
    if one.value == other.value:
        return True
    # 0.333333 equals 1/3, but two decimals or two fractions are compared exactly.
    if {one.form, other.form} != {"decimal", "ratio"}:
        return False
    return abs(one.value - other.value) <= DECIMAL_CLOSENESS * abs(one.value)


def _value(found: re.Match[str]) -> Fraction | None:
    top = found["top"] or found["top1"] or found["top2"]
    if top is not None:
        below = int(found["below"] or found["below1"] or found["below2"])
        if below == 0:
            return None
        value = int(found["whole"] or found["whole2"] or 0) + Fraction(int(top), below)
    else:
        plain = found["plain"].replace(",", "").rstrip(".")
        value = Fraction(f"{plain}e{found['power'] or 0}")
    return -value if found["sign"] == "-" else value


def _unit(rest: str) -> str | None:
    """Return the canonical unit for the text after a number; None if it is not a unit."""
    glued = not rest[0].isspace()
    name = " ".join(rest.casefold().split())
    name = re.sub(r"^(?:square|sq\.?) (.+)$", r"\1^2", re.sub(r"^cubic (.+)$", r"\1^3", name))
    name = re.sub(r"\s*\^\s*\{?(\d)\}?", r"^\1", re.sub(r"\s*/\s*", "/", name))
    base, power, exponent = name.partition("^")
    name = _UNITS.get(base, base) + power + exponent
    if name in _UNITS:
        # 5m may be five times m: a single letter is a unit only after a space.
        is_letter = len(name) == 1 and name.isalpha()
        return None if glued and is_letter and len(rest) == 1 else _UNITS[name]
    words = name.split()
    if glued or len(words) > 3 or not _NOT_UNITS.isdisjoint(words):
        return None
    if not all(re.fullmatch(r"[a-z]{3,}", word) for word in words):
        return None
    return " ".join(word.removesuffix("s") for word in words)


_MARKS = (
    re.compile(r"(?<![A-Za-z0-9\\])[(\[]([A-Za-z])[)\]]\s*[:.]?"),
    re.compile(r"(?m)(?:^[ \t*]*|(?<=[\s,;:]))([A-Z])\s?[.):](?![A-Za-z]\.)"),
    re.compile(r"(?m)^[ \t*]*([A-Z])[ \t]+[-–][ \t]+"),
)
"""(A) or [A]; A. or A) or A: at the start of a line or after a space; "A - " starting a line."""
_LABEL_ALONE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[]?([A-Za-z])[)\]]?[.:]?",
    re.IGNORECASE,
)
_LABEL_AND_TEXT = (
    re.compile(r"(?:(?:option|choice) )?[(\[]([A-Za-z])[)\]]\s*[:.\-]?\s*(\S.*)", re.I | re.S),
    re.compile(r"(?:(?:option|choice) )?([A-Za-z])(?:[.):]\s*| - )(?<!\.)(\S.*)", re.I | re.S),
)
_LABEL_THEN_TEXT = re.compile(r"([A-Za-z])(?:,\s*|\s+)(\S.*)", re.DOTALL)
_OTHER_LABEL = re.compile(
    r"(?<![\w\\])(?:[(\[]([A-Za-z])[)\]]|([A-Z])[.):](?!\w)|(?:or|and) ([A-Z])(?!\w))|^([A-Z])$"
)
_LIST_GAP = re.compile(r"\s*(?:,|;|/|&|\band\b)\s*", re.IGNORECASE)


def question_options(question: str) -> dict[str, str]:
    """Return the options of the last list in a question, labels A, B, … -> cleaned text.

    Empty if there are fewer than two. An option ends where the next begins, the last at the end of
    its line.
    """
    best: list[re.Match[str]] = []
    for mark in _MARKS:
        chain: list[re.Match[str]] = []
        for found in mark.finditer(question):
            label = found[1].upper()
            if label == "A":
                chain = [found]
            elif chain and ord(label) == ord(chain[-1][1].upper()) + 1:
                chain.append(found)
            if len(chain) > 1 and (len(chain) >= len(best) or best[0].re is mark):
                best = chain
    options = {}
    ends = [found.start() for found in best[1:]]
    for found, end in zip(best, [*ends, None], strict=False):
        text = question[found.end() : end].strip()
        options[found[1].upper()] = clean((text if end else text.split("\n")[0]).strip(" ,;\n*"))
    return options


def named_label(cleaned: str) -> tuple[str, str] | None:
    """Return the option label that an answer names, in upper case, and the text after it.

    `A`, `(A)`, `A.`, `option A` and the like have no text; `A. foo` and `(A) foo` have. `A foo` is
    an article and a noun: None.
    """
    alone = _LABEL_ALONE.fullmatch(cleaned)
    if alone:
        return alone[1].upper(), ""
    found = next(filter(None, (pattern.fullmatch(cleaned) for pattern in _LABEL_AND_TEXT)), None)
    return (found[1].upper(), found[2].strip()) if found else None


def label_then_text(cleaned: str, options: Mapping[str, str]) -> tuple[str, str] | None:
    """Return label and text of `B cat` or `B, cat` if cat is the text of option B, else None."""
    found = _LABEL_THEN_TEXT.fullmatch(cleaned)
    if found is None:
        return None
    label, text = found[1].upper(), found[2]
    return (label, text) if text_key(options.get(label, "")) == text_key(text) else None


def names_another(cleaned: str, label: str, options: Mapping[str, str]) -> bool:
    """Return True if the text after a label names another option, by label or by text."""
    key, labelled = text_key(cleaned), text_key(options.get(label, ""))
    if not key or key == labelled:
        return False
    letters = {"".join(f.groups("")).upper() for f in _OTHER_LABEL.finditer(cleaned)}
    if any(letter in (options or letters) for letter in letters - {label}):
        return True
    others = {text_key(text) for other, text in options.items() if other != label}
    return any(
        other and other not in labelled and re.search(rf"(?<!\w){re.escape(other)}(?!\w)", key)
        for other in others
    )


def label_list(cleaned: str, options: Mapping[str, str]) -> list[str] | None:
    """Return the labels in `A, C` or `A and C`, or in `AC` if A and C are options; else None."""
    parts = [part.strip("() ") for part in _LIST_GAP.split(cleaned) if part.strip("() ")]
    if len(parts) > 1 and all(re.fullmatch(r"[A-Z]", part) for part in parts):
        return parts
    is_run = 1 < len(cleaned) == len(set(cleaned)) and options.keys() >= set(cleaned)
    return list(cleaned) if is_run else None


def all_paired(golds: list[Any], parts: list[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Return True if each gold part equals a part of its own, in any order, and none is left."""
    if len(golds) != len(parts):
        return False
    left = list(parts)
    for gold in golds:
        found = next((n for n, part in enumerate(left) if same(gold, part)), None)
        if found is None:
            return False
        del left[found]
    return True
