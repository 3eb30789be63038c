"""`haechi curate CONFIG`: from named sets to one folder of training rows, clean of every row we measure on.

Order of the rules: label and length filters, exact duplicates, near-duplicates of the `eval/` sets (MinHash over
character 4-grams), caps, split by contrast group. The manifest counts what each rule took from each set.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from haechi.config import Config
from haechi.errors import DataError, MissingExtra, did_you_mean
from haechi.schema import Example, Label
from haechi.sets import corpus_folder, load_set, measured_only, registry
from haechi.store import digest, write_json, write_jsonl

_SHINGLE = 4
_PERMUTATIONS = 64


class Source(Config):
    """One set and how much of it is taken."""

    set: str
    """Name in the registry or the corpus, or a JSONL path."""
    cap: int | None = Field(default=None, gt=0)
    """Most rows, drawn at random with the run's seed."""
    weight: float = Field(default=1, gt=0)
    """How often an epoch shows each row; 0.5: in every other epoch, by chance."""
    labels: tuple[Label, ...] = ("safe", "unsafe")
    """Rows of other labels, or of none, are left out."""
    answers: bool = False
    """Keep reference answers as something to learn."""
    longest_query: int = Field(default=600, gt=0)
    """Longer queries (in characters) are left out."""
    longest_answer: int = Field(default=300, gt=0)
    """Longer answers are cut after the last sentence that fits; an answer without one is left out."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of contrast groups held out for validation."""
    held_out: float = Field(default=0.0, ge=0, le=1)
    """So many rows beyond the cap, as a share of it, are held out too: rows this mix would not have trained on."""

    @model_validator(mode="after")
    def _holds_out_what_is_there(self) -> Self:
        if self.held_out and self.cap is None:
            raise ValueError("held_out is a share of the cap, and there is none")
        return self


class CurateConfig(Config):
    """A training mix."""

    output: Path
    """Folder to write."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """In order; of duplicates the first stays."""
    without: tuple[str, ...] = ()
    """Sets not to train on, for ablations; their validation rows stay, so that all variants are judged on the same."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training rows to keep, whole contrast groups at random; a smaller share is part of a larger."""
    require_answer: bool = False
    """Leave out rows without an answer (instruction tuning)."""
    similarity: float = Field(default=0.6, gt=0, le=1)
    """Estimated Jaccard similarity of character 4-grams at which a row counts as a near-duplicate of an `eval` row."""
    seed: int = 0
    """Decides caps and the split."""

    @model_validator(mode="after")
    def _leaves_out_what_is_there(self) -> Self:
        names = [source.set for source in self.sources]
        for name in self.without:
            if name not in names:
                raise ValueError(f"without: {name!r} is none of the sources{did_you_mean(name, names)}")
        return self


