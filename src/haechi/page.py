"""`haechi report RESULTS...`: what evaluations measured, merged where it may be compared, as one Markdown file and one
self-contained HTML page for screen, phone and paper."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from haechi import figures
from haechi.errors import ConfigError, DataError, HaechiError, MissingExtra
from haechi.evaluate import HARNESS
from haechi.paper import RUN_ROW, paper, paper_table, paper_tables
from haechi.report import (
    answer_table,
    attack_table,
    category_table,
    compared,
    cost_table,
    language_table,
    main_table,
    set_table,
    tables,
)
from haechi.sets import LabelledSet, set_file
from haechi.store import encodable, read_json, write_text

_STRENGTH = "middle"
_WORST_DROP = -0.5


def run(folders: Sequence[Path], output: Path, report: Callable[[str], None] = print) -> Path:
    """Merge the folders and write report.md and report.html to `output`; returns the page.

    Raises DataError for a folder that is not an evaluation's, ConfigError for results that must not be compared.
    """
    result = merged([(folder, _read(folder)) for folder in folders])
    write_text(output / "report.md", tables(result))
    page = output / "report.html"
    write_text(page, html(result))
    report(f"page in {page}, tables in {output / 'report.md'}")
    return page


def _read(folder: Path) -> dict[str, Any]:
    result = read_json(folder / "metrics.json" if folder.is_dir() else folder)
    if not isinstance(result, dict) or not {"config", "sets", "guards", "comparisons"} <= result.keys():
        raise DataError(f"{folder} holds no results of haechi evaluate")
    if result.get("harness") != HARNESS:
        raise DataError(
            f"{folder} was measured by another version (harness {result.get('harness')}, this is {HARNESS}): run its "
            "evaluation again, which asks no guard twice"
        )
    whole = {"spec", "identity", "sets", "answers", "robustness", "usage"}
    if (
        not result["config"].get("sets")
        or not result["guards"]
        or not all(whole <= guard.keys() for guard in dict(result["guards"]).values())
    ):
        raise DataError(f"{folder} holds results that are not whole: run its evaluation again")
    return result


def merged(results: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """One result of several. Raises ConfigError, saying why, unless equal names mean equal things in all of them: the
    same threshold policy, the same rows in a set, one measurement of a guard on a set."""
    first, result = results[0]
    policy = ("threshold", "tune_on")
    for folder, other in results[1:]:
        for key in policy:
            ours, theirs = result["config"].get(key), other["config"].get(key)
            if ours != theirs:
                raise ConfigError(
                    f"{folder} and {first} do not compare: {key} is {theirs} in one and {ours} in the other"
                )
        for name, entry in other["sets"].items():
            known = result["sets"].setdefault(name, entry)
            if known["sha256"] != entry["sha256"]:
                raise ConfigError(f"{folder} and {first} do not compare: {name} has other rows in each")
        names = [*result["config"]["sets"], *other["config"]["sets"]]
        result["config"]["sets"] = list(dict.fromkeys(names))
        for guard, measured in other["guards"].items():
            _join(result["guards"].setdefault(guard, measured), measured, f"{guard} in {folder} and {first}")
        for name, pairs in other["comparisons"].items():
            known = result["comparisons"].setdefault(name, [])
            known += [pair for pair in pairs if pair["guards"] not in [one["guards"] for one in known]]
    for name in result["config"]["sets"]:
        result["comparisons"].setdefault(name, [])
    return result


def _join(ours: dict[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    if ours["identity"] != theirs["identity"]:
        raise ConfigError(
            f"{what} are two guards of other settings, weights or versions: run one of the evaluations again, or give "
            "the guards different names"
        )
    for name, measured in theirs["sets"].items():
        known = ours["sets"].setdefault(name, measured)
        if known["cells"] != measured["cells"]:
            raise ConfigError(f"{what} judges {name} differently: not one guard; give one of them another name")
    ours["answers"] = {**theirs["answers"], **ours["answers"]}
    ours["usage"] += [one for one in theirs["usage"] if one not in ours["usage"]]
    for name, attacks in theirs["robustness"].items():
        for attack, strengths in attacks.items():
            mine = ours["robustness"].setdefault(name, {})
            mine[attack] = {**strengths, **mine.get(attack, {})}
    if "costs" in theirs:
        ours.setdefault("costs", theirs["costs"])


def html(result: Mapping[str, Any]) -> str:
    """The page. Its pictures are inside it, and it asks for nothing from anywhere."""
    try:
        from jinja2 import Environment
    except ImportError:
        raise MissingExtra("eval", "the HTML page") from None
    text = (resources.files("haechi") / "data" / "report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    pictures = {
        "forest": figures.forest_plot(result),
        "pr": figures.curve_plot(result, "pr"),
        "calibration": figures.curve_plot(result, "calibration"),
    }
    texts = _texts(result)
    return template.render(
        result=result,
        main=main_table(result),
        sets=[
            (name, set_table(result, name), [compared(pair) for pair in result["comparisons"][name]])
            for name in result["config"]["sets"]
        ],
        run_row=RUN_ROW,
        papers=[(paper()["tables"][name], paper_table(result, name)) for name in paper_tables(result)],
        languages=language_table(result),
        costs=cost_table(result),
        answers=answer_table(result),
        attacks=[
            (guard, attack_table(measured["robustness"]), _picture(_attack_map(measured["robustness"])))
            for guard, measured in result["guards"].items()
            if any(measured["robustness"].values())
        ],
        categories=category_table(result),
        category_pictures=[(guard, _picture(_category_map(measured))) for guard, measured in result["guards"].items()],
        confusions=[
            (guard, name, _picture(_confusion_map(entry["said_categories"])))
            for guard, measured in result["guards"].items()
            for name, entry in measured["sets"].items()
            if entry["said_categories"]
        ],
        mistakes=[(guard, _mistakes(measured, texts)) for guard, measured in result["guards"].items()],
        strength=_STRENGTH,
        **{f"{name}_picture": _picture(figure) for name, figure in pictures.items()},
    )


def _picture(figure: Any | None) -> str | None:
    """A figure as a data address; None for none."""
    if figure is None:
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.svg(figure).encode()).decode()}"


def _attack_map(robustness: Mapping[str, Mapping[str, Any]]) -> Any:
    names = [name for name, attacks in robustness.items() if attacks]
    attacks = list(dict.fromkeys(attack for name in names for attack in robustness[name]))
    values = np.full((len(attacks), len(names)), np.nan)
    for column, name in enumerate(names):
        for row, attack in enumerate(attacks):
            strengths = robustness[name].get(attack, {})
            chosen = strengths.get(_STRENGTH) or next(iter(strengths.values()), None)
            if chosen:
                values[row, column] = chosen["difference"]
    return figures.heat_map(names, attacks, values, worst=_WORST_DROP, best=0.0)


def _category_map(measured: Mapping[str, Any]) -> Any | None:
    """Share of wrong verdicts by category: misses of unsafe rows, false alarms on safe ones, sets side by side."""
    names = [name for name in measured["sets"] if name.startswith("policy_test")]
    codes = sorted({code for name in names for code in measured["sets"][name]["by_category"]})
    if not codes:
        return None
    columns = [f"{name}: {what}" for name in names for what in ("missed", "false alarms")]
    values = np.full((len(codes), len(columns)), np.nan)
    for row, code in enumerate(codes):
        for place, name in enumerate(names):
            group = measured["sets"][name]["by_category"].get(code, {})
            if group.get("recall") is not None:
                values[row, 2 * place] = 1 - group["recall"]
            if group.get("fpr") is not None:
                values[row, 2 * place + 1] = group["fpr"]
    return figures.heat_map(columns, codes, values, worst=0.6, best=0.0)


def _confusion_map(said: Mapping[str, Mapping[str, int]]) -> Any:
    """What the unsafe rows of each category were called, as shares: its own name on the diagonal, `safe` last."""
    others = {name for counts in said.values() for name in counts} - said.keys() - {"safe", "none"}
    columns = [
        *said,
        *sorted(others),
        *(name for name in ("none", "safe") if any(name in one for one in said.values())),
    ]
    values = np.array([[counts.get(name, 0) / sum(counts.values()) for name in columns] for counts in said.values()])
    shown = np.where(values > 0, values, np.nan)
    return figures.heat_map(columns, list(said), shown, worst=1.0, best=0.0, colors="Blues")


def _texts(result: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Queries of the most confident mistakes by set and row. A set that is not on this machine, or has other rows than
    were measured, has none; nothing is fetched."""
    found: dict[str, dict[int, str]] = {}
    for name in result["config"]["sets"]:
        measured = [guard["sets"][name]["mistakes"] for guard in result["guards"].values() if name in guard["sets"]]
        wanted = {place for mistakes in measured for places in mistakes.values() for place, _ in places}
        try:
            if not wanted or set_file(name) is None:
                continue
            rows = LabelledSet(name)
        except HaechiError:
            continue
        if rows.sha256 == result["sets"][name]["sha256"]:
            texts = ((place, row.query) for place, row in enumerate(rows) if place in wanted)
            found[name] = {place: encodable(query) for place, query in texts}
    return found


def _mistakes(
    measured: Mapping[str, Any], texts: Mapping[str, Mapping[int, str]]
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Set, kind and (score, query) of a guard's most confident mistakes."""
    return [
        (
            name,
            kind.replace("_", " "),
            [("" if score is None else f"{score:.3f}", texts[name][place]) for place, score in places],
        )
        for name, entry in measured["sets"].items()
        if name in texts
        for kind, places in entry["mistakes"].items()
        if places
    ]
