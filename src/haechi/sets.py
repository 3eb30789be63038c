"""Public and own data sets by name: where each lives, under which licence, whether it may be trained on."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from haechi.config import Config, parse, read_yaml
from haechi.errors import DataError, MissingExtra, did_you_mean
from haechi.schema import Example, Label
from haechi.store import dumps, read_jsonl


class Hub(Config):
    """How a set's columns on the Hugging Face hub map to ours."""

    path: str
    """Hub name of the data set."""
    config: str | None = None
    """Its configuration, when it has several."""
    split: str
    """Which split."""
    query: str
    """Column of the query."""
    label: str | None = None
    """Column of the label."""
    safe: tuple[str, ...] = ()
    """Label values that mean safe."""
    unsafe: tuple[str, ...] = ()
    """Label values that mean unsafe."""
    response: str | None = None
    """Column of a reference answer."""
    all_label: Label | None = None
    """The label of every row, when the set has one."""


class DataSet(Config):
    """One entry of `data/sets.yaml`."""

    use: Literal["train", "eval"]
    """`eval` sets are measured on and never trained on."""
    lang: str
    """Main language."""
    title: str
    """Its name in the literature."""
    home: str
    """Public page."""
    licence: str
    """Licence of the rows."""
    note: str = ""
    """What it tells, or its weakness."""
    hub: Hub | None = None
    """Where `datasets` finds it, when known."""


class _Registry(Config):
    sets: dict[str, DataSet]


@cache
def registry() -> dict[str, DataSet]:
    """Every known public set by name."""
    with resources.as_file(resources.files("haechi") / "data" / "sets.yaml") as path:
        return parse(_Registry, read_yaml(path), "the set registry").sets


def data_folder() -> Path:
    """The local mirror of public data, from the environment variable HAECHI_DATA (default `../shared/data`)."""
    return Path(os.environ.get("HAECHI_DATA", "../shared/data"))


def corpus_folder() -> Path:
    """The project's own rows, from the environment variable HAECHI_CORPUS (default `corpus`)."""
    return Path(os.environ.get("HAECHI_CORPUS", "corpus"))


def measured_only(name: str) -> bool:
    """Whether a set is there to be measured on: nothing may be trained on it or fitted to it."""
    known = registry().get(name)
    return (known is not None and known.use == "eval") or Path(name).name.startswith("policy_test")


def set_file(name: str) -> Path | None:
    """Where a set lies on this machine; None for one that only the hub has. Raises DataError for an unknown name."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        if not Path(name).is_file():
            raise DataError(f"no such file: {name}")
        return Path(name)
    known, own = registry(), corpus_folder() / f"{name}.jsonl"
    if not own.is_file() and name not in known:
        names = [*known, *(file.stem for file in corpus_folder().glob("*.jsonl"))]
        raise DataError(f"unknown data set {name!r}{did_you_mean(name, names)}")
    places = [own, *([data_folder() / known[name].use / f"{name}.jsonl.gz"] if name in known else [])]
    return next((place for place in places if place.is_file()), None)


def load_set(name: str) -> list[Example]:
    """All rows of a set; see `read_set`."""
    return list(read_set(name))


def read_set(name: str) -> Iterator[Example]:
    """The rows of a set, one by one: a file of the corpus or of the local mirror, a JSONL path, else the public hub.

    Raises DataError naming the set, its home and its licence when it is in neither place.
    """
    file = set_file(name)
    if file is not None:
        return _stored(file)
    entry = registry()[name]
    if entry.hub is None:
        folder = data_folder() / entry.use
        raise DataError(
            f"data set {name!r} ({entry.title}, {entry.licence}) is not in {folder} and has no known hub copy; "
            f"fetch it from {entry.home} and set HAECHI_DATA to the folder that holds {entry.use}/{name}.jsonl.gz"
        )
    return from_hub(name, entry, entry.hub)


def set_hash(rows: Iterable[Example]) -> str:
    """Content hash of a set's ids, queries and labels: figures compare only where it is equal."""
    content = hashlib.sha256()
    for row in rows:
        content.update(dumps([row.id, row.query, row.label]).encode())
    return content.hexdigest()[:16]


