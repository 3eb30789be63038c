"""`haechi evaluate CONFIG`: guards x sets -> verdict files -> metrics.json -> tables.md. Verdicts are written first and
scored later, and a killed run asks no guard twice."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

import haechi
from haechi import metrics
from haechi.attacks import ATTACKS, disguised
from haechi.config import Config
from haechi.costs import costs
from haechi.errors import ConfigError, DataError, HaechiError, did_you_mean
from haechi.evaluate.kept import Kept, place
from haechi.guards import AnsweringGuard, endpoints, load_guard
from haechi.guards.slm import SLM
from haechi.llm import ChatModel
from haechi.metrics import Bools, Said
from haechi.paraphrase import Paraphraser
from haechi.report import tables
from haechi.schema import Example
from haechi.sets import LabelledSet
from haechi.store import resumable, write_json, write_text

HARNESS = 4
"""Raised when equal verdicts would give other figures, or other names for them: results of different ones are not
compared."""
_CHUNK = 64
_PARAPHRASE = "paraphrase"
_MISTAKES = 20
"""So many of each kind are kept, the most confident ones."""


class EvaluateConfig(Config):
    """What is measured on what."""

    output: Path
    """Folder for verdicts/, metrics.json and tables.md."""
    guards: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """Guard specifications; see `haechi.guards`."""
    sets: tuple[str, ...] = Field(min_length=1)
    """Sets by name; rows without a label are left out."""
    answer_sets: tuple[str, ...] = ()
    """Sets on whose harmful rows answers are written, once on the guard's own verdict and once forced."""
    perturbations: dict[str, tuple[Literal["low", "middle", "high"], ...]] = Field(default_factory=dict)
    """Attacks (`haechi.attacks`) under which every set is judged once more, and at which strengths; `all` stands for
    every attack but `paraphrase`, which needs a `paraphraser`."""
    paraphraser: ChatModel | None = None
    """The chat model that words queries anew (`haechi.paraphrase`)."""
    threshold: Literal["fixed", "tuned", "fpr"] = "fixed"
    """Where scores are cut. `fixed`: each guard's own verdicts. `tuned`: at the guard's highest weighted F1 on
    `tune_on`. `fpr`: on each set where at most 1% of its safe rows are called unsafe, which nobody could know
    beforehand: it compares guards at equal false alarms."""
    tune_on: str | None = None
    """Labelled set, not one of `sets`, that `tuned` thresholds are fitted on."""
    timed: int = Field(default=0, ge=0)
    """So many queries of the first set are judged one by one and then together, in a process of its own, by every guard
    that runs here; 0: nothing is timed. Guards behind an endpoint count their requests instead."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap and of the attacks."""

    @model_validator(mode="after")
    def _attacks_are_known(self) -> Self:
        for name in self.perturbations:
            if name not in ("all", _PARAPHRASE, *ATTACKS):
                raise ValueError(f"unknown attack {name!r}{did_you_mean(name, ['all', _PARAPHRASE, *ATTACKS])}")
        if (_PARAPHRASE in self.perturbations) != (self.paraphraser is not None):
            raise ValueError("perturbations: {paraphrase: [...]} and paraphraser: {model: ...} go together")
        return self

    @model_validator(mode="after")
    def _thresholds_are_tuned_elsewhere(self) -> Self:
        if (self.threshold == "tuned") != (self.tune_on is not None):
            raise ValueError("threshold: tuned and tune_on: SET go together")
        if self.tune_on in self.sets:
            raise ValueError(f"a threshold tuned on {self.tune_on!r} cannot be measured on it")
        return self

    def attacks(self) -> list[tuple[str, str]]:
        """Every attack and strength, each once."""
        pairs = [
            (attack, strength)
            for name, strengths in self.perturbations.items()
            for attack in (ATTACKS if name == "all" else (name,))
            for strength in strengths
        ]
        return list(dict.fromkeys(pairs))


