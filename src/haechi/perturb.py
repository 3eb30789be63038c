"""Pure functions from a query to the same query typed otherwise.

How a request is phrased often gives its label away in training data: "how do I" asks harmlessly, "알려줘" asks for
harm, because of who wrote which rows. `vary` takes that hint away by moving both labels between the same phrasings.
"""

from __future__ import annotations

import random
import re

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
