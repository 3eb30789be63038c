"""Stored verdicts, replayed: a service that has closed, a model that ran elsewhere, a run that must not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from haechi.errors import ConfigError, DataError
from haechi.schema import Conversation, Verdict
from haechi.store import digest, fingerprint, read_jsonl


class FrozenGuard:
    """Verdicts by the id of what is judged, as `haechi check --output` and `haechi evaluate` write them."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a missing file, DataError for a malformed or repeated row."""
        if not path.is_file():
            raise ConfigError(f"no such file of verdicts: {path}")
        self.name, self.identity = f"frozen:{path}", fingerprint("frozen", digest(path))
        self._verdicts: dict[str, Verdict] = {}
        for number, row in enumerate(read_jsonl(path), 1):
            if not isinstance(row, dict) or row.get("id") is None:
                raise DataError(f"{path} line {number}: a verdict needs the id of its row")
            id = str(row.pop("id"))
            if id in self._verdicts:
                raise DataError(f"{path} line {number}: the id {id!r} is there twice")
            try:
                self._verdicts[id] = Verdict(**{key: row[key] for key in row if key in Verdict.model_fields})
            except ValidationError as error:
                raise DataError(f"{path} line {number}: {error.errors()[0]['msg']}") from None

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        return [self._verdicts.get(str(item.id), _missing(item)) for item in Conversation.each(conversations)]


def _missing(item: Conversation) -> Verdict:
    return Verdict(
        error=f"no verdict is stored for {item.id!r}" if item.id else "only rows with an id have stored verdicts"
    )


def load(path: str | None) -> FrozenGuard:
    """`frozen:FILE`."""
    if path is None:
        raise ConfigError("name the file of verdicts: frozen:FILE")
    return FrozenGuard(Path(path))
