"""Answers that the policy's owner has approved: one text per category and language, said instead of a written one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haechi import answers
from haechi.config import read_yaml
from haechi.errors import ConfigError, did_you_mean
from haechi.store import fingerprint
from haechi.taxonomy import Taxonomy

FILE = "answers.yaml"
"""Its name in a model folder: a model that comes with approved answers says them unless told otherwise."""
GENERAL = "general"
"""Where the answer stands that fits a harmful query of any category."""
SURE = 0.9
"""Share of the likeliest category from which its own answer is said. On the embedded model's validation rows the
category is right for 94% of the queries called unsafe above it and for 56% below (docs/answers.md)."""


class Approved:
    """The approved answers to one policy's categories."""

    def __init__(self, texts: Mapping[str, Mapping[str, str]], policy: Taxonomy) -> None:
        """`texts` by category code (or `general`) and language; the policy's languages are all covered."""
        self._texts, self._first = texts, policy.languages[0]
        self.identity = fingerprint("approved", {code: dict(by) for code, by in texts.items()})

    def text(self, categories: Mapping[str, float], language: str) -> tuple[str, str]:
        """The answer and its language, for a query with these shares of categories: that of the likeliest one when it
        is sure enough and there are answers in the query's language, else the general one."""
        likeliest = max(categories, key=categories.__getitem__)
        by = self._texts[likeliest]
        if language in by and categories[likeliest] >= SURE:
            return by[language], language
        general = self._texts.get(GENERAL, {})
        chosen = language if language in general or language in by else self._first
        return general.get(chosen) or answers.refusal(chosen), chosen


def read_approved(path: Path, policy: Taxonomy) -> Approved:
    """The answers in a YAML file of category codes, each a mapping of language codes to a text; `general` is optional.

    Raises ConfigError in one line for an unknown category or language, a category without a text in one of the policy's
    languages, a text that is no plain text, and a phone number or link that the policy lists for no locale.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of categories to approved answers")
    texts: dict[str, dict[str, str]] = {}
    for code, by in tree.items():
        if code not in (*policy.codes, GENERAL):
            raise ConfigError(f"{path}: unknown category {code!r}{did_you_mean(str(code), (*policy.codes, GENERAL))}")
        if not isinstance(by, dict):
            raise ConfigError(f"{path}: {code}: there must be a text per language")
        texts[code] = {language: _text(text, language, policy, f"{path}: {code}") for language, text in by.items()}
    for code in (*policy.codes, *({GENERAL} & texts.keys())):
        for language in policy.languages:
            if language not in texts.get(code, {}):
                raise ConfigError(f"{path} lacks an answer for category {code!r} in language {language!r}")
    return Approved(texts, policy)


def _text(text: Any, language: Any, policy: Taxonomy, where: str) -> str:
    """One answer, in single spaces."""
    known = (*policy.languages, *answers.LANGUAGES)
    if language not in known:
        raise ConfigError(f"{where}: no query is taken for one in language {language!r}; known: {', '.join(known)}")
    plain = " ".join(text.split()) if isinstance(text, str) else ""
    if not plain.isprintable() or not any(map(str.isalpha, plain)):
        raise ConfigError(f"{where}: {language}: there must be a plain text")
    for sentence in answers.sentences(plain):
        if answers.contacts(sentence) and not any(
            answers.allowed(sentence, policy.contacts(locale)) for locale in policy.resources
        ):
            raise ConfigError(f"{where}: {language}: {sentence.strip()!r} names a contact the policy does not list")
    return plain