class LabelledSet:
    """The labelled rows of a set, read anew by every pass over it: in memory are only a few bytes a row."""

    def __init__(self, name: str, change: Callable[[Example], Example] | None = None) -> None:
        """`change` is applied to every row. Raises DataError when no row has a label, or two share an id."""
        self.name, self._change = name, change
        self._unsafe, self._ids = bytearray(), array("q")
        self._groups: dict[str, tuple[dict[str, int], array[int]]] = {
            field: ({}, array("I")) for field in ("category", "kind", "lang")
        }
        self.sha256 = set_hash(self._noted())
        """See `set_hash`."""
        self.truth: npt.NDArray[np.bool_] = np.frombuffer(self._unsafe, np.bool_)
        """[rows] whether the label is unsafe."""
        if not len(self):
            raise DataError(f"data set {name!r} has no labelled rows to evaluate on")
        # Two of a million ids share a 64-bit hash by chance once in thirty million sets.
        if len(np.unique(np.frombuffer(self._ids, np.int64))) < len(self):
            raise DataError(f"data set {name!r} has rows that share an id")
        del self._ids

    def __len__(self) -> int:
        return len(self._unsafe)

    def __iter__(self) -> Iterator[Example]:
        for row in read_set(self.name):
            if row.label:
                yield self._change(row) if self._change else row

    def groups(self, field: str) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        """Each value of `category`, `kind` or `lang` in order, and [rows] which rows have it."""
        numbers, places = self._groups[field]
        of = np.frombuffer(places, np.uint32)
        for value in sorted(numbers):
            yield value, of == numbers[value]

    def _noted(self) -> Iterator[Example]:
        for row in self:
            self._unsafe.append(row.label == "unsafe")
            self._ids.append(hash(row.id))
            for field, (numbers, places) in self._groups.items():
                places.append(numbers.setdefault(str(getattr(row, field)), len(numbers)))
            yield row


def from_hub(name: str, entry: DataSet, hub: Hub) -> Iterator[Example]:
    """The rows of a set as `datasets` loads it, its columns mapped to ours."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("train", f"fetching the data set {name!r}") from None
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:
        raise DataError(
            f"data set {name!r} ({entry.title}, {entry.licence}) could not be fetched from {entry.home}: "
            f"{type(error).__name__}; place it under HAECHI_DATA as {entry.use}/{name}.jsonl.gz"
        ) from None
    for index, row in enumerate(rows):
        value = str(row[hub.label]) if hub.label else None
        label = hub.all_label or ("safe" if value in hub.safe else "unsafe" if value in hub.unsafe else None)
        yield Example(
            id=f"{name}-{index}",
            lang=entry.lang,
            query=str(row[hub.query]),
            label=label,
            category=value,
            response=str(row[hub.response]) if hub.response and row[hub.response] else None,
            source=entry.title,
            license=entry.licence,
        )


_COLUMNS = frozenset(Example.model_fields)
_NEEDED = {"id", "lang"}


def _stored(path: Path) -> Iterator[Example]:
    for number, row in enumerate(read_jsonl(path), 1):
        yield _example(row, path, number)


def _example(row: Any, path: Path, number: int) -> Example:
    """A stored row; columns beyond ours (translations, annotations) are left behind, a missing id is its number.

    A curated row (`haechi curate`) is its example."""
    row = row.get("example", row) if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise DataError(f"{path}: row {number} lacks a query")
    kept = row if row.keys() <= _COLUMNS else {key: value for key, value in row.items() if key in _COLUMNS}
    if "group" in kept:
        # Some public sets number their groups.
        kept["group"] = str(kept["group"])
    try:
        return Example(**kept) if kept.keys() >= _NEEDED else Example(**{"id": str(number), "lang": "und", **kept})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path}: row {row.get('id', number)!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
