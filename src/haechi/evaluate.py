"""`haechi evaluate CONFIG`: guards x sets -> verdict files -> metrics.json -> tables.md. Verdicts are written first and
scored later, and a killed run asks no guard twice."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

import haechi
from haechi import answers, metrics
from haechi.attacks import ATTACKS, disguised
from haechi.bulk import answer_row, verdict_row
from haechi.config import Config
from haechi.errors import ConfigError, did_you_mean
from haechi.guards import AnsweringGuard, Guard, judged, load_guard
from haechi.guards.slm import SLM
from haechi.report import tables
from haechi.schema import Answer, Conversation, Example, Verdict
from haechi.sets import load_set, set_hash
from haechi.store import Journal, fingerprint, read_jsonl, write_json, write_text

_CHUNK = 256


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
    every attack."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap draws."""
    seed: int = 0
    """Of the bootstrap and of the attacks."""

    @model_validator(mode="after")
    def _attacks_are_known(self) -> Self:
        for name in self.perturbations:
            if name != "all" and name not in ATTACKS:
                raise ValueError(f"unknown attack {name!r}{did_you_mean(name, ['all', *ATTACKS])}")
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
    sets = {
        name: [row for row in load_set(name) if row.label]
        for name in dict.fromkeys((*config.sets, *config.answer_sets))
    }
    for name, rows in sets.items():
        if not rows:
            raise ConfigError(f"data set {name!r} has no labelled rows to evaluate on")
        if len({row.id for row in rows}) < len(rows):
            raise ConfigError(f"data set {name!r} has rows that share an id")
    guards = [load_guard(spec) for spec in config.guards]
    if len({guard.name for guard in guards}) < len(guards):
        raise ConfigError("two guards have the same name; give them different models or thresholds")
    result: dict[str, Any] = {
        "haechi": haechi.__version__,
        "config": config.model_dump(mode="json"),
        "sets": {name: {"rows": len(rows), "sha256": set_hash(rows)} for name, rows in sets.items()},
        "guards": {},
        "comparisons": {},
    }
    said: dict[str, dict[str, list[Verdict]]] = {name: {} for name in config.sets}
    for guard, spec in zip(guards, config.guards, strict=True):
        measured: dict[str, Any] = {"spec": spec, "sets": {}, "answers": {}, "robustness": {}}
        if isinstance(guard, SLM):
            measured |= {
                "taxonomy": guard.sheet.taxonomy_version,
                "threshold": guard.point.threshold,
                "temperature": guard.sheet.temperature,
            }
        for name in config.sets:
            started = time.monotonic()
            verdicts = [Verdict(**row) for row in _judged(config, guard, name, sets[name])]
            said[name][guard.name] = verdicts
            figures = measure(sets[name], verdicts, draws=config.draws, seed=config.seed)
            measured["sets"][name] = figures
            report(
                f"{guard.name} on {name}: weighted F1 {figures['weighted_f1']:.3f}  errors {figures['errors']}  "
                f"({time.monotonic() - started:.1f} s)"
            )
            measured["robustness"][name] = _attacked(config, guard, name, sets[name], verdicts, report)
        if isinstance(guard, AnsweringGuard):
            for name in config.answer_sets:
                for force in (False, True):
                    measured["answers"][f"{name}{' forced' if force else ''}"] = _answered(
                        config, guard, name, sets[name], force
                    )
        endpoint = getattr(guard, "endpoint", None)
        if endpoint is not None:
            measured["usage"] = endpoint.usage.summary(endpoint.access)
        result["guards"][guard.name] = measured
        write_json(config.output / "metrics.json", result)
    for name in config.sets:
        labels = [row.label for row in sets[name] if row.label]
        result["comparisons"][name] = [
            {
                "guards": [first, second],
                **metrics.compare(labels, said[name][first], said[name][second], draws=config.draws, seed=config.seed),
            }
            for first, second in combinations(said[name], 2)
        ]
    write_json(config.output / "metrics.json", result)
    write_text(config.output / "tables.md", tables(result))
    report(f"tables in {config.output / 'tables.md'}")
    return result


def measure(rows: Sequence[Example], verdicts: Sequence[Verdict], *, draws: int, seed: int) -> dict[str, Any]:
    """All figures of one guard on one set."""
    labels = [row.label for row in rows if row.label]
    counts = metrics.cells(labels, verdicts)
    figures: dict[str, Any] = {
        "rows": len(rows),
        "errors": sum(verdict.error is not None for verdict in verdicts),
        "cells": dict(zip(metrics.CELLS, counts.astype(int).tolist(), strict=True)),
        **{name: float(value) for name, value in metrics.scores(counts).items()},
        "intervals": metrics.interval(counts, draws=draws, seed=seed),
        **metrics.ranking(labels, verdicts, seed=seed),
    }
    for field in ("category", "kind", "lang"):
        groups: dict[str, list[tuple[Example, Verdict]]] = defaultdict(list)
        for row, verdict in zip(rows, verdicts, strict=True):
            groups[str(getattr(row, field))].append((row, verdict))
        figures[f"by_{field}"] = {name: _group(pairs) for name, pairs in sorted(groups.items())}
    return figures


