"""What a user can do wrong, each told in one line; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HaechiError(Exception):
    """A user's mistake or a missing thing; its message is one line that says what to do."""


class ConfigError(HaechiError):
    """A configuration file, override or taxonomy that cannot be used."""


class DataError(HaechiError):
    """A data set or a data file that is missing, malformed or forbidden here."""


class ModelError(HaechiError):
    """A model folder that is missing, truncated or made for another taxonomy or template."""


class MissingExtra(HaechiError):
    """A feature needs packages that are not installed."""

    def __init__(self, extra: str, feature: str) -> None:
        super().__init__(f"{feature} needs the extra {extra!r}: pip install 'haechi[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` when a known name is close to `name`, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