def run(config: CurateConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl and manifest.json; returns the manifest."""
    for source in config.sources:
        _refuse_eval(source.set)
    evaluated, missing = _evaluation_rows(report)
    index = NearDuplicates(evaluated, config.similarity)
    report(f"{len(evaluated)} evaluation rows indexed")
    seen: set[str] = set()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    counts: list[dict[str, Any]] = []
    for source in config.sources:
        kept, beyond, count = _take(source, config, seen, index)
        counts.append({"set": source.set, **count})
        for number, row in enumerate([*kept, *beyond]):
            group = row.group or row.id
            held = number >= len(kept) or _fraction(f"{config.seed}:{group}") < source.validation
            if not held and (source.set in config.without or _fraction(f"{config.seed}:share:{group}") >= config.share):
                continue
            parts["valid" if held else "train"].append(
                {"weight": 1 if held else source.weight, "example": row.model_dump(exclude_none=True)}
            )
        report(
            f"{source.set}: "
            + ", ".join(f"{key} {value}" for key, value in count.items() if not isinstance(value, dict))
        )
    for name, rows in parts.items():
        write_jsonl(config.output / f"{name}.jsonl", rows)
    manifest = {
        "config": config.model_dump(mode="json"),
        "sources": counts,
        "evaluation_sets": dict(Counter(name for name, _ in evaluated)),
        "evaluation_sets_missing": missing,
        "parts": {
            name: {"rows": len(rows), "labels": _labels(rows), "sha256": digest(config.output / f"{name}.jsonl")}
            for name, rows in parts.items()
        },
    }
    write_json(config.output / "manifest.json", manifest)
    return manifest


def _refuse_eval(name: str) -> None:
    if measured_only(name):
        raise DataError(f"data set {name!r} is for measuring only and may not be trained on")


def _evaluation_rows(report: Callable[[str], None]) -> tuple[list[tuple[str, str]], list[str]]:
    """(set, query) of every evaluation row at hand, and the names of the sets that are not."""
    rows: list[tuple[str, str]] = []
    missing = []
    own = sorted(file.stem for file in corpus_folder().glob("policy_test*.jsonl"))
    for name in [*own, *(name for name, entry in registry().items() if entry.use == "eval")]:
        try:
            rows += [(name, example.query) for example in load_set(name)]
        except (DataError, MissingExtra) as error:
            missing.append(name)
            report(f"not decontaminated against {name}: {error}")
    return rows, missing


def _take(
    source: Source, config: CurateConfig, seen: set[str], index: NearDuplicates
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """The rows taken, those held out from beyond the cap, and the counts by reason."""
    rows = load_set(source.set)
    count: Counter[str] = Counter(read=len(rows))
    contaminated: Counter[str] = Counter()
    kept: list[Example] = []
    beyond: list[Example] = []
    groups: set[str] = set()
    most_beyond = round((source.cap or 0) * source.held_out)
    random.Random(f"{config.seed}:{source.set}").shuffle(rows)
    for row in rows:
        reason, example = _filtered(row, source, config)
        key = normalised(row.query)
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is None and (source_set := index.find(row.query)):
            reason = "near_eval"
            contaminated[source_set] += 1
        over_cap = source.cap is not None and len(kept) >= source.cap
        if reason is None and over_cap and (len(beyond) >= most_beyond or row.group in groups):
            reason = "over_cap"
        if reason:
            count[reason] += 1
        else:
            seen.add(key)
            (beyond if over_cap else kept).append(example)
            if row.group and not over_cap:
                groups.add(row.group)
    found = {"kept": len(kept), "held_out": len(beyond), "near_eval_by_set": dict(contaminated)}
    return kept, beyond, {**count, **found}


def _filtered(row: Example, source: Source, config: CurateConfig) -> tuple[str | None, Example]:
    """Why a row is left out (None: it stays), and the row as it would stay."""
    if row.label is None or row.label not in source.labels:
        return "other_label", row
    if not row.query.strip() or len(row.query) > source.longest_query:
        return "query_length", row
    answer = _cut(row.response, source.longest_answer) if source.answers and row.response else None
    if config.require_answer and not answer:
        return "no_answer", row
    return None, row.model_copy(update={"response": answer})


def _cut(answer: str, longest: int) -> str | None:
    """The answer's leading whole sentences that fit, None when not even one does."""
    text = " ".join(answer.split())
    if len(text) <= longest:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text[: longest + 1])]
    return text[: ends[-1]] if ends else None


def normalised(query: str) -> str:
    """A query without case, spacing and punctuation: equal for exact duplicates."""
    return re.sub(r"[\W_]+", "", query.lower())


class NearDuplicates:
    """Finds the evaluation row a query nearly repeats. `datasketch` does the hashing."""

    def __init__(self, rows: Sequence[tuple[str, str]], similarity: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise MissingExtra("train", "decontamination") from None
        self._hash = MinHash
        self._lsh = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
        self._names = [name for name, _ in rows]
        self._exact = {normalised(query): name for name, query in rows}
        hashes = self._hash.bulk((_shingles(query) for _, query in rows), num_perm=_PERMUTATIONS)
        with self._lsh.insertion_session() as session:
            for number, value in enumerate(hashes):
                session.insert(number, value, check_duplication=False)

    def find(self, query: str) -> str | None:
        """The evaluation set that holds a near-duplicate, if any does."""
        if name := self._exact.get(normalised(query)):
            return name
        value = self._hash(num_perm=_PERMUTATIONS)
        value.update_batch(_shingles(query))
        hits = self._lsh.query(value)
        return self._names[min(hits)] if hits else None


def _shingles(query: str) -> list[bytes]:
    text = normalised(query)
    return [text[start : start + _SHINGLE].encode() for start in range(max(1, len(text) - _SHINGLE + 1))]


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _labels(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(f"{row['example']['lang']}/{row['example'].get('label')}" for row in rows))