def _group(pairs: Sequence[tuple[Example, Verdict]]) -> dict[str, Any]:
    unsafe = [verdict for row, verdict in pairs if row.label == "unsafe"]
    safe = [verdict for row, verdict in pairs if row.label == "safe"]
    return {
        "unsafe": len(unsafe),
        "recall": sum(v.unsafe is True for v in unsafe) / len(unsafe) if unsafe else None,
        "safe": len(safe),
        "fpr": sum(v.unsafe is True for v in safe) / len(safe) if safe else None,
    }


def _judged(config: EvaluateConfig, guard: Guard, name: str, rows: Sequence[Example]) -> list[dict[str, Any]]:
    written = _resumable(
        config,
        guard,
        name,
        rows,
        lambda part: [
            verdict_row(row.id, verdict)
            for row, verdict in zip(part, judged(guard, [_conversation(row) for row in part]), strict=True)
        ],
    )
    return [{key: value for key, value in row.items() if key != "id"} for row in written]


def _attacked(
    config: EvaluateConfig,
    guard: Guard,
    name: str,
    rows: Sequence[Example],
    verdicts: Sequence[Verdict],
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Figures under each attack and strength, and their difference to the plain queries' (paired)."""
    labels = [row.label for row in rows if row.label]
    result: dict[str, dict[str, Any]] = defaultdict(dict)
    for attack, strength in config.attacks():
        changed = [
            row.model_copy(update={"query": disguised(row.query, attack, strength, config.seed)}) for row in rows
        ]
        touched = sum(new.query != old.query for new, old in zip(changed, rows, strict=True))
        if not touched:
            continue
        under = [Verdict(**row) for row in _judged(config, guard, f"{name}~{attack}-{strength}", changed)]
        figures = metrics.scores(metrics.cells(labels, under))
        result[attack][strength] = {
            "changed": touched / len(rows),
            **{figure: float(figures[figure]) for figure in ("weighted_f1", "unsafe_recall", "fpr")},
            **metrics.compare(labels, under, verdicts, draws=config.draws, seed=config.seed),
        }
    if result:
        drops = [
            (one["difference"], f"{attack} {strength}")
            for attack, strengths in result.items()
            for strength, one in strengths.items()
        ]
        report(
            f"{guard.name} on {name} under {len(drops)} attacks: weighted F1 {min(drops)[0]:+.3f} at worst "
            f"({min(drops)[1]})"
        )
    return dict(result)


def _answered(
    config: EvaluateConfig, guard: AnsweringGuard, name: str, rows: Sequence[Example], force: bool
) -> dict[str, Any]:
    """Checks of the answers to a set's harmful rows (rules in `haechi.answers.problems`)."""
    harmful = [row for row in rows if row.label == "unsafe"]

    def write(part: Sequence[Example]) -> list[dict[str, Any]]:
        replies: list[Answer] = guard.answer([_conversation(row) for row in part], force)
        return [answer_row(row.id, reply) for row, reply in zip(part, replies, strict=True)]

    written = _resumable(config, guard, f"{name}.answers{'.forced' if force else ''}", harmful, write)
    policy = getattr(guard, "taxonomy", None)
    failures: dict[str, int] = defaultdict(int)
    total = passed = 0
    for example, row in zip(harmful, written, strict=True):
        if row["answer"] is None:
            continue
        total += 1
        language = answers.language_of(example.query)
        known = policy.contacts(answers.LOCALES.get(language, "US")) if policy else set()
        urgent = bool(policy and example.category in policy.codes and policy[example.category].urgent)
        found = answers.problems(row["answer"], language, known, urgent=urgent)
        passed += not found
        for problem in found:
            failures[problem] += 1
    return {
        "harmful": len(harmful),
        "answers": total,
        "passed": passed / total if total else None,
        "problems": dict(failures),
    }


def _conversation(row: Example) -> Conversation:
    return Conversation.from_query(row.query, row.id)


def _resumable(
    config: EvaluateConfig,
    guard: Guard,
    name: str,
    rows: Sequence[Example],
    work: Callable[[Sequence[Example]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The rows `work` makes, through a journal keyed by guard and set; a finished file of that key is taken as is."""
    folder = config.output / "verdicts" / re.sub(r"[^\w.@-]+", "_", guard.name)
    stem = re.sub(r"[^\w.@-]+", "_", name)
    path, stamp = folder / f"{stem}.jsonl", folder / f"{stem}.key"
    key = fingerprint(guard.identity, name, set_hash(rows))
    if not (path.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key):
        with Journal(path, key) as journal:
            for start in range(len(journal), len(rows), _CHUNK):
                journal.write(work(rows[start : start + _CHUNK]))
        write_text(stamp, key)
    written: list[dict[str, Any]] = list(read_jsonl(path))
    return written
