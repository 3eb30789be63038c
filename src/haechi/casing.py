"""Readable text from an uncased WordPiece model: spacing around punctuation, capitals at sentence starts, in names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from haechi.answers import DOMAINS

_WORD = re.compile(r"[A-Za-z]+")
_START = re.compile(r"(?:^|[.!?…][\"'”’)\]]*\s+)[\"'“‘(\[]*(?=[A-Za-z])")

# WordPiece puts every punctuation mark between two spaces. Marks between two word characters are joined to both (a
# spaced hyphen is rare in answers), closing marks to the left, opening marks to the right.
_JOINED = re.compile(r"(?<=\w) ?([-/~·'’]) ?(?=\w)")
_DIGITS = re.compile(r"(?<=\d) ?([.,:]) ?(?=\d)")
_LEFT = re.compile(r"\s+([.,:;!?%)\]}…”])")
_RIGHT = re.compile(r"([(\[{$“₩#]) +")
# A link comes apart at its dots, colon, slashes and at sign; it is put together before sentences are told apart.
_SCHEME = re.compile(r"\b(https?) ?: ?/ ?/ ?|\b(www) ?\. ?")
_DOMAIN = re.compile(rf"(?<=\w) ?\. ?(?=(?:[a-z0-9-]+ ?\. ?)?(?:{DOMAINS})\b|[a-z]{{2,}} ?/ ?\w)|(?<=\w) ?(@) ?(?=\w)")
_LINK = re.compile(r"\S*\w[.@/]\w\S*")
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
    text = _SCHEME.sub(lambda match: f"{match[1]}://" if match[1] else "www.", text)
    text = _DOMAIN.sub(lambda match: match[1] or ".", text)
    text = _DIGITS.sub(r"\1", _JOINED.sub(r"\1", text))
    text = _QUOTED.sub(r'"\1"', _RIGHT.sub(r"\1", _LEFT.sub(r"\1", text)))
    links = [match.span() for match in _LINK.finditer(text)]

    def cased(match: re.Match[str]) -> str:
        inside = any(start <= match.start() < end for start, end in links)
        return match.group() if inside else words.get(match.group(), match.group())

    text = _WORD.sub(cased, text)
    starts = {match.end() for match in _START.finditer(text)}
    return "".join(letter.upper() if index in starts else letter for index, letter in enumerate(text))
