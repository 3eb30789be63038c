"""Answers that the policy's owner has approved: one text per category and language, said instead of a written one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from haechi import answers
from haechi.config import read_yaml
from haechi.errors import ConfigError, did_you_mean
from haechi.store import fingerprint
from haechi.taxonomy import Taxonomy

FILE = "answers.yaml"
"""Its name in a model folder: a model that comes with approved answers says them unless told otherwise."""


class Approved:
    """The approved answers to one policy's categories."""

    def __init__(self, texts: Mapping[str, Mapping[str, str]], languages: tuple[str, ...]) -> None:
        """`texts` by category code and language, `languages` those of the policy, all of them covered."""
        self._texts, self._languages = texts, languages
        self.identity = fingerprint("approved", {code: dict(by) for code, by in texts.items()})

    def text(self, category: str, language: str) -> tuple[str, str]:
        """The answer and its language: the query's where there is one, else the policy's first."""
        by = self._texts[category]
        chosen = language if language in by else self._languages[0]
        return by[chosen], chosen


def read_approved(path: Path, policy: Taxonomy) -> Approved:
    """The answers in a YAML file of category codes, each a mapping of language codes to a text.

    Raises ConfigError in one line for an unknown category, a category without a text in one of the policy's languages,
    and a phone number or link that the policy lists for no locale.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of categories to approved answers")
    known = {contact: names for locale in policy.resources for contact, names in policy.contacts(locale).items()}
    for code, by in tree.items():
        if code not in policy.codes:
            raise ConfigError(f"{path}: unknown category {code!r}{did_you_mean(str(code), policy.codes)}")
        if not isinstance(by, dict) or not all(isinstance(text, str) and text.strip() for text in by.values()):
            raise ConfigError(f"{path}: {code}: there must be a text per language")
        for language, text in by.items():
            for sentence in answers.sentences(text):
                if not answers.allowed(sentence, known):
                    raise ConfigError(
                        f"{path}: {code}: {language}: {sentence.strip()!r} names a contact the policy does not list"
                    )
    for code in policy.codes:
        for language in policy.languages:
            if language not in tree.get(code, {}):
                raise ConfigError(f"{path} lacks an answer for category {code!r} in language {language!r}")
    return Approved(
        {code: {key: " ".join(text.split()) for key, text in by.items()} for code, by in tree.items()}, policy.languages
    )
