"""The small language model as a guard: one forward pass for verdict and category, an answer from the same prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from haechi import answers
from haechi.casing import restore
from haechi.config import Config
from haechi.engines import Engine, load_engine
from haechi.errors import ConfigError, ModelError, did_you_mean
from haechi.guards import EMPTY, settings
from haechi.modelfolder import DEFAULT_POINT, Sheet, default_model, read_sheet, require_policy, require_seal
from haechi.normalise import VERSION, Reader
from haechi.schema import Answer, Conversation, Verdict
from haechi.spelling import read_words
from haechi.store import fingerprint
from haechi.taxonomy import Taxonomy
from haechi.template import IGNORE, NOT_SUPERVISED, Bools, Branch, Floats, Ints, Row, Template, pack, visible

_BATCH_TOKENS = 4096
"""Padded tokens of one forward pass: large enough to fill the cores, small enough to stay in cache."""


REPETITION_PENALTY = 1.2
"""Divides the logits of tokens already written (Keskar et al. 2019, arXiv 1909.05858, section 4.1); its size by
`benchmarks/decoding.py`."""


@dataclass
class _Draft:
    """An answer while it is written."""

    language: str
    """The query's, which the answer must begin in."""
    ids: list[int] = field(default_factory=list)
    begun: bool = False
    """Whether a letter has been written."""
    finished: bool = False


@dataclass
class _Prefill:
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


