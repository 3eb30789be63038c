"""JSONL files: read leniently, write atomically, resume after a kill; and small JSON files, never half written."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from haechi.errors import DataError

T = TypeVar("T")
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader or a kill sees the old file or the new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {path}: {error.strerror}") from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises DataError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def dumps(row: Any) -> str:
    """One row as one line of JSON that UTF-8 can hold: lone surrogates, which it cannot, are escaped."""
    line = _ENCODER.encode(row)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return line


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot hold, lone surrogates, replaced."""
    return text.encode("utf-8", "replace").decode()


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSONL, atomically."""
    write_text(path, "".join(dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[Any]:
    """The rows of a JSONL file, plain or `.gz`. Raises DataError naming the file and line of anything malformed."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        # Beside malformed text: a number of thousands of digits, lists in lists without end.
                        raise DataError(f"{path} line {number} is not JSON") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def packaged_pairs(name: str) -> Iterator[tuple[str, str]]:
    """The lines `first TAB second` of a file that the package brings in `data/`."""
    text = (resources.files("haechi") / "data" / name).read_text(encoding="utf-8")
    for line in text.splitlines():
        first, second = line.split("\t")
        yield first, second


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data: equal parts, equal fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Rows on their way to `path`: kept in `path.part` until all are there, then moved into place in one step.

    After a kill or a full disk the part file holds whole rows only (a torn last line is cut on reopening) and
    `len(journal)` says how many: the caller goes on from there. `key` identifies the work (input hash, settings);
    a part file of other work is started afresh.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._key = path.with_name(path.name + ".part.key")
        self._done = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._part.exists() and self._key.exists() and self._key.read_text(encoding="utf-8") == key:
                self._done = self._trim()
            else:
                self._part.unlink(missing_ok=True)
                write_text(self._key, key)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None

    def _trim(self) -> int:
        """Cut a torn last line; the number of whole rows left."""
        with self._part.open("r+b") as file:
            whole = lines = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                lines += 1
            file.truncate(whole)
        return lines

    def __len__(self) -> int:
        return self._done

    def rows(self) -> Iterator[Any]:
        """The rows written so far."""
        if self._part.exists():
            yield from read_jsonl(self._part)

    def __enter__(self) -> Journal:
        self._file = self._part.open("a", encoding="utf-8")
        return self

    def write(self, rows: Iterable[Any]) -> None:
        """Append rows and push them to the disk. Raises DataError, keeping the whole rows, when the disk is full."""
        batch = [dumps(row) for row in rows]
        try:
            self._file.writelines(line + "\n" for line in batch)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"cannot write {self.path}: {error.strerror}; {self._done} rows are kept, rerun to go on from there"
            ) from None
        self._done += len(batch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing flushes again: after a full disk that fails once more, and the rows are already told as kept.
        with contextlib.suppress(OSError):
            self._file.close()
        if kind is None:
            os.replace(self._part, self.path)
            self._key.unlink(missing_ok=True)


def resumable(
    path: Path, key: str, items: Iterable[T], work: Callable[[list[T]], list[Any]], chunk: int
) -> Iterator[Any]:
    """The rows `work` makes of `items`, so many at a time, through a journal; a finished file of the same key is taken
    as is. `path` with the suffix `.key` says whose it is. All rows must be taken: only then is the file whole.
    """
    stamp = path.with_suffix(".key")
    if _finished(path, key):
        yield from read_jsonl(path)
        return
    # A kill between the new file and its stamp must not leave the old stamp on it.
    stamp.unlink(missing_ok=True)
    with Journal(path, key) as journal:
        rest = islice(items, len(journal), None)
        yield from journal.rows()
        while part := list(islice(rest, chunk)):
            done = work(part)
            journal.write(done)
            yield from done
    write_text(stamp, key)


def mend(
    path: Path,
    key: str,
    wrong: Callable[[Any], bool],
    items: Iterable[T],
    work: Callable[[list[T]], list[Any]],
    chunk: int,
) -> None:
    """Make the `wrong` rows of a finished `resumable` file anew, so many at a time."""
    if not _finished(path, key):
        return
    rows = list(read_jsonl(path))
    places = [index for index, row in enumerate(rows) if wrong(row)]
    sources = list(items) if places else []
    for start in range(0, len(places), chunk):
        part = places[start : start + chunk]
        for index, row in zip(part, work([sources[index] for index in part]), strict=True):
            rows[index] = row
        write_text(path, "".join(dumps(row) + "\n" for row in rows))


def _finished(path: Path, key: str) -> bool:
    stamp = path.with_suffix(".key")
    return path.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key
