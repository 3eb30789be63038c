"""Words misspelt, run together or torn apart, put right by how often words are written.

The noisy channel of Kernighan, Church and Gale (1990, "A Spelling Correction Program Based on a Noisy Channel Model")
over single words, with word boundaries a part of the channel: one Viterbi pass finds the likeliest words behind a run
of letters and spaces. A text whose words are known is left alone, which is most of what people type.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from haechi.errors import ModelError
from haechi.hangul import FINALS, FIRSTS, VOWELS, Syllable, syllable
from haechi.store import write_text

FILE = "words.txt"
"""In a model folder: a count and the words that were written so often, a line each."""

_LETTERS = r"[^\W\d_]+"
_WORD = re.compile(rf"(?<!\w){_LETTERS}(?:['’]{_LETTERS})?(?!\w)")
_RUN = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern}){{0,63}}")
"""So many words are read together; time and memory stay in proportion to the text."""
_MIXED = re.compile(r"(?<!\w)(?=\w*[^\W\d_])(?=\w*\d)\w{3,20}(?!\w)")
_DIGITS = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g"}
"""Letters that digits stand for ("k1ll")."""
_SYLLABARY = "\u1100"
"""From here on a letter is a syllable or a word, as in Hangul and Chinese."""

# Costs are negative natural logarithms of probabilities. Chosen on the default model's validation rows by its AUROC on
# plain, misspelt and wrongly spaced queries (docs/LOG.md).
_KNOWN = 11.0
"""A word of this cost or less is never doubted."""
_UNKNOWN = 10.0
"""A word that is not known, as typed ..."""
_LETTER, _SYLLABLE = 2.3, 4.5
"""... and each of its letters."""
_SLIP = 2.0
"""One letter dropped, added, exchanged or transposed in a word, or one jamo of a syllable ..."""
_SLIP_LETTER, _SLIP_SYLLABLE = 1.5, 3.0
"""... and each letter of the word: long words are rarely others."""
_LOST, _ADDED = 2.0, 3.0
"""A space that is not there, and one that should not be."""
_TYPED = 20_000
"""Letters beyond which a text stays as it is: reading it anew would take longer than judging it."""
_LONGEST_RUN = 2000
"""Letters beyond which a run of words stays as it is."""
_CODED = 6.0
"""How much likelier a word of rot13 is than one with a slip: a known word does not come of it by chance."""
_SHORTEST, _LONGEST = 3, 20
"""Letters of a word that may hold a slip; a syllable counts as two."""
_STEM = 4
"""Letters that a run is looked up by before longer words are sought in it."""
_FREQUENT = 1e-3
"""A single letter is a word when it is this share of all words ("a", "I"), else a torn one; an exchanged letter is one
of those that make up this share of all letters."""
_DOUBTFUL = 0.1
"""A text with a smaller share of words to doubt was typed with care; the doubtful ones are names."""
_READINGS = 16
"""A word with more readings of its digits is left alone."""
_COMMON = 50
"""So often a word of running text is there to be one."""
_ENOUGH = 100_000
"""Words of text without which counts cannot tell a slip from a word that is merely new."""


def learn(queries: Iterable[str], known: Mapping[str, int]) -> dict[str, int]:
    """How often queries write each lower-case word, once-only words left out, added to `known`; empty when too few."""
    counts = Counter({word: count for word, count in _counted(queries).items() if count > 1})
    counts.update(known)
    return dict(counts) if counts.total() >= _ENOUGH else {}


def common(documents: Iterable[str]) -> dict[str, int]:
    """The words of running text that are no accident of it, at a hundredth of their counts: text is long, and people
    ask in other words than they write in."""
    return {word: count // 100 or 1 for word, count in _counted(documents).items() if count >= _COMMON}


def _counted(texts: Iterable[str]) -> Counter[str]:
    return Counter(_plain(word) for text in texts for word in _WORD.findall(text))


def write_words(folder: Path, counts: Mapping[str, int]) -> None:
    """Write a model folder's FILE."""
    lines = defaultdict(list)
    for word in sorted(counts):
        lines[counts[word]].append(word)
    write_text(folder / FILE, "".join(f"{count} {' '.join(lines[count])}\n" for count in sorted(lines, reverse=True)))


def read_words(folder: Path) -> dict[str, int]:
    """The counts in a model folder, empty when it has none. Raises ModelError for a file of another shape."""
    counts: dict[str, int] = {}
    file = folder / FILE
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            count, *words = line.split(" ")
            if int(count) < 1:
                raise ValueError(f"a count of {count}")
            counts.update(dict.fromkeys(words, int(count)))
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}; copy or export the model again") from None
    return counts