class SLM:
    """A model folder, judging and answering."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sheet: Sheet,
        locale: str | None = None,
        point: str = DEFAULT_POINT,
        read: Callable[[str], str] | None = None,
    ) -> None:
        """`read` is what the model is shown of a query; None: the query as typed."""
        if point not in sheet.points:
            raise ConfigError(
                f"model {sheet.name!r} has no operating point {point!r}{did_you_mean(point, sheet.points)}"
            )
        self.name = sheet.name if point == DEFAULT_POINT else f"{sheet.name}@{point}"
        if read is None:
            self.name += " as typed"
        self._read = read or str
        self.sheet = sheet
        self.point = sheet.points[point]
        self.taxonomy: Taxonomy = sheet.policy()
        self.template = Template(tokenizer, self.taxonomy.codes, sheet.template)
        self._engine, self._locale = engine, locale
        if locale is not None and locale not in self.taxonomy.resources:
            raise ConfigError(f"unknown locale {locale!r}{did_you_mean(locale, self.taxonomy.resources)}")
        self.identity = fingerprint("slm", sheet.model_dump(mode="json"), locale, point, VERSION if read else None)
        self._candidates = np.array([*self.template.labels, *self.template.categories], np.int64)
        self._prompt = self._branch(self.template.verdict_prompt())
        self._masks: dict[str, Bools] = {}

    # Verdicts

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """One verdict per conversation. A query longer than the window is judged in overlapping windows: the most
        harmful one counts."""
        windows = [self._windows(self._read(item.query)) for item in Conversation.each(conversations)]
        flat = [(owner, ids) for owner, several in enumerate(windows) for ids in several]
        judged: list[list[Verdict]] = [[] for _ in conversations]
        for batch in _batches([len(ids) for _, ids in flat]):
            prefill = self._prefill([flat[index][1] for index in batch])
            for row, index in enumerate(batch):
                judged[flat[index][0]].append(self._verdict(prefill, row))
        return [max(several, key=_harm) if several else EMPTY for several in judged]

    def _windows(self, query: str) -> list[list[int]]:
        return self.template.windows(query) if query.strip() else []

    def _prefill(self, queries: Sequence[Sequence[int]]) -> _Prefill:
        batch = pack([Row(list(ids), (self._prompt,)) for ids in queries])
        keep = batch.split + len(self._prompt.ids) + np.array([-2, -1])
        mask = visible(batch.segments, self.sheet.template.attention)
        step = self._engine.forward(batch.ids, batch.positions, mask, keep, candidates=self._candidates)
        lengths = np.array([len(ids) for ids in queries], np.int64)
        return _Prefill(step.logits[:, 0, :2], step.logits[:, 1, 2:], batch.segments, lengths, step.cache)

    def _verdict(self, prefill: _Prefill, row: int) -> Verdict:
        return self.template.verdict(
            prefill.labels[row],
            prefill.categories[row],
            temperature=self.sheet.temperature,
            threshold=self.point.threshold,
            thresholds=self.point.categories,
        )

    # Answers

    def answer(
        self, conversations: Sequence[Conversation | str], force: bool = False, always: bool = False
    ) -> list[Answer]:
        """A verdict each, and for unsafe queries (all, when `force`d with `<|harm|>`) the safeguard answer.

        `always`: safe queries are answered as well, not forced; a model trained with `defer` hands them to the
        assistant.
        """
        results: list[Answer | None] = [None] * len(conversations)
        texts = [self._read(item.query) for item in Conversation.each(conversations)]
        queries = [self._worst_window(text) for text in texts]
        rows = [index for index, query in enumerate(queries) if query is not None]
        for batch in _batches([len(queries[index] or ()) + self.sheet.template.answer for index in rows]):
            owners = [rows[index] for index in batch]
            prefill = self._prefill([queries[owner] or [] for owner in owners])
            verdicts = [self._verdict(prefill, row) for row in range(len(owners))]
            harmful = [force or bool(verdict.unsafe) for verdict in verdicts]
            drafts = [
                _Draft(answers.language_of(texts[owner]), finished=not (harm or always))
                for owner, harm in zip(owners, harmful, strict=True)
            ]
            # What is judged harmful is asked for with <|harm|>: verdict and answer never disagree.
            for _ in self._decode(prefill, drafts, harmful) if always or any(harmful) else ():
                pass
            for owner, verdict, harm, draft in zip(owners, verdicts, harmful, drafts, strict=True):
                if verdict.error or not (harm or always):
                    results[owner] = Answer(verdict=verdict)
                    continue
                pieces = self._checked(draft, verdict, harmful=harm)
                results[owner] = Answer(
                    verdict=verdict, text=" ".join(pieces), language=draft.language, finished=draft.finished
                )
        return [result or Answer(verdict=EMPTY) for result in results]

    def stream(self, conversation: Conversation | str, force: bool = False) -> Iterator[str]:
        """The answer sentence by sentence, each as soon as it is whole and its numbers and links are checked.

        Nothing is yielded for a query judged safe (unless `force`d) or empty: call `check` to tell the two apart.
        """
        text = self._read(Conversation.of(conversation).query)
        query = self._worst_window(text)
        if query is None:
            return
        prefill = self._prefill([query])
        verdict = self._verdict(prefill, 0)
        if verdict.error or not (force or verdict.unsafe):
            return
        draft = _Draft(answers.language_of(text))
        known = self.taxonomy.contacts(self._locale_for(draft.language))
        shown, sent = 0, []
        for _ in self._decode(prefill, [draft], [True]):
            # The last sentence may still grow; all before it are whole.
            whole = [part.strip() for part in answers.sentences(self._text(draft))][:-1]
            for sentence in whole[shown:]:
                shown += 1
                if answers.allowed(sentence, known) and not answers.hands_over(sentence):
                    sent.append(sentence)
                    yield sentence
        yield from self._checked(draft, verdict)[len(sent) :]

    def _worst_window(self, text: str) -> list[int] | None:
        """The query as the model will read it: whole, or its most harmful window; None when it is empty."""
        windows = self._windows(text)
        if len(windows) <= 1:
            return windows[0] if windows else None
        harm: dict[int, tuple[bool, float]] = {}
        for batch in _batches([len(ids) for ids in windows]):
            prefill = self._prefill([windows[index] for index in batch])
            harm |= {index: _harm(self._verdict(prefill, row)) for row, index in enumerate(batch)}
        return windows[max(harm, key=harm.__getitem__)]

    def _decode(self, prefill: _Prefill, drafts: Sequence[_Draft], force: Sequence[bool]) -> Iterator[None]:
        """Write the drafts in step, each the likeliest token that `_weigh` leaves; yields after each token."""
        heads = [self.template.answer_prompt(force=one) for one in force]
        rows, width = len(drafts), max(map(len, heads))
        segments, cache = prefill.segments, prefill.cache
        # The verdict's columns stay in the cache; as a sibling branch the answer does not see them.
        branch = int(segments.max()) + 1
        ids, own = np.full((rows, width), self.template.eos, np.int64), np.zeros((rows, width), np.int64)
        for row, head in enumerate(heads):
            # Shorter heads are padded in front, so that all end in the same column.
            ids[row, width - len(head) :], own[row, width - len(head) :] = head, branch
        positions = prefill.lengths[:, None] + np.maximum(0, np.cumsum(own > 0, axis=1) - 1)
        banned = self.template.forbidden()
        for _ in range(self.sheet.template.answer):
            new = ids.shape[1]
            segments = np.concatenate([segments, own], axis=1)
            mask = visible(segments, self.sheet.template.attention, new=new)
            step = self._engine.forward(ids, positions, mask, np.array([new - 1]), cache=cache)
            cache = step.cache
            logits = step.logits[:, 0]
            logits[:, banned] = -np.inf
            for row, draft in enumerate(drafts):
                if draft.finished:
                    continue
                self._weigh(logits[row], draft)
                token = int(logits[row].argmax())
                if token == self.template.eos:
                    draft.finished = True
                else:
                    draft.ids.append(token)
                    draft.begun = draft.begun or self._scripts[token] is not None
            yield
            if all(draft.finished for draft in drafts):
                return
            last = [draft.ids[-1] if draft.ids else self.template.eos for draft in drafts]
            ids, own = np.array(last, np.int64)[:, None], np.full((rows, 1), branch, np.int64)
            positions = positions[:, -1:] + 1

    def _weigh(self, logits: Floats, draft: _Draft) -> None:
        """Change one row's logits [vocabulary] in place: what was written comes again less easily, no four tokens in a
        row twice, and the first letters are of the query's script."""
        written = list(set(draft.ids))
        again = logits[written]
        logits[written] = np.where(again > 0, again / REPETITION_PENALTY, again * REPETITION_PENALTY)
        logits[_would_repeat(draft.ids)] = -np.inf
        if not draft.begun:
            logits[: len(self._scripts)][self._foreign(draft.language)] = -np.inf

    @cached_property
    def _scripts(self) -> list[str | None]:
        """Per id the language its letters are written in, None for an id without letters."""
        return [
            ("en" if text.isascii() else answers.language_of(text)) if any(map(str.isalpha, text)) else None
            for text in self.template.decode_each()
        ]

    def _foreign(self, language: str) -> Bools:
        if language not in self._masks:
            self._masks[language] = np.array([script not in (None, language) for script in self._scripts])
        return self._masks[language]

    def _text(self, draft: _Draft) -> str:
        text, words = self.template.decode(draft.ids), self.sheet.casing
        return text if words is None else restore(text, words)

    def _checked(self, draft: _Draft, verdict: Verdict, *, harmful: bool = True) -> list[str]:
        """The sentences that may be shown; for a harmful query one of them declines, and the help line that lives may
        depend on follows."""
        language, locale = draft.language, self._locale_for(draft.language)
        known = self.taxonomy.contacts(locale)
        parts = list(answers.sentences(self._text(draft)))
        if not draft.finished and len(parts) > 1 and not answers.ends(parts[-1]):
            # Cut at the length limit: the sentences that are whole are better than half a one more.
            parts.pop()
        shown = [
            part.strip()
            for part in parts
            if answers.allowed(part, known) and not (harmful and answers.hands_over(part))
        ]
        if not harmful:
            return shown or [answers.deferrals(language)[0]]
        if not shown or not answers.declines(" ".join(shown)):
            shown.append(answers.refusal(language))
        category = verdict.category or max(verdict.categories, key=verdict.categories.__getitem__, default=None)
        line = answers.help_line(self.taxonomy, category, language, locale, " ".join(shown))
        return [*shown, line] if line else shown

    def _locale_for(self, language: str) -> str:
        return self._locale or answers.LOCALES.get(language, "US")

    @staticmethod
    def _branch(ids: list[int]) -> Branch:
        return Branch(ids, [IGNORE] * len(ids), [NOT_SUPERVISED] * len(ids))


