r"""Which answer a response states, and whether it is the reference: "x = 12", \(12\), "12 apples".

Spelling does not count and neither do words around a single number; whatever is left open ("12 or
13", "more than 12", "2x") is no number. Every pattern takes time linear in the text: a model that
repeats itself to its limit is graded like any other.
"""

from __future__ import annotations

import re
from decimal import Decimal

# A minus sign belongs to the number unless it stands between operands ("7-3"). One group of three
# after a comma makes it a thousands separator ("1,234", but "(1,2)" is two numbers).
NUMBER = (
    r"(?:(?<![\w)])[-−+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?![\w.]))?(?:/\d+)?"
)
_NUMBER = re.compile(rf"\d+ +\d+/\d+|{NUMBER}")  # "1 1/2" is one
_LINE = 400  # characters of a statement that are looked at

_BOXED = re.compile(r"\\boxed\s*\{")
_MARK = re.compile(r"(?<!#)####(?!#)([^\n#]*)")  # GSM8K's
# Within a line, behind what is worked out; at its start it is a heading, behind a word a number's.
_SMALL_MARK = re.compile(rf"[\d;:.,=)][ \t]*#[ \t]+({NUMBER})")
_NUMBERED = re.compile(r"\s*\d+[.):]\s+\S")  # a heading: "2. Result"
_STATED = re.compile(
    r"\banswer\b(?: choice| option)?(?:[ \t]+(?:to|for|of|in)\b[^\n.,;:=]{0,80}?)?[ \t]*"
    r"(?:\([^()\n]{0,40}\))?[ \t*_]*(?P<how>[:=]|\bis\b|\bequals\b)"
    r"|^[ \t#*_>]{0,20}(?:the )?(?:final )?answer[ \t*_]{0,20}$",
    re.IGNORECASE | re.MULTILINE,
)
_STATEMENTS = 3  # the last ones, of which the last that says something counts
_SENTENCE_END = re.compile(r"(?<=\S)[.?](?=\s|$)")
_REASON = re.compile(r",\s+(?:because|since|as|which|where|when|given|after|using|rounded)\b")
_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])(?:[).:](?=\s|$)|$))")
_LIST_NUMBER = re.compile(  # "3. Then", "### Step 3: check"; "## 3" with something below it
    r"^[#>*\- \t]{0,20}(?:step|part)?[ \t]?\d+[ \t]?[.):](?=[ \t]+\S)"
    r"|^[ \t]?#+[ \t]*\d+[ \t]*\n(?=\s*\S)",
    re.IGNORECASE | re.MULTILINE,
)
_RAISED = re.compile(r"[\^_](?:\{[^{}\n]{0,40}\}|[-−+]?\w{1,40})")  # exponents and indices
_OPEN_BEFORE = re.compile(  # what makes the number behind it one of several, or none
    rf"(?:{NUMBER}\s*(?:[A-Za-z%]+\s+)?(?:or|and)\s+(?:[A-Za-z]+\s*=\s*)?"
    r"|(?:\bnot|\bthan|[\w)}]\s*(?:!=|[<>≤≥≠]))\s*)[$\\(]*$"
)

_SCIENTIFIC = re.compile(
    r"(\d) ?(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?(?:\{ ?([-−+]?\d{1,3}) ?\}|([-−+]?\d{1,3})(?!\d))"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[, !]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"[-−+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DELIMITERS = re.compile(
    r"\\[()\[\]]|(?:US|AU|CA|HK|NZ)?\\?\$|\\?%|[€£¥₹]|°|\^\s?(?:\\circ|\{\\circ\})"
)
_SPACING = re.compile(r"\\(?:left|right|[!,;: ])")
_BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_TEXT_POWER = re.compile(r"(\\(?:text|mathrm)\{[^{}]*\})\^(?:\{[23]\}|[23])")
_FRACTION = re.compile(r"(\d ?)?\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|(\d)(\d))")
_GROUP = re.compile(r"^\{([^{},]*)\}$")
_ELLIPSIS = re.compile(r"\.\d+ ?\.\.")  # there is more of the number
_ASIDE = re.compile(r" \([A-Za-z][A-Za-z ]{2,40}\)")  # "12 (rounded)"
_SIMPLE = re.compile(r"-?\\?\w+")  # a part of a fraction that needs no parentheses

