"""Batches as a pure function of (seed, stage, step): a resumed run sees exactly the rows the killed one would have."""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from haechi import perturb
from haechi.errors import DataError
from haechi.schema import Example
from haechi.sets import data_folder
from haechi.store import read_jsonl
from haechi.template import IGNORE, VERDICT, Ints, Row, Template, language_row, separate
from haechi.train.config import Stage


class Weighted(NamedTuple):
    """A curated row and how often an epoch shows it."""

    example: Example
    weight: int


class Source(Protocol):
    """What a stage trains or validates on."""

    def __len__(self) -> int:
        """Number of batches."""

    def rows(self, step: int) -> list[Row]:
        """The rows of one batch."""

    def targets(self, vocabulary: int) -> Ints:
        """How often each of `vocabulary` ids is to be predicted."""


def documents(language: str) -> Iterator[str]:
    """Documents of the running text `text/LANGUAGE`, in file order."""
    folder = data_folder() / "text" / language
    shards = sorted(folder.glob("*.txt.xz"))
    if not shards:
        raise DataError(f"no running text for language {language!r}: expected {folder}/*.txt.xz (set HAECHI_DATA)")
    for shard in shards:
        with lzma.open(shard, "rt", encoding="utf-8") as file:
            document: list[str] = []
            for line in file:
                if line.strip():
                    document.append(line)
                elif document:
                    yield "".join(document)
                    document = []
            if document:
                yield "".join(document)


def characters(language: str, count: int) -> Iterator[str]:
    """Documents up to about `count` characters."""
    for document in documents(language):
        yield document
        count -= len(document)
        if count <= 0:
            return


class TextSource:
    """Running text cut into rows of one length; languages are mixed by their shares."""

    def __init__(self, stage: Stage, template: Template, seed: int, cache: Path) -> None:
        assert stage.text is not None and stage.tokens is not None
        self._stage, self._template, self._seed = stage, template, seed
        total = sum(stage.text.values())
        parts = [
            _token_rows(language, round(stage.tokens * share / total), stage.length, template, cache)
            for language, share in stage.text.items()
        ]
        self._ids = np.concatenate(parts)
        per_batch = max(1, stage.batch_tokens // stage.length)
        order = np.random.default_rng([seed, 1]).permutation(len(self._ids))
        order = np.concatenate(
            [np.random.default_rng([seed, epoch]).permutation(order) for epoch in range(stage.epochs)]
        )
        self._batches = [order[start : start + per_batch] for start in range(0, len(order) - per_batch + 1, per_batch)]

    def __len__(self) -> int:
        return len(self._batches)

    def rows(self, step: int) -> list[Row]:
        """See `Source.rows`."""
        # One prefix length per batch keeps its rows aligned, so nothing is lost to padding.
        split = random.Random(f"{self._seed}:{self._stage.name}:{step}").choice(self._stage.prefixes)
        before = self._template.wrap([])
        return [language_row(ids.tolist(), split, before) for ids in self._ids[self._batches[step]]]

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        return np.bincount(self._ids.ravel(), minlength=vocabulary)


def _token_rows(language: str, count: int, length: int, template: Template, cache: Path) -> np.ndarray:
    """`count` tokens of a language as an array [rows, length]; documents are joined by the end token."""
    file = cache / f"{language}-{count}-{length}.npy"
    if not file.exists():
        ids: list[int] = []
        for document in documents(language):
            ids += [*template.encode(document), template.eos]
            if len(ids) >= count:
                break
        rows = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, rows)
        temporary.replace(file)
    loaded: np.ndarray = np.load(file)
    return loaded


