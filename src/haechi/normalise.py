"""Undo what is done to a query's letters so that a guard does not know it again: full-width and styled letters,
invisible characters, look-alikes, stacked accents, Hangul taken apart, letters set one by one, base64."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Mapping

from haechi.hangul import FINALS, FIRSTS, VOWELS, Syllable
from haechi.spelling import Speller

VERSION = 3
"""Raised when queries are read differently than before: verdicts that were kept are then another guard's."""
_LOOK_ALIKES = str.maketrans(
    "аеоросухіјѕԁӏһԛԝАВЕКМНОРСТУХІЈЅΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεικνορτυχɑɡıⅼ",
    "aeopocyxijsdlhqwABEKMHOPCTYXIJSABEZHIKMNOPTYXaeiknoptuxagil",
)
"""Cyrillic, Greek and other letters that look like Latin ones (a part of Unicode's confusables, UTS 39)."""
_JAMO = re.compile(f"[{FIRSTS}][{VOWELS}](?:[{''.join(FINALS)}](?![{VOWELS}]))?")
_LATIN = re.compile(r"[a-z]", re.I)
_WORD = re.compile(r"\w+")
_ONE_BY_ONE = re.compile(r"(?<!\w)[^\W\d_](?:[ .\-_*·][^\W\d_](?!\w)){3,}")
_ALPHABETS = "abcdefghijklmnopqrstuvwxyz", "가나다라마바사아자차카타파하"
"""What stands in the order of one of these is a list ("a b c d")."""
_BASE64 = re.compile(r"(?<![\w+/=])(?=[a-z+/]*[A-Z0-9])[A-Za-z0-9+/]{6,}={0,2}(?![\w+/=])")
_LOOSE = re.compile("([ㄱ-ㆎ]+)")


class Reader:
    """What a model is shown of a query: plain letters, and words by their counts where there are any."""

    def __init__(self, words: Mapping[str, int]) -> None:
        """`words` comes from `haechi.spelling.learn`; empty: words stay as they are."""
        self._speller = Speller(words) if words else None

    def __call__(self, query: str) -> str:
        """The text to show."""
        text = normalise(query)
        return self._speller.correct(text) if self._speller else text


def normalise(query: str) -> str:
    """The query in plain letters; what is plain already stays as it is.

    Compatibility forms are folded (NFKC), invisible characters dropped, and marks on Latin letters that no alphabet
    puts there; look-alikes in mostly Latin text are replaced, loose Hangul jamo composed into syllables, four or more
    letters set one by one joined unless they are a list's, and base64 that hides text is read.
    """
    text = "".join(letter for letter in query if unicodedata.category(letter) != "Cf")
    text = _BASE64.sub(_decoded, text)
    # Jamo that stay loose ("ㅋㅋ") are left out of NFKC, which would make each a syllable's beginning.
    parts = _LOOSE.split(_JAMO.sub(_composed, text))
    text = "".join(part if index % 2 else unicodedata.normalize("NFKC", part) for index, part in enumerate(parts))
    text = _without_marks(text)
    folded = _WORD.sub(_plain, text)
    # Russian or Greek has few words of look-alikes only; what becomes mostly Latin was Latin.
    if 2 * len(_LATIN.findall(folded)) >= sum(map(str.isalpha, folded)):
        text = folded
    return _ONE_BY_ONE.sub(_joined, text)


def _joined(match: re.Match[str]) -> str:
    word = re.sub(r"[ .\-_*·]", "", match[0])
    return match[0] if any(word.lower() in alphabet for alphabet in _ALPHABETS) else word


def _decoded(match: re.Match[str]) -> str:
    """What base64 hides, if that is text."""
    code = match[0].rstrip("=")
    try:
        text = base64.b64decode(code + "=" * (-len(code) % 4), validate=True).decode()
    except ValueError:
        return match[0]
    readable = sum(letter.isalpha() or letter in " .,?!'" for letter in text)
    return text if text.isprintable() and readable >= 0.9 * len(text) else match[0]


def _composed(match: re.Match[str]) -> str:
    jamo = match[0]
    return Syllable(FIRSTS.index(jamo[0]), VOWELS.index(jamo[1]), FINALS.index(jamo[2:])).letter


def _without_marks(text: str) -> str:
    """Without the marks that stay apart from their Latin letter in composed text: "é" has one, a struck "e" has none.

    In other scripts marks are letters of their own.
    """
    kept: list[str] = []
    base = ""
    for letter in text:
        if not unicodedata.combining(letter):
            base = letter
        elif unicodedata.normalize("NFD", base)[:1].isascii():
            continue
        kept.append(letter)
    return "".join(kept)


def _plain(match: re.Match[str]) -> str:
    """A word with its look-alikes replaced, when that makes it a Latin word."""
    folded = match[0].translate(_LOOK_ALIKES)
    return folded if folded.isascii() else match[0]
