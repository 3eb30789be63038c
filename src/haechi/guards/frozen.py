"""Stored verdicts, replayed: a service that has closed, a model that ran elsewhere, a run that must not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from haechi.config import Config
from haechi.errors import ConfigError, DataError
from haechi.guards import settings
from haechi.schema import Conversation, Verdict
from haechi.store import digest, fingerprint, read_jsonl


class FrozenConfig(Config):
    """`{frozen: {files: [...], ...}}`."""

    files: tuple[Path, ...] = Field(min_length=1)
    """Verdicts of several sets; no id may be in two of them."""
    name: str | None = None
    """What tables call it, such as the system that gave them; default `frozen:FILE`."""


class FrozenGuard:
    """Verdicts by the id of what is judged, as `haechi check --output` and `haechi evaluate` write them."""

    def __init__(self, config: FrozenConfig) -> None:
        """Raises ConfigError for a missing file, DataError for a malformed or repeated row."""
        self._verdicts: dict[str, Verdict] = {}
        for path in config.files:
            if not path.is_file():
                raise ConfigError(f"no such file of verdicts: {path}")
            for number, row in enumerate(read_jsonl(path), 1):
                self._add(row, f"{path} line {number}")
        self.name = config.name or f"frozen:{', '.join(map(str, config.files))}"
        self.identity = fingerprint("frozen", *map(digest, config.files))

    def _add(self, row: Any, place: str) -> None:
        if not isinstance(row, dict) or row.get("id") is None:
            raise DataError(f"{place}: a verdict needs the id of its row")
        id = str(row.pop("id"))
        if id in self._verdicts:
            raise DataError(f"{place}: the id {id!r} is there twice")
        try:
            self._verdicts[id] = Verdict(**{key: row[key] for key in row if key in Verdict.model_fields})
        except ValidationError as error:
            raise DataError(f"{place}: {error.errors()[0]['msg']}") from None

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        return [self._verdicts.get(str(item.id), _missing(item)) for item in Conversation.each(conversations)]


def _missing(item: Conversation) -> Verdict:
    return Verdict(
        error=f"no verdict is stored for {item.id!r}" if item.id else "only rows with an id have stored verdicts"
    )


def load(spec: str | Mapping[str, Any] | None) -> FrozenGuard:
    """`frozen:FILE` or `{frozen: {files: [FILE, ...], ...}}`."""
    if spec is None:
        raise ConfigError("name the file of verdicts: frozen:FILE")
    given = {"files": [spec]} if isinstance(spec, str) else spec
    return FrozenGuard(settings(FrozenConfig, given, "frozen"))
