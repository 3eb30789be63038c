"""Bring hand-written TSV rows into the corpus: `python corpus/build.py train FILE.tsv ...`, then the datasheet.

A row is `label TAB category TAB kind TAB query TAB response` (docs/corpus.md says what each means). Every row gets a
stable id (a hash of its language and query), and rows of one contrast a common group, so that its two sides are never
split between training and validation. Files are named `LANG_topic.tsv` or `policy_test.LANG.tsv`. Existing rows keep
their place; a row whose query is already there is refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from haechi.errors import DataError, HaechiError
from haechi.schema import Example, Label
from haechi.store import read_jsonl, write_jsonl, write_text
from haechi.taxonomy import load_taxonomy

FOLDER = Path(__file__).parent
UNSAFE_KINDS = ("direct", "implicit", "situated", "evasive", "statement")
SAFE_KINDS = (
    "homonym",
    "figurative",
    "safe_target",
    "safe_context",
    "definition",
    "history",
    "prevention",
    "public_info",
    "fictional_person",
    "identity_positive",
    "lookalike",
    "everyday",
)
RARE = 12
"""A shingle in at most this many rows of a file is telling enough to link two neighbours."""


def read_tsv(path: Path) -> list[Example]:
    """The rows of one file, checked against the format. Raises DataError naming the file and line."""
    language = next((part for part in re.split(r"[._]", path.stem) if part in ("en", "ko")), None)
    if language is None:
        raise DataError(f"{path}: the file name must carry a language, as in en_topic.tsv")
    codes = {*load_taxonomy().codes, "general"}
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 5 or not all(field.strip() for field in fields):
            raise DataError(f"{path} line {number}: expected five non-empty fields, found {len(fields)}")
        label, category, kind, query, response = (field.strip() for field in fields)
        kinds = {"unsafe": UNSAFE_KINDS, "safe": SAFE_KINDS}.get(label, ())
        if kind not in kinds or category not in codes or (label, category) == ("unsafe", "general"):
            raise DataError(
                f"{path} line {number}: {label}/{category}/{kind} is not a label, category and kind we know"
            )
        digest = hashlib.sha256(f"{language}\t{query}".encode()).hexdigest()[:12]
        rows.append(
            Example(
                id=f"{language}-{digest}",
                lang=language,
                query=query,
                label=cast(Label, label),
                category=category,
                kind=kind,
                response=response,
                source=path.stem,
                license="CC-BY-4.0",
            )
        )
    return grouped(rows)


def grouped(rows: Sequence[Example]) -> list[Example]:
    """Rows with a group each: neighbours that share a rare run of characters are one contrast."""
    shingles = [_shingles(row) for row in rows]
    counts = Counter(shingle for group in shingles for shingle in group)
    result: list[Example] = []
    for index, row in enumerate(rows):
        linked = index > 0 and any(counts[shingle] <= RARE for shingle in shingles[index] & shingles[index - 1])
        group = result[-1].group if linked else row.id
        result.append(row.model_copy(update={"group": group}))
    return result


def _shingles(row: Example) -> set[str]:
    size = 3 if row.lang == "ko" else 5
    text = re.sub(r"[^\w]+", "" if row.lang == "ko" else " ", row.query.lower())
    return {text[start : start + size] for start in range(len(text) - size + 1)}


def merge(old: Iterable[Example], new: Iterable[Example]) -> Iterator[Example]:
    """Old rows, then new ones. Raises DataError for a query that is there already."""
    seen: dict[str, str | None] = {}
    for row in (*old, *new):
        if row.id in seen:
            raise DataError(f"the query {row.query[:60]!r} of {row.source} is already in {seen[row.id]}")
        seen[row.id] = row.source
        yield row


def datasheet(parts: dict[str, list[Example]]) -> str:
    """Counts by part, language, label, category and kind as Markdown tables."""
    lines = ["<!-- made by corpus/build.py; the text around the counts is in docs/corpus.md -->", "# Corpus counts", ""]
    for name, rows in parts.items():
        groups = Counter(row.group for row in rows)
        paired = sum(count for count in groups.values() if count > 1)
        lines += [f"## {name}: {len(rows)} rows, {len(groups)} groups, {paired} rows in a contrast of two or more", ""]
        lines += [*_table(rows, "category"), "", *_table(rows, "kind"), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Example], field: str) -> list[str]:
    languages = sorted({row.lang for row in rows})
    columns = [(lang, label) for lang in languages for label in ("safe", "unsafe")]
    counts = Counter((str(getattr(row, field)), row.lang, str(row.label)) for row in rows)
    names = sorted({name for name, _, _ in counts})
    head = [
        f"| {field} | " + " | ".join(" ".join(column) for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    body = [f"| {name} | " + " | ".join(str(counts[(name, *column)]) for column in columns) + " |" for name in names]
    total = " | ".join(str(sum(counts[(name, *column)] for name in names)) for column in columns)
    return [*head, *body, f"| total | {total} |"]


def main(arguments: Sequence[str]) -> None:
    """`train FILE...` adds rows to `train.en.jsonl` and `train.ko.jsonl`; `test FILE...` to `policy_test.*.jsonl`."""
    stem = {"train": "train", "test": "policy_test"}.get(arguments[0] if arguments else "")
    if stem is None:
        raise DataError("usage: python corpus/build.py (train|test) FILE.tsv ...")
    new = [row for name in arguments[1:] for row in read_tsv(Path(name))]
    for language in ("en", "ko"):
        path = FOLDER / f"{stem}.{language}.jsonl"
        old = [Example(**row) for row in read_jsonl(path)] if path.exists() else []
        rows = list(merge(old, (row for row in new if row.lang == language)))
        write_jsonl(path, (row.model_dump(exclude_none=True) for row in rows))
    files = sorted(FOLDER.glob("*.jsonl"))
    parts = {file.stem: [Example(**row) for row in read_jsonl(file)] for file in files}
    write_text(FOLDER / "COUNTS.md", datasheet(parts))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HaechiError as error:
        sys.exit(f"error: {error}")
