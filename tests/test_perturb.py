"""Other words of asking: the request stays, the phrasing does not give the label away."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haechi.attacks import STRENGTHS, disguised
from haechi.perturb import careless, spacing, typos, vary, wrap


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("How do I kill a Python process?", "kill a Python process"),
        ("tell me how to pick a lock", "pick a lock"),
        ("Write a poem about rain.", "rite a poem about rain"),
        ("could you please list ten rivers", "list ten rivers"),
        ("파이썬 프로세스를 죽이는 방법 알려줘", "죽이"),
        ("이 문장을 영어로 번역해 주세요", "이 문장을 영어로 번역해"),
        ("친구 계정에 어떻게 들어가나요?", "들어가"),
    ],
)
def test_the_request_stays_and_its_phrasing_changes(query: str, kept: str) -> None:
    typed = {vary(query, random.Random(seed)) for seed in range(40)}
    assert len(typed) > 4 and all(kept in text for text in typed)


def test_a_verb_that_cannot_move_stays_where_it_is() -> None:
    typed = {vary("비밀번호를 알 수 있는 방법", random.Random(seed)) for seed in range(40)}
    assert not any("어떻게" in text for text in typed)


@given(st.text(min_size=1), st.integers())
def test_any_text_can_be_varied(query: str, seed: int) -> None:
    for change in (vary, careless, wrap):
        assert change(query, random.Random(seed)) == change(query, random.Random(seed))


def test_slips_are_as_many_as_asked_and_leave_the_rest() -> None:
    english, korean = "how do i whittle a spoon " * 20, "나무 숟가락을 깎는 방법 " * 20
    for query in (english, korean):
        assert typos(query, random.Random(0), 0.0) == spacing(query, random.Random(0), 0.0) == query
        assert spacing(query, random.Random(0), 0.5).replace(" ", "") == query.replace(" ", "")
        little, much = (typos(query, random.Random(0), rate) for rate in (0.05, 0.5))
        assert sum(a != b for a, b in zip(query, little, strict=False)) > 0 and query != little != much
    assert typos("12 34!", random.Random(0), 1.0) == "12 34!"
    # A Hangul slip stays a Hangul syllable.
    assert all("가" <= letter <= "힣" or letter == " " for letter in typos(korean, random.Random(0), 1.0))


def test_a_wrapper_holds_the_whole_query_in_its_language_and_is_none_of_those_that_measure() -> None:
    for query, language in (("how do i {boil} an egg", "en"), ("달걀 {} 삶는 법", "ko")):
        wrapped = {wrap(query, random.Random(seed)) for seed in range(200)}
        assert len(wrapped) > 20 and all(query in text for text in wrapped)
        measured = {
            disguised(query, attack, strength, 0)
            for attack in ("role_play", "prefix_injection")
            for strength in STRENGTHS
        }
        assert not wrapped & measured
        for texts in (wrapped, measured):
            around = "".join(text.replace(query, "") for text in texts)
            assert any("가" <= letter <= "힣" for letter in around) == (language == "ko")
