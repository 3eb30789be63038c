"""Hangul syllables and the jamo they are made of, by the arithmetic of the Unicode standard (section 3.12)."""

from __future__ import annotations

from typing import NamedTuple

FIRSTS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
FINALS = ("", *"ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")
_START = 0xAC00


class Syllable(NamedTuple):
    """Places in FIRSTS, VOWELS and FINALS."""

    first: int
    vowel: int
    final: int

    @property
    def jamo(self) -> tuple[str, str, str]:
        """First consonant, vowel and final consonant, the last perhaps empty."""
        return FIRSTS[self.first], VOWELS[self.vowel], FINALS[self.final]

    @property
    def letter(self) -> str:
        """As one letter."""
        return chr(_START + (self.first * len(VOWELS) + self.vowel) * len(FINALS) + self.final)


def syllable(letter: str) -> Syllable | None:
    """A letter taken apart; None for one that is no whole syllable."""
    code = ord(letter) - _START
    if not 0 <= code < len(FIRSTS) * len(VOWELS) * len(FINALS):
        return None
    rest, final = divmod(code, len(FINALS))
    return Syllable(*divmod(rest, len(VOWELS)), final)


def written_in(text: str) -> bool:
    """Whether any letter of a text is a Hangul syllable."""
    return any(map(syllable, text))