class Speller:
    """Puts words right by their counts."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        """`counts` comes from `learn`."""
        total = sum(counts.values())
        self._cost = {
            word: math.log(total / count)
            for word, count in counts.items()
            if len(word) > 1 or word >= _SYLLABARY or count >= _FREQUENT * total
        }
        self._longest = max(map(len, self._cost), default=0)

    @cached_property
    def _stems(self) -> set[str]:
        """The beginnings of all longer words: most places in a run begin none."""
        return {word[:_STEM] for word in self._cost if len(word) >= _STEM}

    @cached_property
    def _alphabet(self) -> list[str]:
        """Letters a slip may put in a word's place."""
        counts = Counter("".join(word for word in self._cost if word < _SYLLABARY))
        return sorted(letter for letter, count in counts.items() if count >= _FREQUENT * counts.total())

    def correct(self, text: str) -> str:
        """The text with the likeliest words; letters that stay keep their case. A very long text was not typed by hand
        and stays."""
        if len(text) > _TYPED:
            return text
        if not text.isascii():
            text = _WORD.sub(self._without_accents, text)
        text = _MIXED.sub(self._without_digits, text)
        words = _WORD.findall(text)
        doubtful = sum(not self._sure(_plain(word)) for word in words)
        return _RUN.sub(self._run, text) if doubtful > _DOUBTFUL * len(words) else text

    def _without_accents(self, match: re.Match[str]) -> str:
        """A word nobody knows without its accents, if that is one nobody would doubt."""
        word = match[0]
        if self._sure(_plain(word)):
            return word
        bare = "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))
        return bare if self._sure(_plain(bare)) else word

    def _without_digits(self, match: re.Match[str]) -> str:
        """A word with letters for its digits, if that is one nobody would doubt."""
        typed = match[0]
        letters = [_DIGITS.get(letter, letter) for letter in typed.lower()]
        if math.prod(map(len, letters)) > _READINGS:
            return typed
        readings = [*filter(self._sure, map("".join, product(*letters)))]
        return _cased(min(readings, key=self._cost.__getitem__), typed) if readings else typed

    def _run(self, match: re.Match[str]) -> str:
        typed = match[0].split(" ")
        words = list(map(_plain, typed))
        # Some letters become two in lower case; places would no longer agree. And so many letters are no words.
        if all(map(self._sure, words)) or len("".join(words)) != len("".join(typed)) or len(match[0]) > _LONGEST_RUN:
            return match[0]
        return " ".join(self._likeliest(words, typed))

    def _sure(self, word: str) -> bool:
        return self._cost.get(word, math.inf) <= _KNOWN

    def _likeliest(self, words: Sequence[str], typed: Sequence[str]) -> list[str]:
        text, shown = "".join(words), "".join(typed)
        length = len(text)
        begins: dict[int, int] = {}
        place = 0
        for number, word in enumerate(words):
            begins[place] = number
            place += len(word)
        best, back = [0.0] + [math.inf] * length, [(0, "")] * (length + 1)
        for start in range(length):
            if best[start] == math.inf:
                continue
            so_far = best[start] + (0.0 if start in begins else _LOST)
            added = 0
            reach = self._longest if text[start : start + _STEM] in self._stems else _STEM - 1
            for end in range(start + 1, min(length, start + reach) + 1):
                cost = self._cost.get(text[start:end])
                if cost is not None and so_far + cost + _ADDED * added < best[end]:
                    best[end], back[end] = so_far + cost + _ADDED * added, (start, shown[start:end])
                added += end in begins
            if start in begins:
                number = begins[start]
                end = start + len(words[number])
                for cost, word in self._readings(words[number], typed[number], first=number == 0):
                    if so_far + cost < best[end]:
                        best[end], back[end] = so_far + cost, (start, word)
        found = []
        while length:
            length, word = back[length]
            found.append(word)
        return found[::-1]

    def _readings(self, word: str, typed: str, *, first: bool) -> Iterable[tuple[float, str]]:
        """Other costs of a word than its own: as an unknown word, and as its likeliest neighbour with a slip."""
        syllables = word[0] >= _SYLLABARY
        letter, slip = (_SYLLABLE, _SLIP_SYLLABLE) if syllables else (_LETTER, _SLIP_LETTER)
        yield _UNKNOWN + letter * len(word), typed
        # Inside a sentence a capital is a name's.
        named = typed[0].isupper() and typed[1:].islower() and not first
        if self._sure(word) or named or not _SHORTEST <= len(word) * (2 if syllables else 1) <= _LONGEST:
            return
        others = _jamo_slips(word) if syllables else self._slips(word)
        near = [(self._cost[other], other) for other in others if other in self._cost]
        coded = codecs.encode(word, "rot13")
        if not syllables and len(word) > _SHORTEST and self._sure(coded):
            near.append((self._cost[coded] - _CODED, coded))
        if near:
            cost, other = min(near)
            yield cost + _SLIP + slip * len(word), _cased(other, typed)

    def _slips(self, word: str) -> set[str]:
        """Words of at least _SHORTEST letters with one letter dropped, added, exchanged or transposed."""
        parts = [(word[:at], word[at:]) for at in range(len(word) + 1)]
        found = {before + after[1:] for before, after in parts if len(word) > _SHORTEST}
        found |= {before + after[1] + after[0] + after[2:] for before, after in parts if len(after) > 1}
        for letter in self._alphabet:
            found |= {before + letter + after[1:] for before, after in parts if after}
            found |= {before + letter + after for before, after in parts}
        return found


def _jamo_slips(word: str) -> Iterator[str]:
    """Words with one jamo of one syllable exchanged, dropped or added."""
    for place, letter in enumerate(word):
        for other in _near(letter):
            yield word[:place] + other + word[place + 1 :]


@cache
def _near(letter: str) -> tuple[str, ...]:
    """The syllables that share all but one jamo with a syllable."""
    parts = syllable(letter)
    return (
        ()
        if parts is None
        else tuple(
            parts._replace(**{part: number}).letter
            for part, choices in zip(Syllable._fields, (FIRSTS, VOWELS, FINALS), strict=True)
            for number in range(len(choices))
            if number != getattr(parts, part)
        )
    )


def _cased(word: str, typed: str) -> str:
    """A lower-case word in the capitals of what was typed for it."""
    return word.upper() if typed.isupper() else word.capitalize() if typed[0].isupper() else word


def _plain(word: str) -> str:
    return word.lower().replace("’", "'")