def load(
    folder: str | Path | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
    locale: str | None = None,
    taxonomy: Taxonomy | None = None,
    point: str = DEFAULT_POINT,
    normalise: bool = True,
) -> SLM:
    """A guard from a model folder, default the model that comes with the package.

    `engine` is `onnx` or `torch` (default: what the folder holds), `threads` the CPU threads to use, `locale` whose
    help lines an answer may show (`US`, `KR`; default by the query's language), `taxonomy` a policy the model must have
    been trained for, `point` one of the model's operating points (`strict` calls more queries unsafe, `permissive`
    fewer). Queries are read in plain letters (`haechi.normalise`) and, where the model knows enough words, with slips
    and lost spaces put right (`haechi.spelling`); `normalise` False: as typed. Raises ModelError in one line for a
    folder that cannot be used, ConfigError for an unknown point or locale.
    """
    path = Path(folder) if folder is not None else default_model()
    sheet = read_sheet(path)
    require_seal(path, sheet)
    if taxonomy is not None:
        require_policy(sheet, taxonomy)
    file = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # tokenizers raises a bare Exception for a missing or damaged file.
        raise ModelError(f"{file} cannot be read: {str(error)[:200]}; copy or export the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    reader = Reader(read_words(path)) if normalise else None
    return SLM(load_engine(path, engine, threads=threads), tokenizer, sheet, locale, point, reader)


class Settings(Config):
    """Settings of `{slm: {...}}`."""

    model: Path | None = None
    """The model folder; None: the embedded model."""
    point: str = DEFAULT_POINT
    """Operating point."""
    locale: str | None = None
    """Whose help lines an answer may show."""
    normalise: bool = True
    """Whether the query is read in plain letters and words."""


def named(spec: str | Mapping[str, Any] | None, point: str | None = None) -> SLM:
    """`slm`, `slm:FOLDER`, `slm@POINT:FOLDER` or `{slm: {...}}`."""
    chosen = settings(Settings, spec, "slm")
    return load(chosen.model, locale=chosen.locale, point=point or chosen.point, normalise=chosen.normalise)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, each within the token budget."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _harm(verdict: Verdict) -> tuple[bool, float]:
    """Windows that could not be judged count above all: a text half judged is not safe."""
    return verdict.error is not None, verdict.score or 0.0


def _would_repeat(ids: Sequence[int], size: int = 4) -> list[int]:
    """Tokens that would come three times in a row, or make the last `size` ids a run that was already written."""
    tail = tuple(ids[len(ids) - size + 1 :])
    again = [
        ids[start + size - 1] for start in range(len(ids) - size + 1) if tuple(ids[start : start + size - 1]) == tail
    ]
    return again + ([ids[-1]] if len(ids) > 1 and ids[-1] == ids[-2] else [])