_NAME = re.compile(r"\\?\w+(?:_\{\w*\})?(?: ?\([^()]*\))?")  # of a variable or a function's value
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\^(?:\{[23]\}|[23])(?![\w^])")
_OPEN = re.compile(r"[<>≤≥≠!]|\\(?:ne|le|ge|lt|gt|approx|sim|pm)|\bor\b|\band\b|, |;")
_GLUED = frozenset(  # units without a space; "2ab" is a product
    re.findall(
        r"\w+",
        "kg mg cm mm km ml ft in mph kph lb lbs oz hr hrs min sec st nd rd th am pm usd gb mb",
    )
)
_SHORT = _GLUED | frozenset(  # further words of one and two letters; "2 x" and "2 ab" are products
    re.findall(
        r"\w+",
        "a A I m g s h l L kw hz rs an as at be by do go he if in is it me my of on so to up us we",
    )
)
_NOT_ALONE = frozenset(  # words with which a number is another one, or none
    re.findall(
        r"\w+",
        """
        or not no never either neither nor than more less fewer most least over under above below
        between except pi root squared cubed half halves third thirds quarter quarters hundred
        thousand million billion trillion dozen double twice triple times plus minus negative
        divided factorial zero one two three four five six seven eight nine ten eleven twelve
        twenty thirty forty fifty sixty seventy eighty ninety first
        january february march april may june july august september october november december
        """,
    )
)


def extract_answer(text: str) -> str | None:
    r"""Return the answer that a response states, as it is written.

    It is the first of these that there is, and the last one of its kind.

    \boxed{…} with balanced braces; the number after GSM8K's `####`, or after a `#` within a line;
    what follows "Answer:" or stands below a heading "Final answer"; the number in "the answer is
    …"; the last number that is not of a list or heading, or an exponent. None if there is none.
    """
    return next(iter(_candidates(text)), None)


def is_correct(response: str, gold: str) -> bool:
    """Tell whether the answer that a response states is the reference answer."""
    reference = reference_answer(gold)
    return any(_same(answer, reference) for answer in _candidates(response))


def reference_answer(gold: str) -> str:
    """Return the answer inside a reference solution (GSM8K's "… #### 18"); a bare one as it is."""
    if boxed := _last_boxed(gold):
        return boxed
    marked = [text.strip() for text in _MARK.findall(gold)]
    return marked[-1] if marked and marked[-1] else gold


def normalize_answer(answer: str) -> str:
    r"""Return one spelling for answers that mean the same.

    So for "$1,234.00" and "1234"; "\dfrac{1}{2}" and "1/2"; "068" and "68"; "(B)" and "B". Spaces,
    the signs of dollars, percent and degrees, final full stops, \(…\), \text{…} go.
    """
    answer = _TEXT.sub(r"\1", _plain(answer))
    answer = _GROUP.sub(r"\1", _FRACTION.sub(_fraction, answer).strip())
    answer = answer if _ELLIPSIS.search(answer) else answer.rstrip(".").rstrip()
    if _SPACED_THOUSANDS.fullmatch(answer):
        answer = answer.replace(" ", "")
    if re.fullmatch(NUMBER, answer) and "/" not in answer:
        text = f"{Decimal(answer.replace(',', '')):f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return text if text.strip("-0") else "0"
    answer = re.sub(r"(?<!\d) | (?!\d)", "", answer)  # those between digits part two numbers
    letter = re.fullmatch(r"\(([A-Za-z])\)", answer)
    return letter[1] if letter else answer


# ----------------------------------------------------------------------------------- what is stated


def _candidates(text: str) -> list[str]:
    """Return the answer that a text states.

    Where only words say that it does, it is the last number, and then the words.
    """
    text = text.rpartition("</think>")[2] or text  # what is stated comes after the reasoning
    if boxed := _last_boxed(text):
        return [boxed]
    marks = [mark.strip() for mark in _MARK.findall(text)]
    for mark in reversed(marks):
        if not _NUMBERED.match(mark) and (number := _number(mark[:_LINE])):
            return [number]
    statement, certain = _stated(text)
    if statement and certain:
        return [statement]
    words = ""
    if statement:
        words = _first_sentence(statement)
        if number := _number(words):
            return [number]
        if _choice(words):
            return [words]
    if marks and marks[-1] and text.rstrip().endswith(marks[-1]) and not _NUMBERED.match(marks[-1]):
        return [marks[-1]]
    if small := _SMALL_MARK.findall(text):
        return [small[-1]]
    return [answer for answer in (_last_number(text), words) if answer]


def _last_boxed(text: str) -> str | None:
    r"""Return the contents of the last \boxed{…} whose braces close, or None."""
    open_braces, last, boxes = [], None, {match.end() - 1 for match in _BOXED.finditer(text)}
    if not boxes:
        return None
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            start = open_braces.pop()
            if start in boxes and (last is None or start > last[0]):
                last = start, brace.start()
    return text[last[0] + 1 : last[1]] if last else None


def _stated(text: str) -> tuple[str | None, bool]:
    """Return what stands behind the last "answer:", "answer is" or heading.

    And whether nothing but an answer can stand there, which "is" does not say.
    """
    for match in reversed([*_STATED.finditer(text)][-_STATEMENTS:]):
        for line in text[match.end() : match.end() + _LINE].split("\n"):
            statement = _BOLD.sub("", line).strip(" \t*:=")
            if _plain(statement).strip(" ."):
                return statement, match["how"] is None or match["how"] in ":="
    return None, False


