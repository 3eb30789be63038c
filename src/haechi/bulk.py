"""Judge or answer a file: rows in, rows out in the same order; a bad row gets an error, a killed run goes on."""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from haechi.errors import ConfigError, DataError
from haechi.guards import AnsweringGuard, Guard, judged, rows_at_once
from haechi.schema import Answer, Conversation, Verdict
from haechi.store import Journal, digest

Rows = list[dict[str, Any]]


class Item(NamedTuple):
    """One input row."""

    id: Any
    """The caller's, else the line number."""
    query: str | None
    """None when the row is malformed."""
    error: str | None
    """What is wrong with the row."""


class Work(NamedTuple):
    """From input rows to output rows."""

    run: Callable[[Sequence[Item]], Rows]
    """Same length, same order."""
    chunk: int
    """Rows judged together and written together."""


class Outcome(NamedTuple):
    """What a run did."""

    rows: int
    """Rows written, those of an earlier, killed run included."""
    failed: int
    """Rows that carry an error."""


def verdict_row(id: Any, verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is written to files and printed by `--json`."""

    def short(number: float) -> float:
        return round(number, 6)

    return {
        "id": id,
        "unsafe": verdict.unsafe,
        "score": None if verdict.score is None else short(verdict.score),
        "category": verdict.category,
        "categories": {code: short(share) for code, share in verdict.categories.items()},
        "error": verdict.error,
    }


def answer_row(id: Any, answer: Answer) -> dict[str, Any]:
    """An answer as it is written: the verdict's fields and `answer`, null where the query is left to the LLM."""
    return {**verdict_row(id, answer.verdict), "answer": answer.text}


def judge(guard: Guard, *, answers: bool = False, force: bool = False) -> Work:
    """What judges input rows. Raises ConfigError when the guard cannot write the wanted answers."""
    if answers and not isinstance(guard, AnsweringGuard):
        raise ConfigError(f"the guard {guard.name} writes no answers")

    def run(items: Sequence[Item]) -> Rows:
        good = [Conversation.from_query(item.query, str(item.id)) for item in items if item.query is not None]
        if answers:
            assert isinstance(guard, AnsweringGuard)
            rows: Iterator[Any] = iter(guard.answer(good, force))
        else:
            rows = iter(judged(guard, good))
        results = []
        for item in items:
            if item.query is not None:
                result = next(rows)
            else:
                result = Answer(verdict=Verdict(error=item.error)) if answers else Verdict(error=item.error)
            results.append(answer_row(item.id, result) if answers else verdict_row(item.id, result))
        return results

    return Work(run, rows_at_once(guard))


def read_items(source: str) -> Iterator[Item]:
    """The rows of a file (`-`: standard input): JSONL of `{"id", "query"}` or plain lines.

    A `.jsonl` or `.txt` name says which, else the first non-blank line does. Blank lines are skipped, and a malformed
    line becomes a row with an error. Raises DataError when the file cannot be opened.
    """
    if source == "-":
        yield from _parsed(sys.stdin.buffer, None)
        return
    path = Path(source)
    try:
        with path.open("rb") as file:
            yield from _parsed(file, {".jsonl": True, ".ndjson": True, ".txt": False}.get(path.suffix))
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None


def _parsed(lines: Iterable[bytes], jsonl: bool | None) -> Iterator[Item]:
    for number, raw in enumerate(lines, 1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        if jsonl is None:
            jsonl = raw.lstrip().startswith(b"{")
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield Item(number, None, f"line {number} is not UTF-8 text")
            continue
        yield _parse(line, number) if jsonl else Item(number, line, None)


def _parse(line: str, number: int) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Item(number, None, f"line {number} is not JSON")
    if not isinstance(row, dict):
        return Item(number, None, f"line {number} is not a JSON object")
    id = row.get("id", number)
    if not isinstance(row.get("query"), str):
        return Item(id, None, f'line {number} has no text in "query"')
    return Item(id, row["query"], None)


def copy(
    items: Iterable[Item],
    work: Work,
    write: Callable[[Sequence[Item], Rows], object],
    progress: Callable[[int], object] = lambda done: None,
) -> Outcome:
    """Judge all items, chunk by chunk, and hand each chunk's rows on."""
    count = failed = 0
    stream = iter(items)
    while chunk := list(islice(stream, work.chunk)):
        rows = work.run(chunk)
        write(chunk, rows)
        count += len(rows)
        failed += _failed(rows)
        progress(count)
    return Outcome(count, failed)


def to_file(
    source: str, target: Path, work: Work, key: str, progress: Callable[[int], object] = lambda done: None
) -> Outcome:
    """Judge `source` into `target`, whole or not at all; rows of an unfinished run wait in `target.part`.

    `key` names guard and settings: the part file of a killed run over the same input and key is gone on with. Standard
    input and pipes cannot be read again, so theirs is not. Raises DataError for a missing input, an unwritable output
    or a full disk; what was written stays.
    """
    if not target.name or target.is_dir():
        raise DataError(f"cannot write {target}: it is a folder")
    # A stream has no content to know it by, so no later run takes its part file for its own.
    key = f"{key} {_digest(Path(source)) if Path(source).is_file() else uuid.uuid4()}"
    if source != "-" and not Path(source).exists():
        raise DataError(f"cannot read {source}: no such file")
    try:
        with Journal(target, hashlib.sha256(key.encode()).hexdigest()) as journal:
            done, failed = len(journal), _failed(journal.rows())
            rest = islice(read_items(source), done, None)
            fresh = copy(rest, work, lambda _, rows: journal.write(rows), lambda count: progress(done + count))
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from None
    return Outcome(done + fresh.rows, failed + fresh.failed)


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _failed(rows: Iterable[dict[str, Any]]) -> int:
    return sum(row["error"] is not None for row in rows)
