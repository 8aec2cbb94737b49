r"""Phrases that give an answer as a verdict, as patterns: data of leakage.py.

`{said}` stands for a value, `{named}` for an option label, `{place}` for an ordinal. Patterns of
values meet case-folded text; those of labels meet text as written, since `a` is an article.
"""

from __future__ import annotations

_NOUN = r"answer|solution|result|conclusion"
_IS = (
    r"(?: is| are| would(?: of course)? be| must be| should be| will be| has to be"
    r"|\s*(?:=|:|→|⇒|=>|->|-))"
)
_FOREIGN = (
    r"(?:(?:respuesta|resposta|risposta)(?: (?:correcta|correta|corretta))?|r[ée]ponse|"
    r"antwort|lösung|ответ)(?: (?:es|é|è|est|ist|lautet)|\s*[:=-])"
)
_CJK = r"(?:答案|答え|正解|选项|選項|정답|답)\s*(?:是|为|為|は|은|:|：)?"
_CHOSEN = (
    r"(?:correct(?: (?:option|choice|answer|label|letter|one))?"
    r"|(?:right|best) (?:option|choice|answer))"
)
ANSWER = (
    rf"(?:\bans(?:wer)?(?: to (?:the|this) (?:question|problem))?{_IS}(?: therefore| thus)?:?"
    rf"|\b{_CHOSEN}(?: is| would(?: of course)? be|:)|\b{_FOREIGN}|{_CJK}"
    r"|(?:<|\[)answer(?:>|\])|####)"
)
"""What comes before an answer and leaves no doubt, whatever follows."""
FILLER = r"(?: (?:exactly|clearly|simply|equal to|that of|option|choice|the number|the|an?))*"
HENCE = r"(?:\b(?:so|therefore|thus|hence|consequently|accordingly|in conclusion)\b|∴)"
OPERATION = r"\d\s*(?:\+|-|\*|/|x|\\times|\\cdot|times|plus|minus)\s*[\d(]"
SUMMING = r"(?:adds?|sums?) (?:up )?to|amounts? to|comes? to|totals|total of|gives|yields|makes?"
LAST_WORD = r"\b(?:final|finally|sum|verdict|output)\s*[:=]|∴"
VALUE_BEFORE_STOP = (
    rf"\b(?:{_NOUN})(?: to (?:the|this) (?:question|problem))?{_IS}{FILLER} ?{{said}}",
    rf"{{said}} (?:is|are|would be|must be) (?:the )?(?:final |correct |right )?(?:{_NOUN})",
)
"""Of a result or a solution, which pictures hold too: the clause has to end there."""
VALUE = (
    r"\b(?:value|number|word|thing|quantity)(?: (?:that|which)(?: is| was)?)? "
    r"(?:asked for|wanted|sought|requested|needed|in question) is {said}",
    r"(?:^|[.!?;\n]\s*|\band )(?:write|reply|respond|say|answer|put)(?: with)? [\"']?{said}",
    r"\b(?:please|just|then|should|must) "
    r"(?:write|reply|respond|say|output|answer|put|return|enter|box|type)(?: with)? [\"']?{said}",
)
"""The value that is asked for; an order to the reader."""
LABEL = (
    r"(?i:\b(?:option|choice|answer))\s+{named}(?i:(?: is| seems| must be)?(?: the)? "
    r"(?:correct|right|true|best|matching)\b)",
    r"(?i:\b(?:choose|select|pick|mark|go(?:ing)? with|reply|answer(?: with)?)) "
    r"(?i:(?:option|choice|answer) )?{named}(?!\s+[a-z]+\b)",
    r"(?i:\b(?:is|match(?:es|ing)|fits|corresponds to|points to|agrees with) "
    r"(?:option|choice|answer)) {named}",
    r"{named} is (?:the )?(?:correct|(?:right|best) (?:option|choice|answer|one))\b",
    r"{named} it is\b",
    r"选择?\s*{named}",
)
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
PLACE = (
    r"\b{place} (?:option|choice|answer)(?: is| seems)?(?: the)? (?:right|correct|best|fits|match)"
    r"|\b(?:choose|pick|select|mark) the {place}\b"
)