def _first_sentence(statement: str) -> str:
    for end in (_SENTENCE_END, _REASON):
        if found := end.search(statement):
            statement = statement[: found.start()]
    return statement.strip()


def _last_number(text: str) -> str | None:
    text = _FRACTION.sub(_fraction, _SCIENTIFIC.sub(_exponent, text))
    text = _RAISED.sub("", text)
    for kept in (_LIST_NUMBER.sub("\n", text), text):
        if last := next(iter([*_NUMBER.finditer(kept)][-1:]), None):
            before = _OPEN_BEFORE.search(kept[max(0, last.start() - 60) : last.start()])
            return before[0] + last[0] if before else last[0]
    return None


# ------------------------------------------------------------------------------ whether it is right


def _same(answer: str, gold: str) -> bool:
    """Tell whether they are one answer; of two with words beside the number, the words count."""
    whole, wanted = normalize_answer(answer), normalize_answer(gold)
    if wanted in (
        whole,
        normalize_answer(_first_sentence(answer)),
        _choice(answer),
        _value(answer),
    ):
        return wanted != ""
    if whole == _value(gold):
        return True
    for bare, other in ((wanted, answer), (whole, gold)):
        number = _number(other[:_LINE])
        if number is not None and _NUMBER.fullmatch(bare) and normalize_answer(number) == bare:
            return True
    return False


def _value(answer: str) -> str | None:
    """Return what "x = …" says that x is."""
    plain = _plain(answer[:_LINE])
    name, _, value = plain.partition("=")
    if not _SIMPLE.fullmatch(name.strip()) or "=" in value or _OPEN.search(plain):
        return None
    return normalize_answer(value) or None


def _choice(answer: str) -> str | None:
    """Return the letter of "(B)", "B) 12 apples", "option B"."""
    found = _CHOICE.match(_TEXT.sub(r"\1", _plain(answer[:_LINE])).strip().rstrip("."))
    return found and (found[1] or found[2])


def _number(text: str) -> str | None:
    """Return the number that a text is about: the right side of an equation, or the only one."""
    text = _TEXT.sub(r" \1 ", _UNIT_POWER.sub("", _plain(_TEXT_POWER.sub(r"\1", text))))
    text = _ASIDE.sub("", _FRACTION.sub(_fraction, text)).strip()
    if _SPACED_THOUSANDS.fullmatch(text):
        return text
    if "=" in text:
        *left, right = text.split("=")
        if _OPEN.search(text) or not all(map(_has_a_value, left)):
            return None
        text = right
    if not (first := _NUMBER.search(text)) or _NUMBER.search(text, first.end()):
        return None
    before, after = text[: first.start()], text[first.end() :]
    if re.search(r"[^\w\s.,'’\"“”/]|_|/(?![A-Za-z])|(?<![A-Za-z])/", before + " " + after):
        return None
    if before[-1:].isalpha() or ("." in first[0] and after.startswith("..")):
        return None
    glued = re.match(r"[^\W\d_]+", after)
    if glued and glued[0].lower() not in _GLUED:
        return None
    words = re.findall(r"[^\W\d_]+", before + " " + after[glued.end() if glued else 0 :])
    words = [word.lower() if len(word) > 1 else word for word in words]
    fine = all(word in _SHORT if len(word) < 3 else word not in _NOT_ALONE for word in words)
    return first[0] if fine else None


def _has_a_value(side: str) -> bool:
    """Tell whether the left side of an equation is a variable, arithmetic or words, not algebra."""
    if _NAME.fullmatch(side.strip()):
        return True
    letters = re.sub(r"\\[A-Za-z]+", " ", side)
    return re.search(r"\d[A-Za-z]|[A-Za-z]\d|\b(?![aAI]\b)[A-Za-z]\b", letters) is None


# ---------------------------------------------------------------------------------------- spelling


def _plain(text: str) -> str:
    """Remove what stands around an answer in LaTeX and Markdown; white space is single spaces."""
    text = re.sub(r"\s+", " ", text.replace("−", "-"))
    text = _SPACING.sub("", _THOUSANDS.sub(",", text))
    return _SCIENTIFIC.sub(_exponent, _DELIMITERS.sub("", _BOLD.sub("", text)))


def _exponent(match: re.Match) -> str:
    return f"{match[1]}e{(match[2] or match[3]).replace('−', '-')}"


def _fraction(match: re.Match) -> str:
    whole, *braced, above, below = match.groups()
    if above is None:
        above, below = braced
    parts = (part if _SIMPLE.fullmatch(part) else f"({part})" for part in (above, below))
    return (f"{whole.strip()} " if whole else "") + "/".join(parts)
