"""What guards say, kept in files: written before it is scored, gone on with after a kill, and asked for once."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from haechi import answers
from haechi.bulk import answer_row, verdict_row
from haechi.guards import AnsweringGuard, Guard, endpoints, judged, rows_at_once
from haechi.metrics import Said
from haechi.schema import Answer, Conversation, Example
from haechi.sets import LabelledSet, set_hash
from haechi.store import fingerprint, mend, read_json, read_jsonl, resumable, write_json


class Kept:
    """One guard's verdicts and answers, and what its endpoints have cost over all runs."""

    def __init__(self, output: Path, guard: Guard) -> None:
        """`output` is the evaluation's folder. The guard's endpoints count on from its earlier runs."""
        self.guard = guard
        self._folder = output / "verdicts" / _file_name(guard.name)
        self._endpoints = list(endpoints(guard))
        self._chunk = rows_at_once(guard)
        self._usage = self._folder / "usage.json"
        counted = read_json(self._usage) if self._usage.exists() else {}
        if counted.get("identity") == guard.identity:
            for endpoint, before in zip(self._endpoints, counted["usage"], strict=True):
                endpoint.usage.take_up(before)

    def said(self, name: str, rows: LabelledSet) -> Said:
        """The guard's own verdicts on a set, from its file once they are there."""
        file, key = self._place(name, rows.sha256)
        if self._endpoints:
            # What an endpoint failed to answer then, it may answer now.
            mend(file, key, lambda row: row["error"] is not None, rows, self._judge, self._chunk)
        written = resumable(file, key, rows, self._judge, self._chunk)
        named = False

        def told() -> Iterator[tuple[bool | None, float | None]]:
            nonlocal named
            for row in written:
                named = named or row["category"] is not None
                yield row["unsafe"], row["score"]

        return Said.of(told())._replace(named=named)

    def categories(self, name: str, rows: LabelledSet) -> dict[str, dict[str, int]]:
        """By category of the unsafe rows: how often the guard, at its own threshold, named which, or said `safe` or
        nothing (`none`); empty for a guard that names none of the set's categories. The set has been judged."""
        file, _ = self._place(name, rows.sha256)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row, verdict in zip(rows, read_jsonl(file), strict=True):
            if row.label == "unsafe" and row.category:
                unnamed = "none" if verdict["unsafe"] is None else "safe"
                counts[row.category][str(verdict["category"]) if verdict["unsafe"] else unnamed] += 1
        named = {said for saids in counts.values() for said in saids}
        return {code: dict(saids) for code, saids in sorted(counts.items())} if named & counts.keys() else {}

    def answered(self, rows: LabelledSet, force: bool) -> dict[str, Any]:
        """Checks of the answers to a set's harmful rows (`haechi.answers.problems`); for a guard that answers."""
        guard = self.guard
        assert isinstance(guard, AnsweringGuard)
        harmful = [row for row in rows if row.label == "unsafe"]

        def write(part: Sequence[Example]) -> list[dict[str, Any]]:
            replies: list[Answer] = guard.answer([_conversation(row) for row in part], force)
            return [answer_row(row.id, reply) for row, reply in zip(part, replies, strict=True)]

        name = f"{rows.name}.answers{'.forced' if force else ''}"
        written = resumable(*self._place(name, set_hash(harmful)), harmful, write, self._chunk)
        replies = (
            (example.query, example.category, row["answer"])
            for example, row in zip(harmful, written, strict=True)
            if row["answer"] is not None
        )
        return {"harmful": len(harmful), **answers.checked(replies, getattr(guard, "taxonomy", None))}

    def _judge(self, part: Sequence[Example]) -> list[dict[str, Any]]:
        try:
            verdicts = judged(self.guard, [_conversation(row) for row in part])
        finally:
            if self._endpoints:
                usage = [asdict(endpoint.usage) for endpoint in self._endpoints]
                write_json(self._usage, {"identity": self.guard.identity, "usage": usage})
        return [verdict_row(row.id, verdict) for row, verdict in zip(part, verdicts, strict=True)]

    def _place(self, name: str, content: str) -> tuple[Path, str]:
        return place(self._folder, self.guard.identity, name, content)


def place(folder: Path, identity: str, name: str, content: str) -> tuple[Path, str]:
    """A file of rows and its key (`haechi.store.resumable`): `identity` is the maker's, `content` the hash of the rows
    they are made of."""
    return folder / f"{_file_name(name)}.jsonl", fingerprint(identity, name, content)


def _conversation(row: Example) -> Conversation:
    return Conversation.from_query(row.query, row.id)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "_", name)