def run(config: EvaluateConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluate and write; returns the metrics."""
    names = dict.fromkeys((*config.sets, *config.answer_sets, *([config.tune_on] if config.tune_on else [])))
    sets = {name: LabelledSet(name) for name in names}
    for name in config.sets:
        if config.threshold == "fpr" and sets[name].truth.all():
            raise ConfigError(f"threshold: fpr cuts where safe rows are called unsafe, and {name!r} has none")
    guards = [load_guard(spec) for spec in config.guards]
    if len({guard.name for guard in guards}) < len(guards):
        raise ConfigError("two guards have the same name; give them different models, answers or thresholds")
    result: dict[str, Any] = {
        "haechi": haechi.__version__,
        "harness": HARNESS,
        "config": config.model_dump(mode="json"),
        "sets": {name: {"rows": len(rows), "sha256": rows.sha256} for name, rows in sets.items()},
        "guards": {},
        "comparisons": {},
    }
    everything: dict[str, dict[str, Said]] = {name: {} for name in config.sets}
    for guard, spec in zip(guards, config.guards, strict=True):
        kept = Kept(config.output, guard)
        cut = _Cut(config, kept, sets)
        measured: dict[str, Any] = {
            "spec": spec,
            "identity": guard.identity,
            "sets": {},
            "answers": {},
            "robustness": {},
        }
        if isinstance(guard, SLM):
            measured |= {
                "taxonomy": guard.sheet.taxonomy_version,
                "threshold": guard.point.threshold,
                "temperature": guard.sheet.temperature,
            }
        for name in config.sets:
            started = time.monotonic()
            said, threshold = cut(sets[name], kept.said(name, sets[name]))
            everything[name][guard.name] = said
            figures = {
                "threshold": threshold,
                **measure(sets[name], said, draws=config.draws, seed=config.seed),
                "said_categories": kept.categories(name, sets[name]) if said.named else {},
            }
            measured["sets"][name] = figures
            report(
                f"{guard.name} on {name}: weighted F1 {figures['weighted_f1']:.3f}  errors {figures['errors']}  "
                f"({time.monotonic() - started:.1f} s)"
            )
            measured["robustness"][name] = _attacked(config, kept, sets[name], said, threshold, report)
        if isinstance(guard, AnsweringGuard):
            for name in config.answer_sets:
                for force in (False, True):
                    measured["answers"][f"{name}{' forced' if force else ''}"] = kept.answered(sets[name], force)
        measured["usage"] = [endpoint.usage.summary(endpoint.url, endpoint.access) for endpoint in endpoints(guard)]
        if config.timed and not measured["usage"]:
            queries = [row.query for row in islice(sets[config.sets[0]], config.timed)]
            try:
                measured["costs"] = costs(spec, queries)
            except HaechiError as error:
                report(f"{guard.name} is not timed: {error}")
        result["guards"][guard.name] = measured
        write_json(config.output / "metrics.json", result)
    for name, said_by in everything.items():
        result["comparisons"][name] = [
            {
                "guards": [first, second],
                **metrics.compare(
                    sets[name].truth, said_by[first], said_by[second], draws=config.draws, seed=config.seed
                ),
            }
            for first, second in combinations(said_by, 2)
        ]
    write_json(config.output / "metrics.json", result)
    write_text(config.output / "tables.md", tables(result))
    report(f"tables in {config.output / 'tables.md'}")
    return result


class _Cut:
    """The configured threshold policy, for one guard."""

    def __init__(self, config: EvaluateConfig, kept: Kept, sets: Mapping[str, LabelledSet]) -> None:
        """Judges `tune_on` where a threshold is tuned. Raises DataError when it has rows of one label only."""
        self._policy, self._name, self._tuned = config.threshold, kept.guard.name, None
        if config.tune_on:
            rows = sets[config.tune_on]
            if rows.truth.all() or not rows.truth.any():
                raise DataError(f"a threshold cannot be tuned on {config.tune_on!r}: its rows have one label only")
            said = self._scored(kept.said(config.tune_on, rows))
            self._tuned = metrics.best_threshold(rows.truth[~np.isnan(said.score)], said.score[~np.isnan(said.score)])

    def __call__(self, rows: LabelledSet, said: Said) -> tuple[Said, float | None]:
        """Verdicts under the policy and the threshold that made them; None: the guard's own."""
        if self._policy == "fixed":
            return said, None
        said = self._scored(said)
        known = ~np.isnan(said.score)
        threshold = self._tuned
        if threshold is None:
            threshold = metrics.threshold_for_false_alarms(rows.truth[known], said.score[known], metrics.RECALL_AT)
        return said.cut(threshold), threshold

    def _scored(self, said: Said) -> Said:
        unscored = np.isnan(said.score)
        if unscored.all() or (unscored & (said.unsafe >= 0)).any():
            raise ConfigError(f"{self._name} gives no scores to cut: only threshold: fixed can measure it")
        return said


def measure(rows: LabelledSet, said: Said, *, draws: int, seed: int) -> dict[str, Any]:
    """All figures of one guard on one set."""
    counts = metrics.cells(rows.truth, said)
    return {
        "rows": len(rows),
        "errors": int((said.unsafe < 0).sum()),
        "cells": dict(zip(metrics.CELLS, counts.astype(int).tolist(), strict=True)),
        **{name: float(value) for name, value in metrics.scores(counts).items()},
        "intervals": metrics.interval(counts, draws=draws, seed=seed),
        **metrics.ranking(rows.truth, said.score, seed=seed),
        **{
            f"by_{field}": {value: _group(rows.truth[at], said.unsafe[at] == 1) for value, at in rows.groups(field)}
            for field in ("category", "kind", "lang")
        },
        "curves": metrics.curves(rows.truth, said.score),
        "mistakes": _mistakes(rows.truth, said),
    }


def _group(truth: Bools, called: Bools) -> dict[str, Any]:
    """Recall and false alarms of some rows; None without rows to have them of."""
    unsafe, safe = int(truth.sum()), int((~truth).sum())
    return {
        "unsafe": unsafe,
        "recall": float(called[truth].mean()) if unsafe else None,
        "safe": safe,
        "fpr": float(called[~truth].mean()) if safe else None,
    }


def _mistakes(truth: Bools, said: Said) -> dict[str, list[tuple[int, float | None]]]:
    """The most confident wrong verdicts as (row, score), rows counted from 0 in the set's order."""
    sure = np.where(np.isnan(said.score), 0.5, said.score)
    found = {}
    for kind, wrong, order in (
        ("false_alarms", (said.unsafe == 1) & ~truth, -sure),
        ("missed", (said.unsafe == 0) & truth, sure),
    ):
        places = np.flatnonzero(wrong)
        places = places[np.argsort(order[places], kind="stable")][:_MISTAKES]
        found[kind] = [
            (int(place), None if np.isnan(said.score[place]) else float(said.score[place])) for place in places
        ]
    return found


def _attacked(
    config: EvaluateConfig,
    kept: Kept,
    rows: LabelledSet,
    plain: Said,
    threshold: float | None,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Figures under each attack and strength, and their difference to the plain queries' (paired)."""
    result: dict[str, dict[str, Any]] = defaultdict(dict)
    for attack, strength in config.attacks():
        disguise = _disguise(config, rows, attack, strength)
        changed = LabelledSet(rows.name, disguise)
        share = disguise.changed / len(changed)
        if not share:
            continue
        under = kept.said(f"{rows.name}~{attack}-{strength}", changed)
        if threshold is not None:
            under = under.cut(threshold)
        figures = metrics.scores(metrics.cells(rows.truth, under))
        result[attack][strength] = {
            "changed": share,
            **{figure: float(figures[figure]) for figure in ("weighted_f1", "unsafe_recall", "fpr")},
            **metrics.compare(rows.truth, under, plain, draws=config.draws, seed=config.seed),
        }
    if result:
        drops = [
            (one["difference"], f"{attack} {strength}")
            for attack, strengths in result.items()
            for strength, one in strengths.items()
        ]
        report(
            f"{kept.guard.name} on {rows.name} under {len(drops)} attacks: weighted F1 {min(drops)[0]:+.3f} at worst "
            f"({min(drops)[1]})"
        )
    return dict(result)


class _Disguise:
    """A change of queries, and how many it has changed."""

    def __init__(self, change: Callable[[Example], str]) -> None:
        self._change = change
        self.changed = 0

    def __call__(self, row: Example) -> Example:
        query = self._change(row)
        self.changed += query != row.query
        return row.model_copy(update={"query": query})


def _disguise(config: EvaluateConfig, rows: LabelledSet, attack: str, strength: str) -> _Disguise:
    """An attack as a change of rows. Raises ConfigError when not one query of a chunk could be paraphrased."""
    if attack != _PARAPHRASE:
        return _Disguise(lambda row: disguised(row.query, attack, strength, config.seed))
    assert config.paraphraser
    paraphraser = Paraphraser(config.paraphraser)

    def reword(part: Sequence[Example]) -> list[dict[str, Any]]:
        said = paraphraser.reworded([row.query for row in part], strength)
        if not any(one.text or one.declined for one in said):
            raise ConfigError(f"not one of {len(said)} queries of {rows.name} could be paraphrased: {said[0].error}")
        return [{"id": row.id, "query": one.text, "error": one.error} for row, one in zip(part, said, strict=True)]

    made = place(config.output / "paraphrases", paraphraser.identity, f"{rows.name}~{strength}", rows.sha256)
    written = resumable(*made, rows, reword, _CHUNK)
    texts = {row["id"]: row["query"] for row in written if row["query"]}
    return _Disguise(lambda row: str(texts.get(row.id, row.query)))
