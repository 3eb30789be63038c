"""`haechi review export SET`: a sheet on which people compare a guard's answers with the reference answers, blind."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable
from pathlib import Path

from haechi.errors import ConfigError, DataError
from haechi.guards import AnsweringGuard, Guard
from haechi.schema import Conversation
from haechi.sets import load_set, set_hash
from haechi.store import write_json, write_text

COLUMNS = ("number", "query", "answer A", "answer B", "better (A, B or tie)", "note")


def export(
    guard: Guard, name: str, output: Path, *, rows: int = 100, seed: int = 0, report: Callable[[str], None] = print
) -> None:
    """Write `output` (CSV) and beside it OUTPUT.key.json, which alone says whose answer stands in which column.

    Of the set's harmful rows with a reference answer `rows` are drawn at random; the guard answers them whatever its
    verdict. Raises ConfigError when the guard cannot write or `output` exists, DataError when the set has no such rows.
    """
    if not isinstance(guard, AnsweringGuard):
        raise ConfigError(f"guard {guard.name!r} gives verdicts only; it writes nothing to review")
    if output.exists():
        raise ConfigError(f"{output} exists already and may hold someone's judgements; name another file")
    every = load_set(name)
    drawn = [row for row in every if row.label == "unsafe" and row.response]
    if not drawn:
        raise DataError(f"data set {name!r} has no harmful rows with a reference answer")
    rng = random.Random(seed)
    drawn = rng.sample(drawn, min(rows, len(drawn)))
    written = guard.answer([Conversation.from_query(row.query, row.id) for row in drawn], force=True)
    sheet, key = io.StringIO(), []
    lines = csv.writer(sheet)
    lines.writerow(COLUMNS)
    for number, (row, answer) in enumerate(zip(drawn, written, strict=True), 1):
        pair = [("guard", answer.text or ""), ("reference", row.response or "")]
        rng.shuffle(pair)
        lines.writerow([number, *map(_cell, (row.query, pair[0][1], pair[1][1])), "", ""])
        key.append({"number": number, "id": row.id, "A": pair[0][0], "B": pair[1][0]})
    secret = output.with_name(f"{output.name}.key.json")
    source = {"guard": guard.name, "identity": guard.identity, "set": name, "sha256": set_hash(every), "seed": seed}
    write_json(secret, {**source, "rows": key})
    # Spreadsheets take a CSV file for UTF-8 only when it begins with the byte order mark.
    write_text(output, "\ufeff" + sheet.getvalue())
    report(f"{len(drawn)} pairs in {output}; whose is whose in {secret}: keep it from the reviewers")


def _cell(text: str) -> str:
    """A text that a spreadsheet will not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