class RowSource:
    """Curated rows with their branches, in batches of similar length under a token budget."""

    def __init__(
        self, rows: Sequence[Weighted], stage: Stage, template: Template, seed: int, *, shuffle: bool = True
    ) -> None:
        self._rendered: list[Row] = []
        self._batches: list[list[int]] = []
        for epoch in range(stage.epochs if shuffle else 1):
            rng = random.Random(f"{seed}:{stage.name}:{epoch}")
            shown = [
                shown for row in rows for shown in _shown(row, stage, template, rng, vary=shuffle) if shown.branches
            ]
            order = range(len(self._rendered), len(self._rendered) + len(shown))
            self._rendered += shown
            self._batches += self._plan(order, stage.batch_tokens, rng if shuffle else None)

    def _plan(self, rows: Iterable[int], budget: int, rng: random.Random | None) -> list[list[int]]:
        """Batches of `rows` (places in the rendered list) whose padded size keeps to the budget.

        Rows of like shape go together, but length tells much about the label: sorted by shape alone, most batches hold
        one label and the verdict's bias swings from step to step. So rows are sorted within their label, and a batch
        takes the same quantiles of each.
        """
        order = list(rows)
        if rng:
            rng.shuffle(order)
        rendered = self._rendered
        shapes = {
            index: (len(rendered[index].query), rendered[index].tokens - len(rendered[index].query)) for index in order
        }
        place: dict[int, float] = {}
        for label in {_verdict(rendered[index]) for index in order}:
            same = [index for index in order if _verdict(rendered[index]) == label]
            # A batch is as wide as its longest query plus its longest branches: sort by both.
            same.sort(key=lambda index: (shapes[index][1] // 16, shapes[index][0]))
            place |= {index: rank / len(same) for rank, index in enumerate(same)}
        batches: list[list[int]] = [[]]
        query = branches = 0
        for index in sorted(order, key=place.__getitem__):
            query, branches = max(query, shapes[index][0]), max(branches, shapes[index][1])
            if batches[-1] and (len(batches[-1]) + 1) * (query + branches) > budget:
                batches.append([])
                query, branches = shapes[index]
            batches[-1].append(index)
        if rng:
            rng.shuffle(batches)
        return batches

    def __len__(self) -> int:
        return len(self._batches)

    def rows(self, step: int) -> list[Row]:
        """See `Source.rows`."""
        return [self._rendered[index] for index in self._batches[step]]

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        labels = [label for row in self._rendered for branch in row.branches for label in branch.labels]
        return np.bincount([label for label in labels if label != IGNORE], minlength=vocabulary)


def _verdict(row: Row) -> int:
    """The verdict a row teaches, IGNORE for a row without one."""
    first = row.branches[0]
    return first.labels[0] if first.kinds[0] == VERDICT else IGNORE


def _shown(row: Weighted, stage: Stage, template: Template, rng: random.Random, *, vary: bool) -> list[Row]:
    """A row as one epoch shows it: once with its answer, the other times with its verdict only, which is cheap."""

    def typed() -> Example:
        if not vary or rng.random() >= stage.vary:
            return row.example
        return row.example.model_copy(update={"query": perturb.vary(row.example.query, rng)})

    full = render(typed(), stage, template, force=rng.random() < stage.force_share)
    if row.weight > 1 and "classify" in stage.tasks:
        light = stage.model_copy(update={"tasks": ("classify",)})
        shown = [full, *(render(typed(), light, template, force=False) for _ in range(row.weight - 1))]
    else:
        shown = [full] * row.weight
    return shown if stage.share_prefix else separate(shown)


def render(example: Example, stage: Stage, template: Template, *, force: bool) -> Row:
    """A row with the branches its fields and the stage's tasks allow."""
    branches = []
    if "classify" in stage.tasks and example.label:
        branches.append(template.classify_branch(example.label, example.category))
    if "answer" in stage.tasks and example.response:
        branches.append(template.answer_branch(example.response))
        if force and example.label == "unsafe":
            branches.append(template.answer_branch(example.response, force=True))
    return Row(template.windows(example.query)[0], tuple(branches))


def read_rows(folder: Path, part: str) -> list[Weighted]:
    """The rows of a curated folder. Raises DataError when `haechi curate` has not made it."""
    file = folder / f"{part}.jsonl"
    if not file.is_file():
        raise DataError(f"{file} does not exist: make it with 'haechi curate CONFIG'")
    return [Weighted(Example(**row["example"]), row["weight"]) for row in read_jsonl(file)]
