"""Readable text from an uncased WordPiece model: spacing around punctuation, capitals at sentence starts, in names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[A-Za-z]+")
_START = re.compile(r"(?:^|[.!?…][\"'”’)\]]*\s+)[\"'“‘(\[]*(?=[A-Za-z])")

# WordPiece puts every punctuation mark between two spaces. Marks between two word characters are joined to both (a
# spaced hyphen is rare in answers), closing marks to the left, opening marks to the right.
_JOINED = re.compile(r"(?<=\w) ?([-/~·'’]) ?(?=\w)")
_DIGITS = re.compile(r"(?<=\d) ?([.,:]) ?(?=\d)")
_LEFT = re.compile(r"\s+([.,:;!?%)\]}…”])")
_RIGHT = re.compile(r"([(\[{$“₩#]) +")
_QUOTED = re.compile(r"\" ?([^\"]*?) ?\"")


def learn(texts: Iterable[str]) -> dict[str, str]:
    """Lower-case word -> its usual form, for words that are mostly written with capitals inside sentences."""
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        starts = {match.end() for match in _START.finditer(text)}
        for match in _WORD.finditer(text):
            if match.start() not in starts:
                forms[match.group().lower()][match.group()] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in forms.items()}
    return {word: form for word, form in sorted(usual.items()) if form != word}


def restore(text: str, words: Mapping[str, str]) -> str:
    """`text` as a person would write it; `words` comes from `learn`."""
    text = _DIGITS.sub(r"\1", _JOINED.sub(r"\1", text))
    text = _QUOTED.sub(r'"\1"', _RIGHT.sub(r"\1", _LEFT.sub(r"\1", text)))
    text = _WORD.sub(lambda match: words.get(match.group(), match.group()), text)
    starts = {match.end() for match in _START.finditer(text)}
    return "".join(letter.upper() if index in starts else letter for index, letter in enumerate(text))
