"""Results files -> Markdown tables; no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from haechi.paper import RUN_ROW, paper, paper_table, paper_tables
from haechi.table import Table, number, triple

LABELS = ("safe", "unsafe")


def tables(result: Mapping[str, Any]) -> str:
    """All tables of one evaluation."""
    intervals = "intervals are 95% bootstrap intervals, of shares of answers Wilson's"
    parts = ["# Evaluation", "", f"Measured by `haechi evaluate`; {intervals}.", ""]
    for guard in result["guards"]:
        parts += [f"## {guard}, in short", "", *summary(result, guard).lines(), ""]
    for name in result["config"]["sets"]:
        parts += [f"## {name} ({result['sets'][name]['rows']} rows)", "", *set_table(result, name).lines(), ""]
        parts += [f"- {line}" for line in map(compared, result["comparisons"][name])] + [""]
    for guard, measured in result["guards"].items():
        if any(measured["robustness"].values()):
            parts += [f"## {guard} under attack", "", *attack_table(measured["robustness"]).lines(), ""]
    if (spent := cost_table(result)).rows:
        parts += ["## What they cost", "", *spent.lines(), ""]
    for name in paper_tables(result):
        entry = paper()["tables"][name]
        parts += [f"## The paper's table on {entry['title']}", "", entry["note"], RUN_ROW, ""]
        parts += [*paper_table(result, name).lines(), ""]
    if (categories := category_table(result)).rows:
        parts += ["## By category", "", *categories.lines(), ""]
    if any(guard["answers"] for guard in result["guards"].values()):
        parts += ["## Answers to harmful rows", "", *answer_table(result).lines(), ""]
    return "\n".join(parts)


def summary(result: Mapping[str, Any], guard: str) -> Table:
    """One guard on every set: a line each, beside what the paper reported for its own model on that set.

    The interval is that of the set's headline figure: weighted F1, or with one label only the recall or the false
    alarms."""
    head = [
        "set",
        "rows",
        "weighted F1",
        "recall",
        "false alarms",
        "95% interval",
        "AUROC",
        "the paper's 7B (reported)",
    ]
    rows = []
    for name, figures in result["guards"][guard]["sets"].items():
        cells = figures["cells"]
        safe, unsafe = (any(cells[f"{label}/{said}"] for said in ("safe", "unsafe", "none")) for label in LABELS)
        low, high = figures["intervals"][headline(figures)]
        reported = [row for row in paper()["tables"].get(name, {"rows": []})["rows"] if row["system"] == "Ours"]
        rows.append(
            [
                name,
                str(figures["rows"]),
                number(figures["weighted_f1"]) if safe and unsafe else "",
                number(figures["unsafe_recall"]) if unsafe else "",
                number(figures["fpr"]) if safe else "",
                f"{low:.3f}–{high:.3f}",
                number(figures.get("auroc")),
                f"{reported[0]['weighted'][2]:.2f}" if reported else "",
            ]
        )
    return Table(head, rows)


def set_table(result: Mapping[str, Any], name: str) -> Table:
    """Guards on one set in the columns of the paper's tables, with the paper's own rows below where it has them."""
    head = [
        "guard",
        "Safe P/R/F1",
        "Unsafe P/R/F1",
        "Weighted P/R/F1",
        "weighted F1 interval",
        "AUPRC",
        "AUROC",
        "ECE",
        "FPR",
        "errors",
    ]
    rows = []
    for guard, measured in result["guards"].items():
        figures = measured["sets"].get(name)
        if figures is None:
            continue
        low, high = figures["intervals"]["weighted_f1"]
        rows.append(
            [
                guard,
                *(
                    triple(figures[f"{group}_{figure}"] for figure in ("precision", "recall", "f1"))
                    for group in ("safe", "unsafe", "weighted")
                ),
                f"{low:.3f}–{high:.3f}",
                *(_with_interval(figures, key) for key in ("auprc", "auroc", "ece")),
                number(figures["fpr"]),
                str(figures["errors"]),
            ]
        )
    return Table(head, rows)


def main_table(result: Mapping[str, Any]) -> Table:
    """Every guard on every set: weighted F1, where a set has one label only its recall or its false alarms."""
    rows = []
    for name in result["config"]["sets"]:
        measured = [guard["sets"].get(name) for guard in result["guards"].values()]
        figure = headline(next(figures for figures in measured if figures))
        cells = []
        for figures in measured:
            if figures:
                low, high = figures["intervals"][figure]
                cells.append(f"{figures[figure]:.3f}<br>{low:.3f}–{high:.3f}")
            else:
                cells.append("")
        rows.append([name, str(result["sets"][name]["rows"]), HEADLINES[figure], *cells])
    return Table(["set", "rows", "figure", *result["guards"]], rows)


HEADLINES = {"weighted_f1": "weighted F1", "unsafe_recall": "recall", "fpr": "false alarms"}
"""Figures a set is best told by, and their names."""


def headline(figures: Mapping[str, Any]) -> str:
    """The one of HEADLINES that a set's labels allow."""
    counts = [sum(figures["cells"][f"{label}/{said}"] for said in (*LABELS, "none")) for label in LABELS]
    return "weighted_f1" if all(counts) else "fpr" if counts[0] else "unsafe_recall"


