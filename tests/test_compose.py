"""Guards made of guards: errors are neither safe nor unsafe, thresholds cut, cascades pass on what is unsure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from haechi.errors import ConfigError
from haechi.guards import AnsweringGuard, Guard, load_guard
from haechi.guards.compose import AnyOf, Cascade, Threshold
from haechi.guards.keyword import KeywordGuard
from haechi.guards.slm import load
from haechi.schema import Conversation, Verdict

SAFE, UNSAFE = Verdict(unsafe=False, score=0.1), Verdict(unsafe=True, score=0.9)
UNSURE, SILENT = Verdict(unsafe=True, score=0.6, categories={"a": 0.3, "b": 0.7}), Verdict(error="no answer")


class Scripted:
    """A guard that says what it is told to, and remembers how many it was asked."""

    def __init__(self, name: str, *verdicts: Verdict) -> None:
        self.name, self.identity, self._verdicts, self.asked = name, name, verdicts, 0

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        self.asked += len(conversations)
        return list(self._verdicts[: len(conversations)])


def test_any_of_is_as_strict_as_its_strictest_member() -> None:
    guard = AnyOf([Scripted("x", SAFE, SAFE, SAFE, SILENT), Scripted("y", SAFE, UNSAFE, SILENT, UNSAFE)])
    assert guard.check(["q"] * 4) == [SAFE, UNSAFE, SILENT, UNSAFE]


def test_a_cascade_asks_the_next_guard_only_when_unsure() -> None:
    first, second = Scripted("x", SAFE, UNSURE, SILENT, UNSAFE), Scripted("y", SILENT, SAFE)
    guard = Cascade([first, second], low=0.2, high=0.8)
    assert guard.check(["q"] * 4) == [SAFE, UNSURE, SAFE, UNSAFE]
    assert (first.asked, second.asked) == (4, 2)
    assert guard.check([]) == []


def test_a_threshold_cuts_elsewhere_and_names_the_category() -> None:
    cut = Threshold(Scripted("x", UNSURE, UNSAFE, SILENT, Verdict(unsafe=True)), at=0.7).check(["q"] * 4)
    assert [verdict.unsafe for verdict in cut] == [False, True, None, None]
    assert cut[0].category is None and "gives no score" in (cut[3].error or "")
    assert Threshold(Scripted("x", UNSURE), at=0.5).check(["q"])[0].category == "b"


def test_a_threshold_over_a_writing_guard_writes(exported: Path) -> None:
    model = load(exported)
    always, never = Threshold(model, at=0.0), Threshold(model, at=1.0)
    assert isinstance(always, AnsweringGuard) and not isinstance(Threshold(Scripted("x"), 0.5), AnsweringGuard)
    query = "how do I steal a car 1"
    assert always.answer([query])[0].text == model.answer([query], force=True)[0].text
    query = "how do I wash a car 1"
    assert never.answer([query])[0].text is None and never.answer([query], force=True)[0].text


def test_keywords_are_whole_words_in_spaced_scripts_and_parts_in_korean() -> None:
    guard = KeywordGuard({"kill": None, "폭탄": "crime_advice"})
    said = [verdict.unsafe for verdict in guard.check(["Kill it", "skillful", "폭탄을 만드는 법", " "])]
    assert said == [True, False, True, None]


def test_guards_are_made_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("bomb", encoding="utf-8")
    word = f"keyword:{tmp_path / 'w.txt'}"
    guard = load_guard({"any_of": [word, {"threshold": {"guard": word, "at": 0.5}}]})
    assert isinstance(guard, Guard) and guard.name == "any_of(keyword, keyword@0.5)"
    assert load_guard({"cascade": {"guards": [word, word], "low": 0, "high": 1}}).check(["bomb"])[0].unsafe


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("slim:x", "did you mean 'slm'"),
        ("keyword", "name the word list"),
        ({"any": []}, "unknown guard 'any'"),
        ({"keyword": {"file": "x"}}, "'keyword:ARGUMENT', not by a mapping"),
        ({"slm": "folder"}, "settings of a slm guard are a mapping"),
        ({"slm": {"modle": "folder"}}, "modle"),
        ({"slm": {"point": "sharp"}}, "no operating point 'sharp'"),
        ({"any_of": []}, "at least one guard"),
        ({"threshold": {"guard": None, "at": 1}}, "not None"),
        ({"threshold": {"guard": "keyword:x", "at": 2}}, "cannot read the word list x"),
        ({"cascade": {"guards": ["keyword:x"], "low": 0.9, "high": 0.1}}, "above high"),
        ({"cascade": {"guards": []}}, "needs exactly"),
        ({"any_of": ["a"], "cascade": {}}, "mapping of one key"),
    ],
)
def test_a_wrong_guard_is_one_line(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_guard(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)
