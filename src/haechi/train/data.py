"""Batches as a pure function of (seed, stage, step): a resumed run sees exactly the rows the killed one would have."""

from __future__ import annotations

import lzma
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from haechi import answers, perturb
from haechi.errors import DataError
from haechi.schema import Example
from haechi.sets import data_folder
from haechi.store import read_jsonl
from haechi.template import IGNORE, Ints, Row, Template, language_row, separate
from haechi.train.config import Stage

_PASS = 500
"""What a forward pass costs beside its tokens, in tokens: mostly the gradient of the embedding table."""


class Weighted(NamedTuple):
    """A curated row and how often an epoch shows it; 0.5: in every other epoch, by chance."""

    example: Example
    weight: float


class Source(Protocol):
    """What a stage trains or validates on."""

    def __len__(self) -> int:
        """Number of optimiser steps."""

    def passes(self, step: int) -> list[list[Row]]:
        """The rows of one step, by forward pass."""

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
            _token_rows(language, round(stage.tokens * share / total), stage, template, cache)
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

    def passes(self, step: int) -> list[list[Row]]:
        """See `Source.passes`."""
        # One prefix length per step keeps its rows aligned, so nothing is lost to padding.
        split = random.Random(f"{self._seed}:{self._stage.name}:{step}").choice(self._stage.prefixes)
        before = self._template.wrap([])
        rows = [language_row(ids.tolist(), split, before) for ids in self._ids[self._batches[step]]]
        size = max(1, self._stage.forward_tokens // self._stage.length)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        return np.bincount(self._ids.ravel(), minlength=vocabulary)


def _token_rows(language: str, count: int, stage: Stage, template: Template, cache: Path) -> np.ndarray:
    """`count` tokens of a language as an array [rows, length]; documents are joined by the end token."""
    skip, length = stage.skip, stage.length
    file = cache / f"{language}-{skip}-{count}-{length}-{template.tokenizer_hash}.npy"
    if not file.exists():
        ids: list[int] = []
        for document in documents(language):
            ids += [*template.encode(document), template.eos]
            if len(ids) >= skip + count:
                break
        ids = ids[skip:]
        if len(ids) < length:
            raise DataError(f"the running text of language {language!r} ends before {skip + length} tokens")
        rows = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, rows)
        temporary.replace(file)
    loaded: np.ndarray = np.load(file)
    return loaded