def language_table(result: Mapping[str, Any]) -> Table:
    """Sets that differ only in language ("xstest", "xstest.ko") side by side, and what a guard loses between them."""
    rows = []
    for base, others in translations(result["config"]["sets"]).items():
        for guard, measured in result["guards"].items():
            for other in others:
                pair = [measured["sets"].get(name) for name in (base, other)]
                if None not in pair:
                    figure = headline(pair[0]) if headline(pair[0]) == headline(pair[1]) else "unsafe_recall"
                    first, second = (one[figure] for one in pair)
                    cells = (f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")
                    rows.append([guard, f"{base} / {other}", HEADLINES[figure], *cells])
    return Table(["guard", "sets", "figure", "first", "second", "difference"], rows)


def translations(names: Sequence[str]) -> dict[str, list[str]]:
    """Sets by the one they are a translation of, as their names tell ("NAME.ko", "NAME_ko" of "NAME" or "NAME.en")."""
    found: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"[._][a-z]{2}$", "", name)
        base = next((one for one in (stem, f"{stem}.en") if one in names and one != name), None)
        if base and not name.endswith(".en"):
            found.setdefault(base, []).append(name)
    return found


def compared(pair: Mapping[str, Any]) -> str:
    """Two guards on one set, row by row."""
    first, second = pair["guards"]
    low, high = pair["interval"]
    p = pair["mcnemar_p"]
    return (
        f"{first} against {second}: weighted F1 {pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}); "
        f"McNemar's p {'below 0.001' if p < 0.001 else f'{p:.3f}'}"
    )


def attack_table(robustness: Mapping[str, Mapping[str, Any]]) -> Table:
    """Difference of weighted F1 to the plain queries, and the change of false alarms, per attack, strength and set."""
    attacks = list(dict.fromkeys(attack for measured in robustness.values() for attack in measured))
    rows = []
    for attack in attacks:
        strengths = dict.fromkeys(one for measured in robustness.values() for one in measured.get(attack, {}))
        for strength in strengths:
            cells = [measured.get(attack, {}).get(strength) for measured in robustness.values()]
            rows.append([f"{attack}, {strength}", *("" if cell is None else _drop(cell) for cell in cells)])
    return Table(["attack", *(f"{name}: weighted F1 (95%), false alarms" for name in robustness)], rows)


