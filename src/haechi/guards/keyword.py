"""A list of words: the floor every model must beat, and a fast double in tests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from haechi.errors import ConfigError
from haechi.guards import EMPTY
from haechi.schema import Conversation, Verdict
from haechi.store import fingerprint


class KeywordGuard:
    """Unsafe when the query holds one of the words, as a whole word in spaced scripts; case is ignored."""

    def __init__(self, words: Mapping[str, str | None], name: str = "keyword") -> None:
        """`words` maps a word or phrase to the category it stands for, or None."""
        if not words:
            raise ConfigError("a keyword guard needs at least one word")
        self.name = name
        self._words = {word.lower(): category for word, category in words.items()}
        self.identity = fingerprint("keyword", sorted(self._words.items()))
        # Korean particles follow a word without a space: only scripts with spaces between words get a word boundary.
        longest = sorted(self._words, key=len, reverse=True)
        spaced = "|".join(re.escape(word) for word in longest if word.isascii())
        others = [re.escape(word) for word in longest if not word.isascii()]
        self._pattern = re.compile("|".join(([rf"\b(?:{spaced})\b"] if spaced else []) + others))

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        return [self._judge(item.query) for item in Conversation.each(conversations)]

    def _judge(self, query: str) -> Verdict:
        if not query.strip():
            return EMPTY
        match = self._pattern.search(query.lower())
        if match is None:
            return Verdict(unsafe=False, score=0.0)
        return Verdict(unsafe=True, score=1.0, category=self._words[match.group()])


def load(path: str | None) -> KeywordGuard:
    """A guard from a UTF-8 file: a word or phrase per line, optionally TAB and its category; `#` starts a comment."""
    if path is None:
        raise ConfigError("name the word list: keyword:FILE")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the word list {path}: {reason}") from None
    return KeywordGuard(dict(_entries(text.splitlines())))


def _entries(lines: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for line in lines:
        word, _, category = line.partition("#")[0].strip().partition("\t")
        if word:
            yield word.strip(), category.strip() or None