class RowSource:
    """Curated rows with their branches. A step draws rows at random up to its token budget; only then are they sorted
    by shape and cut into forward passes, so that padding is little and no step is one label or one length."""

    def __init__(
        self,
        rows: Sequence[Weighted],
        stage: Stage,
        template: Template,
        seed: int,
        *,
        read: Callable[[str], str] = str,
        shuffle: bool = True,
        steps: int | None = None,
    ) -> None:
        """`read`: what the model is shown of a query; `shuffle`: draw anew in each epoch, rather than show the rows
        once as they are; `steps`: deal the rows evenly over so many steps, rather than fill each up to its budget."""
        order: list[Row] = []
        for epoch in range(stage.epochs if shuffle else 1):
            rng = random.Random(f"{seed}:{stage.name}:{epoch}")
            shown = [
                shown
                for row in rows
                for shown in _shown(row, stage, template, rng, read, vary=shuffle)
                if shown.branches
            ]
            if shuffle:
                rng.shuffle(shown)
            order += shown
        if steps is None:
            parts: Iterable[list[Row]] = _fill(order, stage.batch_tokens)
        else:
            parts = (order[len(order) * step // steps : len(order) * (step + 1) // steps] for step in range(steps))
        self._steps = [_cut(part, stage.forward_tokens) for part in parts]

    def __len__(self) -> int:
        return len(self._steps)

    def passes(self, step: int) -> list[list[Row]]:
        """See `Source.passes`."""
        return self._steps[step]

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        labels = [
            label
            for step in self._steps
            for rows in step
            for row in rows
            for branch in row.branches
            for label in branch.labels
        ]
        return np.bincount([label for label in labels if label != IGNORE], minlength=vocabulary)


class Both:
    """Running text and rows in every step: the rows' task is rehearsed while the base learns to write."""

    def __init__(self, text: Source, rows: Source) -> None:
        self._text, self._rows = text, rows

    def __len__(self) -> int:
        return len(self._text)

    def passes(self, step: int) -> list[list[Row]]:
        """See `Source.passes`."""
        return self._text.passes(step) + self._rows.passes(step)

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        return self._text.targets(vocabulary) + self._rows.targets(vocabulary)


class Switched:
    """A source with some words of its queries in the other language."""

    def __init__(self, source: Source, counterparts: Mapping[int, Sequence[int]], stage: Stage, seed: int) -> None:
        self._source, self._counterparts, self._stage, self._seed = source, counterparts, stage, seed

    def __len__(self) -> int:
        return len(self._source)

    def passes(self, step: int) -> list[list[Row]]:
        """See `Source.passes`."""
        rng = random.Random(f"{self._seed}:{self._stage.name}:switch:{step}")
        return [[self._switch(row, rng) for row in rows] for rows in self._source.passes(step)]

    def _switch(self, row: Row, rng: random.Random) -> Row:
        rate = rng.random() * self._stage.code_switch
        ids = [
            rng.choice(self._counterparts[id]) if id in self._counterparts and rng.random() < rate else id
            for id in row.query
        ]
        return row._replace(query=ids)

    def targets(self, vocabulary: int) -> Ints:
        """See `Source.targets`."""
        return self._source.targets(vocabulary)


def _fill(rows: Iterable[Row], budget: int) -> Iterator[list[Row]]:
    """Rows in order, as many at a time as their tokens fit the budget."""
    step: list[Row] = []
    tokens = 0
    for row in rows:
        if step and tokens + row.tokens > budget:
            yield step
            step, tokens = [], 0
        step.append(row)
        tokens += row.tokens
    if step:
        yield step


def _cut(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """A step's rows in the forward passes that cost least in all, each padded to at most `budget` tokens."""
    rows = sorted(rows, key=lambda row: row.tokens)
    costs, starts = [0.0], [0]
    for end in range(1, len(rows) + 1):
        start, cost = 0, math.inf
        for first in range(end - 1, -1, -1):
            padded = (end - first) * rows[end - 1].tokens
            if padded > budget and first < end - 1:
                break
            if costs[first] + padded + _PASS < cost:
                cost, start = costs[first] + padded + _PASS, first
        costs.append(cost)
        starts.append(start)
    passes: list[list[Row]] = []
    end = len(rows)
    while end:
        passes.append(list(rows[starts[end] : end]))
        end = starts[end]
    return passes


def _shown(
    row: Weighted, stage: Stage, template: Template, rng: random.Random, read: Callable[[str], str], *, vary: bool
) -> list[Row]:
    """A row as one epoch shows it: once with its answer, the other times with its verdict only, which is cheap."""

    example = row.example
    if stage.defer is not None and example.label == "safe":
        reply = rng.choice(answers.deferrals(answers.language_of(example.query)))
        example = example.model_copy(update={"response": reply if rng.random() < stage.defer else None})

    changes = ((perturb.vary, stage.vary), (perturb.wrap, stage.wrapped), (perturb.careless, stage.careless))

    def typed() -> Example:
        query = example.query
        for change, share in changes if vary else ():
            if rng.random() < share:
                query = change(query, rng)
        return example.model_copy(update={"query": read(query)})

    times = int(row.weight) + (rng.random() < row.weight % 1)
    if not times:
        return []
    full = render(typed(), stage, template, force=rng.random() < stage.force_share)
    if "classify" in stage.tasks:
        light = stage.model_copy(update={"tasks": ("classify",)})
        shown = [full, *(render(typed(), light, template, force=False) for _ in range(times - 1))]
    else:
        shown = [full] * times
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