def _drop(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{cell['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {cell['fpr']:.3f}"


def cost_table(result: Mapping[str, Any]) -> Table:
    """Start, latency, throughput and memory of guards that run here, and what the others' endpoints counted."""
    rows = []
    for guard, measured in result["guards"].items():
        for usage in measured["usage"]:
            latency = ["" if usage[key] is None else f"{usage[key]:.0f}" for key in ("p50_ms", "p99_ms")]
            counts = (str(usage[key]) for key in ("requests", "cached", "retries", "failures"))
            tokens = f"{usage['input_tokens']} + {usage['output_tokens']}"
            rows.append([f"{guard} ({usage['url']})", "", *latency, "", "", *counts, tokens, f"{usage['dollars']:.2f}"])
        if "costs" in measured:
            one = measured["costs"]
            times = f"{one['start_s']:.2f}", f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}"
            rows.append([guard, *times, f"{one['rows_per_s']:.0f}", f"{one['memory_mb']:.0f}", *[""] * 6])
    head = ["guard", "start, s", "p50, ms", "p99, ms", "rows/s", "memory, MB", "requests", "cached", "retries"]
    head += ["failures", "tokens in + out", "dollars"]
    told = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return Table([head[column] for column in told], [[row[column] for column in told] for row in rows])


def review_table(result: Mapping[str, Any]) -> str:
    """Two sides' answers by rules, by a chat model and by people: one table."""
    config, checks = result["config"], result["checks"]
    rows = [
        [
            "checks",
            "share that passes all",
            *(f"{checks[side]['passed']:.1%}" for side in ("first", "second")),
            "",
            "",
            "",
        ],
    ]
    for who, said in result["choices"].items():
        for name, tally in said.items():
            lead = "" if tally["lead"] is None else f"{tally['lead']:+.2f} ({_range(tally['interval'], '+.2f')})"
            counts = (str(tally[key]) for key in ("first", "second", "tie", "unjudged"))
            rows.append([who, name, *counts, lead])
    head = ["by", "of", "first better", "second better", "tie", "not judged", "first's lead (95%)"]
    parts = [
        "# Answers compared",
        "",
        f"Measured by `haechi review`: {result['pairs']} harmful rows of {config['set']}; first: `{config['first']}`, "
        f"second: `{config['second']}`.",
        "",
        *Table(head, rows).lines(),
        "",
    ]
    for side, checked in checks.items():
        problems = ", ".join(f"{problem} {count}" for problem, count in sorted(checked["problems"].items()))
        parts.append(f"- {side}: checks not passed: {problems or 'none'}")
    for who, agreed in result["agreement"].items():
        for name, one in agreed.items():
            kappa = "not defined" if one["kappa"] is None else f"{one['kappa']:.2f}"
            parts.append(f"- {who} on {name}: {one['of']}'s kappa {kappa} over {one['pairs']} pairs")
    return "\n".join([*parts, ""])


def _range(interval: Sequence[float], form: str) -> str:
    return " to ".join(format(end, form) for end in interval)


def ablation_tables(result: Mapping[str, Any]) -> str:
    """A table per question: means over seeds with 95% t-intervals, and paired differences to the first variant."""
    config = result["config"]
    parts = [
        "# Ablations",
        "",
        f"Measured by `haechi ablate`, seeds {', '.join(map(str, config['seeds']))}: mean ± half of the 95% t-interval "
        "over seeds; below it in brackets the difference to the first line, paired by seed.",
        "",
    ]
    head = ["variant", *config["figures"], "parameters", "ms per query", "minutes"]
    for question in result["questions"]:
        rows = []
        for variant in question["variants"]:
            cells = [variant["figures"][name] for name in config["figures"]]
            size, latency, minutes = (variant[key] for key in ("parameters", "latency_ms", "minutes"))
            lacking = {"failed": len(variant["failed"]), "not run": variant["missing"]}
            rows.append(
                [
                    variant["name"] + "".join(f" ({count} {what})" for what, count in lacking.items() if count),
                    *(f"{_spread(cell)}{_difference(cell['difference'])}" for cell in cells),
                    "" if size is None else f"{size / 1e6:.1f}M",
                    "" if latency is None else f"{latency:.2f}",
                    "" if minutes is None else f"{minutes:.0f}",
                ]
            )
        failures = [f"- {variant['name']}: {text}" for variant in question["variants"] for text in variant["failed"]]
        parts += [f"## {question['text']}", "", *Table(head, rows).lines(), "", *failures, *([""] if failures else [])]
    return "\n".join(parts)


def _spread(cell: Mapping[str, float | None], sign: str = "") -> str:
    if cell["mean"] is None:
        return ""
    return f"{cell['mean']:{sign}.3f}" + ("" if cell["half"] is None else f" ± {cell['half']:.3f}")


def _difference(cell: Mapping[str, float | None] | None) -> str:
    return f"<br>({_spread(cell, '+')})" if cell and cell["mean"] is not None else ""


def category_table(result: Mapping[str, Any]) -> Table:
    """Recall on unsafe rows / FPR on safe rows, over the sets that use the policy's categories."""
    sets = [name for name in result["config"]["sets"] if name.startswith("policy_test")]
    rows = []
    for guard, measured in result["guards"].items():
        groups = [measured["sets"].get(name, {}).get("by_category", {}) for name in sets]
        codes = sorted({code for group in groups for code in group})
        for code in codes:
            cells = [group.get(code, {}) for group in groups]
            rows.append([guard, code, *(f"{number(cell.get('recall'))} / {number(cell.get('fpr'))}" for cell in cells)])
    return Table(["guard", "category", *(f"{name} recall / FPR" for name in sets)], rows)


def answer_table(result: Mapping[str, Any]) -> Table:
    """How many answers pass the checks (`haechi.answers.problems`), and what fails."""
    rows = []
    for guard, measured in result["guards"].items():
        for name, figures in measured["answers"].items():
            problems = (
                ", ".join(f"{problem} {count}" for problem, count in sorted(figures["problems"].items())) or "none"
            )
            said = f"{figures['answers']} of {figures['harmful']}"
            rows.append([guard, name, said, _with_interval(figures, "passed"), problems])
    return Table(["guard", "set", "answers", "all checks passed", "problems"], rows)


def _with_interval(figures: Mapping[str, Any], key: str) -> str:
    """A figure and its 95% interval; empty where it does not exist."""
    if figures.get(key) is None:
        return ""
    low, high = figures[f"{key}_interval"]
    return f"{number(figures[key])} ({number(low)}–{number(high)})"
