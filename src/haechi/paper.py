"""The paper's two tables, row for row: what it reported, marked as such, beside what was measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from haechi.table import Table, triple

_GROUPS = ("safe", "unsafe", "weighted")
"""The paper's columns: each label, and both weighted by rows."""
RUN_ROW = (
    "A row that was not run is measured by `haechi evaluate configs/evaluate/paper.yaml 'guards=[GUARD]' "
    "output=results/GUARD`, and joins this table by `haechi report results/paper results/GUARD`."
)
_ASKING = {"url", "server", "batch", "device", "name", "key", "seed", "timeout", "concurrency", "retries", "backoff"}
_ASKING |= {"cache", "dollars_in", "dollars_out"}
"""Settings that say where and how a system is asked, not which system it is."""


@cache
def paper() -> dict[str, Any]:
    """The paper's tables as facts."""
    text = (resources.files("haechi") / "data" / "paper.yaml").read_text(encoding="utf-8")
    facts: dict[str, Any] = yaml.safe_load(text)
    return facts


def paper_tables(result: Mapping[str, Any]) -> list[str]:
    """Those of the paper's tables whose set was measured on."""
    return [name for name, entry in paper()["tables"].items() if entry["measured_on"] in result["config"]["sets"]]


def paper_table(result: Mapping[str, Any], table: str) -> Table:
    """One of the paper's tables row for row: what it reported, and what its system's guard measured here on the set
    `data/paper.yaml` names, or the guard that would; then the guards of today, and others that were run."""
    facts = paper()
    entry = facts["tables"][table]
    specs = {row["system"]: facts["guards"][row["system"]] for row in entry["rows"]} | facts["today"]
    ran: dict[str, Any] = {}
    for name, guard in result["guards"].items():
        its = (system for system, spec in specs.items() if name == system or _system(guard["spec"]) == _system(spec))
        ran.setdefault(next(its, name), guard)
    others = {name: guard["spec"] for name, guard in ran.items() if name not in specs}
    reported = {row["system"]: row for row in entry["rows"]}
    rows = []
    for system, spec in (specs | others).items():
        told = reported.get(system)
        figures = ran[system]["sets"].get(entry["measured_on"]) if system in ran else None
        if system in others and figures is None:
            continue
        here = [""] * len(_GROUPS)
        if figures:
            here = [triple(figures[f"{group}_{figure}"] for figure in facts["columns"]) for group in _GROUPS]
        size = f" ({told['size']})" if told and "size" in told else ""
        there = [triple(told[group]) if told else "" for group in _GROUPS]
        how = "" if figures else f"`{spec if isinstance(spec, str) else json.dumps(spec)}`"
        rows.append([system + size, *there, *here, how])
    head = [
        "system",
        *(f"{group} P/R/F1, reported" for group in _GROUPS),
        *(f"{group} P/R/F1, measured here" for group in _GROUPS),
        "not run; its guard",
    ]
    return Table(head, rows)


def _system(spec: Any) -> str:
    """What a specification says of which system it is; where and how it is asked left out."""
    if isinstance(spec, str):
        kind, _, argument = spec.partition(":")
        spec = {kind: {"model": argument} if argument and "://" not in argument else {}}
    ((kind, given),) = spec.items()
    told = {key: value for key, value in given.items() if key not in _ASKING} if isinstance(given, Mapping) else given
    return json.dumps([kind, told], sort_keys=True)
