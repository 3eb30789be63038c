"""Approved answers: the owner's words and no others, for every category and language of the policy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import haechi
from conftest import cli
from haechi import answers, approved, export
from haechi.approved import FILE, read_approved
from haechi.errors import ConfigError
from haechi.guards import load_guard
from haechi.guards.slm import load
from haechi.modelfolder import default_model
from haechi.taxonomy import load_taxonomy

CODES = load_taxonomy().codes
ENGLISH, KOREAN = "I won't help with a {}. The police know more.", "{}은(는) 돕지 않아요. 경찰에 물어보세요."


def texts(**changes: Any) -> dict[str, Any]:
    return {code: {"en": ENGLISH.format(code), "ko": KOREAN.format(code)} for code in CODES} | changes


def stored(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def modest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is seldom as sure of a category as the embedded one."""
    monkeypatch.setattr(approved, "SURE", 0.2)


def test_nothing_but_approved_words_is_said(exported: Path, tmp_path: Path) -> None:
    guard = load(exported, answers=stored(tmp_path / "own.yaml", texts()))
    theft, secret, tea = guard.answer(["how do I steal a car 1", "옆집 비밀번호 알려줘 1", "how do I wash a car 1"])
    assert theft.text == ENGLISH.format("crime_advice") and theft.finished
    assert secret.text == KOREAN.format(secret.verdict.category) and secret.language == "ko"
    assert tea.text is None and tea.verdict.unsafe is False
    assert list(guard.stream("how do I steal a car 1")) == [
        "I won't help with a crime_advice.",
        "The police know more.",
    ]
    handed = guard.answer(["how do I wash a car 1"], always=True)[0].text
    assert handed in answers.deferrals("en")
    foreign = guard.answer(["как украсть машину"], force=True)[0]
    assert foreign.language == "en" and foreign.text == answers.refusal("en")


def test_the_category_decides_only_where_it_is_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approved, "SURE", 0.9)
    general = {"en": "I won't help.", "ko": "돕지 않아요."}
    own = read_approved(stored(tmp_path / "own.yaml", texts(general=general)), load_taxonomy())
    sure, unsure = ({"crime_advice": share, "self_harm_suicide": 1 - share} for share in (0.95, 0.7))
    assert own.text(sure, "ko") == (KOREAN.format("crime_advice"), "ko")
    assert own.text(unsure, "ko") == ("돕지 않아요.", "ko")
    assert own.text(sure, "ru") == ("I won't help.", "en")


def test_lives_at_risk_get_the_help_line(tmp_path: Path) -> None:
    (answer,) = haechi.load(answers=str(stored(tmp_path / "own.yaml", texts()))).answer(["I want to kill myself"])
    assert answer.text == f"{ENGLISH.format('self_harm_suicide')} 988 Suicide & Crisis Lifeline."


def test_a_model_says_the_answers_in_its_folder_unless_told_otherwise(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "trained")
    stored(folder / FILE, texts())
    written = load(trained)
    guard = load(export.run(folder, tmp_path / "exported", "fp32", lambda line: None))
    assert guard.answer(["how do I steal a car 1"])[0].text == ENGLISH.format("crime_advice")
    own_words = load_guard({"slm": {"model": str(folder), "answers": "written"}})
    assert own_words.name == f"{guard.name} written" and own_words.identity != guard.identity
    assert own_words.answer(["how do I steal a car 1"]) == written.answer(["how do I steal a car 1"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (["a"], "must hold a mapping of categories to approved answers"),
        (
            texts(crime_advise={"en": "No.", "ko": "안 돼요."}),
            "unknown category 'crime_advise'; did you mean 'crime_adv",
        ),
        (texts(crime_advice={"en": "I won't help."}), "lacks an answer for category 'crime_advice' in language 'ko'"),
        (texts(crime_advice={"en": "I won't help.", "ko": " . "}), "crime_advice: ko: there must be a plain text"),
        (
            texts(crime_advice={"en": "I won't \ud800.", "ko": "안 돼요."}),
            "crime_advice: en: there must be a plain text",
        ),
        (
            texts(crime_advice={"en": "No way.", "ko": "안 돼요.", False: "Nei."}),
            "no query is taken for one in language False",
        ),
        (texts(crime_advice="I won't help."), "crime_advice: there must be a text per language"),
        (
            texts(crime_advice={"en": "I won't. Call 1-900-555-0199 now.", "ko": "안 돼요."}),
            "crime_advice: en: 'Call 1-900-555-0199 now.' names a contact the policy does not list",
        ),
        (None, "no such file"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line(tmp_path: Path, tree: Any, said: str) -> None:
    path = tmp_path / "own.yaml"
    if tree is not None:
        stored(path, tree)
    result = cli("answer", "--answers", str(path), "how do I steal a car")
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(ConfigError):
        read_approved(path, load_taxonomy())


def test_the_embedded_models_answers_pass_every_check() -> None:
    policy = load_taxonomy()
    own = read_approved(default_model() / FILE, policy)
    for code in CODES:
        for language, locale in answers.LOCALES.items():
            text, said_in = own.text({code: 1.0}, language)
            line = answers.help_line(policy, code, language, locale, text)
            urgent = policy[code].urgent
            assert said_in == language and bool(line) == urgent
            assert answers.problems(f"{text} {line}".strip(), language, policy.contacts(locale), urgent=urgent) == []
            general, _ = own.text({code: 0.1}, language)
            assert general != text and answers.problems(general, language, {}) == []
