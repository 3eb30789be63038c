"""Pure functions from a query to the same query typed otherwise.

How a request is phrased often gives its label away in training data: "how do I" asks harmlessly, "알려줘" asks for
harm, because of who wrote which rows. `vary` takes that hint away by moving both labels between the same phrasings.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from functools import cache

from haechi.hangul import Syllable, syllable, written_in
from haechi.store import packaged_pairs

_ENGLISH_HOW = re.compile(
    r"(?:how (?:to|do i|do you|can i|can you|could i|would i|should i)|(?:please )?(?:tell|show|teach) me how to|"
    r"explain how to|what(?:'s| is) the (?:best|easiest) way to|i (?:want|need) to know how to)\s+"
    r"(?P<rest>.+?)[\s.?!]*",
    re.I | re.S,
)
_ENGLISH_HOW_FORMS = (
    "how to {}", "how do i {}?", "how can i {}?", "How do you {}?", "How would I {}?", "How should I {}?",
    "tell me how to {}", "Explain how to {}.", "What's the best way to {}?", "What is the easiest way to {}?",
    "Can you tell me how to {}?", "I want to know how to {}.", "i need to know how to {}",
)  # fmt: skip
_ENGLISH_ASK = re.compile(
    r"(?:(?:please|can you|could you|would you|i (?:need|want) you to)(?: please)?\s+)?"
    r"(?P<rest>(?:write|generate|create|draft|make|give|tell|explain|list|describe|provide|show|compose|develop|suggest)"
    r"\s.+?)[\s.?!]*",
    re.I | re.S,
)
_ENGLISH_ASK_FORMS = (
    "{}", "{}.", "please {}", "Can you {}?", "could you {}?", "Could you please {}?", "i need you to {}",
    "I want you to {}.", "I'd like you to {}.", "Would you {}?", "hey, {}",
)  # fmt: skip
_KOREAN_TELL = r"(?:(?:알려|가르쳐|설명해|말해|찾아|추천해) ?(?:줘|줘요|주세요|줄래|줄래요|달라|봐))"
_KOREAN_METHOD = re.compile(
    r"(?P<rest>.*?)(?P<verb>[가-힣]+)는 ?방?법(?:을|은|이|도|만)?(?: ?좀)?(?: ?(?:자세히|상세히|빨리))?(?: ?"
    rf"{_KOREAN_TELL})?[\s.?!~]*",
    re.S,
)
_KOREAN_HOW = re.compile(
    r"(?P<rest>.*?)어떻게 (?:해야 )?(?P<verb>[가-힣]+?)(?:나요|는지|는 ?거야|는 ?건가요|는 ?거예요|니|냐)(?: ?"
    rf"{_KOREAN_TELL})?[\s.?!~]*",
    re.S,
)
_KOREAN_METHOD_FORMS = (
    "{rest}{verb}는 방법", "{rest}{verb}는 법 좀", "{rest}{verb}는 방법 알려줘", "{rest}{verb}는 방법을 알려주세요",
    "{rest}{verb}는 방법이 뭔가요?", "{rest}{verb}는 방법 좀 알려주실 수 있나요?", "{rest}{verb}는 방법이 뭐야?",
    "{rest}{verb}는 방법이 궁금해요", "{rest}{verb}는 법을 설명해 주세요.",
)  # fmt: skip
_KOREAN_HOW_FORMS = (
    "{rest}어떻게 {verb}나요?", "{rest}어떻게 {verb}는지 알려줘", "{rest}어떻게 {verb}는지 알고 싶어요.",
    "{rest}어떻게 {verb}는 거야?", "{rest}어떻게 {verb}는지 궁금합니다", "{rest}어떻게 {verb}나요",
)  # fmt: skip
_KOREAN_ASK = re.compile(r"(?P<rest>.*[가-힣]) ?(?:줘|줘요|주세요|줄래|줄래요|주시겠어요)[\s.?!~]*", re.S)
_KOREAN_ASK_FORMS = (
    "{} 줘", "{}줘", "{} 주세요", "{} 주세요.", "{} 주실 수 있나요?", "{} 줄래?", "{} 줄 수 있어?", "{} 주시겠어요?",
    "{} 주시면 감사하겠습니다.",
)  # fmt: skip


def vary(query: str, rng: random.Random) -> str:
    """The same request in other words of asking; a query of no known phrasing only changes its last punctuation."""
    if match := _ENGLISH_HOW.fullmatch(query):
        return rng.choice(_ENGLISH_HOW_FORMS).format(match["rest"])
    if match := _ENGLISH_ASK.fullmatch(query):
        rest = match["rest"]
        return rng.choice(_ENGLISH_ASK_FORMS).format(rest[0].lower() + rest[1:])
    if match := _KOREAN_METHOD.fullmatch(query) or _KOREAN_HOW.fullmatch(query):
        # "할 수 있는 방법" cannot take "어떻게" before its verb.
        forms = _KOREAN_METHOD_FORMS + (() if match["verb"] in ("있", "없") else _KOREAN_HOW_FORMS)
        return rng.choice(forms).format(rest=match["rest"], verb=match["verb"])
    if match := _KOREAN_ASK.fullmatch(query):
        return rng.choice(_KOREAN_ASK_FORMS).format(match["rest"])
    bare = query.rstrip(" .?!~")
    asks = query.rstrip().endswith("?")
    return (bare or query) + rng.choice(("", "?") if asks else ("", "."))


_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {key: row[max(0, at - 1) : at] + row[at + 1 : at + 2] for row in _KEYS for at, key in enumerate(row)}
_LIKE_VOWELS = {0: 4, 4: 0, 1: 5, 5: 1, 8: 13, 13: 8, 18: 20, 20: 18, 3: 7, 7: 3, 11: 15, 15: 11, 10: 15}
"""Vowels that are confused in typing or by ear (ㅐ/ㅔ, ㅗ/ㅜ, ...), by their number in a syllable."""


def typos(query: str, rng: random.Random, rate: float) -> str:
    """About `rate` of the letters mistyped: dropped, doubled, exchanged with the next, or a neighbouring key. In a
    Hangul syllable it is the vowel that slips or the final consonant that is lost."""
    letters = list(unicodedata.normalize("NFC", query))
    typed: list[str] = []
    index = 0
    while index < len(letters):
        letter = letters[index]
        index += 1
        if not letter.isalpha() or rng.random() >= rate:
            typed.append(letter)
        elif whole := syllable(letter):
            typed.append(_slipped(whole, rng))
        else:
            slip = rng.randrange(4)
            if slip == 0:
                continue
            if slip == 1 and index < len(letters) and letters[index].isalpha():
                typed += [letters[index], letter]
                index += 1
            elif slip == 2 and letter.lower() in _NEIGHBOURS:
                typed.append(rng.choice(_NEIGHBOURS[letter.lower()]))
            else:
                typed += [letter, letter]
    return "".join(typed)


def _slipped(whole: Syllable, rng: random.Random) -> str:
    if whole.final and rng.random() < 0.5:
        return whole._replace(final=0).letter
    return whole._replace(vowel=_LIKE_VOWELS.get(whole.vowel, whole.vowel)).letter


def spacing(query: str, rng: random.Random, rate: float) -> str:
    """Each space is lost with the probability `rate`, and a word is torn in two with a tenth of it per letter."""
    typed = []
    for before, letter in zip(" " + query, query, strict=False):
        if letter.isspace():
            if rng.random() >= rate:
                typed.append(letter)
            continue
        if not before.isspace() and rng.random() < rate / 10:
            typed.append(" ")
        typed.append(letter)
    return "".join(typed)


_CARELESS: tuple[tuple[Callable[[str, random.Random, float], str], float], ...] = ((typos, 0.15), (spacing, 0.8))


def careless(query: str, rng: random.Random) -> str:
    """The query as a hurried user types it: misspelt, or its spaces wrong, a little or more."""
    slip, most = rng.choice(_CARELESS)
    return slip(query, rng, rng.random() * most) or query


@cache
def _wrappers() -> dict[str, list[str]]:
    forms: dict[str, list[str]] = {}
    for language, form in packaged_pairs("wrappers.tsv"):
        forms.setdefault(language, []).append(form)
    return forms


def wrap(query: str, rng: random.Random) -> str:
    """The query inside a persona, a game, an override, in its own language. People wrap harmless requests as well as
    harmful ones, so that a wrapper alone must not decide. None of these is among `haechi.attacks`, which measure."""
    return rng.choice(_wrappers()["ko" if written_in(query) else "en"]).replace("{}", query)
