"""Writing answers: greedy decoding in step from one prefill, with what keeps a small model presentable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from haechi import answers
from haechi.casing import restore
from haechi.engines import Engine
from haechi.template import Bools, Floats, Ints, Template, visible

REPETITION_PENALTY = 1.2
"""Divides the logits of tokens already written (Keskar et al. 2019, arXiv 1909.05858, section 4.1); its size by
`benchmarks/decoding.py`."""


@dataclass
class Prefill:
    """A batch after its one pass over the queries."""

    labels: Floats
    """[rows, 2] logits over (safe, unsafe)."""
    categories: Floats
    """[rows, categories] logits."""
    segments: Ints
    """[rows, columns] of `haechi.template.pack`."""
    lengths: Ints
    """[rows] query tokens: where a branch's positions begin."""
    cache: Any
    """The engine's keys and values."""


@dataclass
class Draft:
    """An answer while it is written."""

    language: str
    """The query's, which the answer must begin in."""
    ids: list[int] = field(default_factory=list)
    begun: bool = False
    """Whether a letter has been written."""
    finished: bool = False


class Writer:
    """Answers in the words of one model."""

    def __init__(self, engine: Engine, template: Template, casing: dict[str, str] | None) -> None:
        """`casing` are the usual forms of words for a model that writes in lower case."""
        self._engine, self._template, self._casing = engine, template, casing
        self._masks: dict[str, Bools] = {}

    def write(self, prefill: Prefill, drafts: Sequence[Draft], force: Sequence[bool]) -> Iterator[None]:
        """Write the drafts in step, each the likeliest token that `weigh` leaves; yields after each token."""
        heads = [self._template.answer_prompt(force=one) for one in force]
        rows, width = len(drafts), max(map(len, heads))
        segments, cache = prefill.segments, prefill.cache
        # The verdict's columns stay in the cache; as a sibling branch the answer does not see them.
        branch = int(segments.max()) + 1
        ids, own = np.full((rows, width), self._template.eos, np.int64), np.zeros((rows, width), np.int64)
        for row, head in enumerate(heads):
            # Shorter heads are padded in front, so that all end in the same column.
            ids[row, width - len(head) :], own[row, width - len(head) :] = head, branch
        positions = prefill.lengths[:, None] + np.maximum(0, np.cumsum(own > 0, axis=1) - 1)
        banned = self._template.forbidden()
        for _ in range(self._template.settings.answer):
            new = ids.shape[1]
            segments = np.concatenate([segments, own], axis=1)
            mask = visible(segments, self._template.settings.attention, new=new)
            step = self._engine.forward(ids, positions, mask, np.array([new - 1]), cache=cache)
            cache = step.cache
            logits = step.logits[:, 0]
            logits[:, banned] = -np.inf
            for row, draft in enumerate(drafts):
                if draft.finished:
                    continue
                self.weigh(logits[row], draft)
                token = int(logits[row].argmax())
                if token == self._template.eos:
                    draft.finished = True
                else:
                    draft.ids.append(token)
                    draft.begun = draft.begun or self._scripts[token] is not None
            yield
            if all(draft.finished for draft in drafts):
                return
            last = [draft.ids[-1] if draft.ids else self._template.eos for draft in drafts]
            ids, own = np.array(last, np.int64)[:, None], np.full((rows, 1), branch, np.int64)
            positions = positions[:, -1:] + 1

    def weigh(self, logits: Floats, draft: Draft) -> None:
        """Change one row's logits [vocabulary] in place: what was written comes again less easily, no four tokens in a
        row twice, and the first letters are of the query's script."""
        written = list(set(draft.ids))
        again = logits[written]
        logits[written] = np.where(again > 0, again / REPETITION_PENALTY, again * REPETITION_PENALTY)
        logits[_would_repeat(draft.ids)] = -np.inf
        if not draft.begun:
            logits[: len(self._scripts)][self._foreign(draft.language)] = -np.inf

    def parts(self, draft: Draft) -> list[str]:
        """The sentences written so far, with capitals and spaces as they should be."""
        text = self._template.decode(draft.ids)
        return list(answers.sentences(text if self._casing is None else restore(text, self._casing)))

    def sentences(self, draft: Draft) -> list[str]:
        """Those of a draft that is done: of one cut at the length limit the whole ones, if there are any."""
        parts = self.parts(draft)
        if not draft.finished and len(parts) > 1 and not answers.ends(parts[-1]):
            parts.pop()
        return parts

    @cached_property
    def _scripts(self) -> list[str | None]:
        """Per id the language its letters are written in, None for an id without letters."""
        return [
            ("en" if text.isascii() else answers.language_of(text)) if any(map(str.isalpha, text)) else None
            for text in self._template.decode_each()
        ]

    def _foreign(self, language: str) -> Bools:
        if language not in self._masks:
            self._masks[language] = np.array([script not in (None, language) for script in self._scripts])
        return self._masks[language]


def _would_repeat(ids: Sequence[int], size: int = 4) -> list[int]:
    """Tokens that would come three times in a row, or make the last `size` ids a run that was already written."""
    tail = tuple(ids[len(ids) - size + 1 :])
    again = [
        ids[start + size - 1] for start in range(len(ids) - size + 1) if tuple(ids[start : start + size - 1]) == tail
    ]
    return again + ([ids[-1]] if len(ids) > 1 and ids[-1] == ids[-2] else [])
