"""Other words of asking: the request stays, the phrasing does not give the label away."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haechi.perturb import vary


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
    assert vary(query, random.Random(seed)) == vary(query, random.Random(seed))
