"""The small language model as a guard: one forward pass for verdict and category; an approved answer to it, or one that
the model writes from the same prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from haechi import answers
from haechi.approved import FILE as APPROVED
from haechi.approved import Approved, read_approved
from haechi.config import Config
from haechi.engines import Engine, load_engine
from haechi.errors import ConfigError, ModelError, did_you_mean
from haechi.guards import EMPTY, settings
from haechi.guards.writer import Draft, Prefill, Writer
from haechi.modelfolder import DEFAULT_POINT, Sheet, default_model, read_sheet, require_policy, require_seal
from haechi.normalise import VERSION, Reader
from haechi.schema import Answer, Conversation, Verdict
from haechi.spelling import read_words
from haechi.store import fingerprint
from haechi.taxonomy import Taxonomy
from haechi.template import IGNORE, NOT_SUPERVISED, Branch, Row, Template, pack, visible

WRITTEN = "written"
"""The setting that lets the model write, where approved answers came with it."""
_AT_RISK = 0.1
"""Share of an urgent category from which its help line is shown: of validation rows called unsafe that is 93% of those
about self-harm and 5% of the others; were it to be the likeliest, 83% and 3%."""
_BATCH_TOKENS = 4096
"""Padded tokens of one forward pass: large enough to fill the cores, small enough to stay in cache."""


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
        approved: Approved | None = None,
    ) -> None:
        """`read` is what the model is shown of a query; None: the query as typed. `approved` are the only answers it
        gives; None: it writes its own."""
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
        self._approved = approved
        self._writer = Writer(engine, self.template, sheet.casing)
        self.identity = fingerprint(
            "slm",
            sheet.model_dump(mode="json"),
            locale,
            point,
            VERSION if read else None,
            *([approved.identity] if approved else []),
        )
        self._candidates = np.array([*self.template.labels, *self.template.categories], np.int64)
        self._prompt = self._branch(self.template.verdict_prompt())

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

    def _prefill(self, queries: Sequence[Sequence[int]]) -> Prefill:
        batch = pack([Row(list(ids), (self._prompt,)) for ids in queries])
        keep = batch.split + len(self._prompt.ids) + np.array([-2, -1])
        mask = visible(batch.segments, self.sheet.template.attention)
        step = self._engine.forward(batch.ids, batch.positions, mask, keep, candidates=self._candidates)
        lengths = np.array([len(ids) for ids in queries], np.int64)
        return Prefill(step.logits[:, 0, :2], step.logits[:, 1, 2:], batch.segments, lengths, step.cache)

    def _verdict(self, prefill: Prefill, row: int) -> Verdict:
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
        longest = self.sheet.template.answer if self._approved is None else 0
        for batch in _batches([len(queries[index] or ()) + longest for index in rows]):
            owners = [rows[index] for index in batch]
            prefill = self._prefill([queries[owner] or [] for owner in owners])
            verdicts = [self._verdict(prefill, row) for row in range(len(owners))]
            harmful = [force or bool(verdict.unsafe) for verdict in verdicts]
            drafts = [
                Draft(answers.language_of(texts[owner]), finished=not (harm or always))
                for owner, harm in zip(owners, harmful, strict=True)
            ]
            if self._approved is None and (always or any(harmful)):
                # What is judged harmful is asked for with <|harm|>: verdict and answer never disagree.
                for _ in self._writer.write(prefill, drafts, harmful):
                    pass
            for owner, verdict, harm, draft in zip(owners, verdicts, harmful, drafts, strict=True):
                shown = (harm or always) and not verdict.error
                results[owner] = self._reply(draft, verdict, harm) if shown else Answer(verdict=verdict)
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
        draft = Draft(answers.language_of(text))
        if self._approved is not None:
            yield from map(str.strip, answers.sentences(self._reply(draft, verdict, True).text or ""))
            return
        known = self.taxonomy.contacts(self._locale_for(draft.language))
        shown, sent = 0, []
        for _ in self._writer.write(prefill, [draft], [True]):
            # The last sentence may still grow; all before it are whole.
            whole = [part.strip() for part in self._writer.parts(draft)][:-1]
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

    def _reply(self, draft: Draft, verdict: Verdict, harmful: bool) -> Answer:
        """What to show for a query: a finished draft, or what has been approved."""
        if self._approved is None:
            text = " ".join(self._checked(draft, verdict, harmful=harmful))
            return Answer(verdict=verdict, text=text, language=draft.language, finished=draft.finished)
        if not harmful:
            text = answers.deferrals(draft.language)[0]
            return Answer(verdict=verdict, text=text, language=draft.language, finished=True)
        said, language = self._approved.text(verdict.categories, draft.language)
        text = " ".join(self._with_help([said], language, verdict))
        return Answer(verdict=verdict, text=text, language=language, finished=True)

    def _checked(self, draft: Draft, verdict: Verdict, *, harmful: bool = True) -> list[str]:
        """The sentences of a draft that may be shown; for a harmful query one of them declines, and the help line that
        lives may depend on follows."""
        language = draft.language
        known = self.taxonomy.contacts(self._locale_for(language))
        shown = [
            part.strip()
            for part in self._writer.sentences(draft)
            if answers.allowed(part, known) and not (harmful and answers.hands_over(part))
        ]
        if not harmful:
            return shown or [answers.deferrals(language)[0]]
        if not shown or not answers.declines(" ".join(shown)):
            shown.append(answers.refusal(language))
        return self._with_help(shown, language, verdict)

    def _with_help(self, parts: list[str], language: str, verdict: Verdict) -> list[str]:
        """The sentences and, where lives may be at risk, a help line."""
        locale, text = self._locale_for(language), " ".join(parts)
        urgent = [code for code in self.taxonomy.codes if self.taxonomy[code].urgent]
        category = max(urgent, key=verdict.categories.__getitem__, default=None)
        if category is None or verdict.categories[category] < _AT_RISK:
            return parts
        line = answers.help_line(self.taxonomy, category, language, locale, text)
        return [*parts, line] if line else parts

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
    answers: Path | str | None = None,
) -> SLM:
    """A guard from a model folder, default the model that comes with the package.

    `engine` is `onnx` or `torch` (default: what the folder holds), `threads` the CPU threads to use, `locale` whose
    help lines an answer may show (`US`, `KR`; default by the query's language), `taxonomy` a policy the model must have
    been trained for, `point` one of the model's operating points (`strict` calls more queries unsafe, `permissive`
    fewer). Queries are read in plain letters (`haechi.normalise`) and, where the model knows enough words, with slips
    and lost spaces put right (`haechi.spelling`); `normalise` False: as typed. `answers` is a file of approved answers
    (`haechi.approved`), the only ones given, or `written`: the model's own words; default: the folder's approved ones
    if it has any. Raises ModelError in one line for a folder that cannot be used, ConfigError for an unknown point or
    locale and for a file of answers that does not fit the policy.
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
    own = path / APPROVED
    chosen = (own if own.is_file() else WRITTEN) if answers is None else answers
    approved = None if str(chosen) == WRITTEN else read_approved(Path(chosen), sheet.policy())
    guard = SLM(load_engine(path, engine, threads=threads), tokenizer, sheet, locale, point, reader, approved)
    if approved is None and own.is_file():
        guard.name += f" {WRITTEN}"
    elif answers is not None and approved is not None:
        guard.name += f" {Path(answers).stem}"
    return guard


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
    answers: str | None = None
    """A file of approved answers, or `written`."""


def named(spec: str | Mapping[str, Any] | None, point: str | None = None) -> SLM:
    """`slm`, `slm:FOLDER`, `slm@POINT:FOLDER` or `{slm: {...}}`."""
    chosen = settings(Settings, spec, "slm")
    return load(
        chosen.model,
        locale=chosen.locale,
        point=point or chosen.point,
        normalise=chosen.normalise,
        answers=chosen.answers,
    )


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
