"""Results files -> Markdown tables; no number is typed by hand. What the paper reported is marked as such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml

from haechi.modelfolder import Point, Sheet

LABELS = ("safe", "unsafe")
_GROUPS = (*LABELS, "weighted")


@cache
def paper() -> dict[str, Any]:
    """The paper's tables as facts."""
    text = (resources.files("haechi") / "data" / "paper.yaml").read_text(encoding="utf-8")
    facts: dict[str, Any] = yaml.safe_load(text)
    return facts


def tables(result: Mapping[str, Any]) -> str:
    """All tables of one evaluation."""
    parts = ["# Evaluation", "", "Measured by `haechi evaluate`; intervals are 95% bootstrap intervals.", ""]
    for guard in result["guards"]:
        parts += [f"## {guard}, in short", "", *summary(result, guard), ""]
    for name in result["config"]["sets"]:
        parts += [f"## {name} ({result['sets'][name]['rows']} rows)", "", *set_table(result, name), ""]
        parts += [*map(_compared, result["comparisons"][name]), ""]
    for guard, measured in result["guards"].items():
        if any(measured["robustness"].values()):
            parts += [f"## {guard} under attack", "", *_attack_table(measured["robustness"]), ""]
    parts += ["## What they cost", "", *cost_table(result), ""]
    for table in paper()["tables"]:
        parts += [*paper_table(result, table), ""]
    parts += ["## By category", "", *_category_table(result), ""]
    if any(guard["answers"] for guard in result["guards"].values()):
        parts += ["## Answers to harmful rows", "", *_answer_table(result), ""]
    return "\n".join(parts)


def summary(result: Mapping[str, Any], guard: str) -> list[str]:
    """One guard on every set: a line each, beside what the paper reported for its own model on that set."""
    head = [
        "set",
        "rows",
        "weighted F1",
        "95% interval",
        "recall",
        "false alarms",
        "AUROC",
        "the paper's 7B (reported)",
    ]
    rows = []
    for name, figures in result["guards"][guard]["sets"].items():
        cells = figures["cells"]
        safe, unsafe = (any(cells[f"{label}/{said}"] for said in ("safe", "unsafe", "none")) for label in LABELS)
        low, high = figures["intervals"]["weighted_f1"]
        reported = [row for row in paper()["tables"].get(name, {"rows": []})["rows"] if row["system"] == "Ours"]
        rows.append(
            [
                name,
                str(figures["rows"]),
                _number(figures["weighted_f1"]) if safe and unsafe else "",
                f"{low:.3f}–{high:.3f}" if safe and unsafe else "",
                _number(figures["unsafe_recall"]) if unsafe else "",
                _number(figures["fpr"]) if safe else "",
                _number(figures.get("auroc")),
                f"{reported[0]['weighted'][2]:.2f}" if reported else "",
            ]
        )
    return markdown(head, rows)


def set_table(result: Mapping[str, Any], name: str) -> list[str]:
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
        figures = measured["sets"][name]
        low, high = figures["intervals"]["weighted_f1"]
        rows.append(
            [
                guard,
                *(
                    _triple(figures[f"{group}_{figure}"] for figure in ("precision", "recall", "f1"))
                    for group in ("safe", "unsafe", "weighted")
                ),
                f"{low:.3f}–{high:.3f}",
                *(_number(figures.get(key)) for key in ("auprc", "auroc", "ece", "fpr")),
                str(figures["errors"]),
            ]
        )
    return markdown(head, rows)


def _compared(pair: Mapping[str, Any]) -> str:
    first, second = pair["guards"]
    low, high = pair["interval"]
    p = pair["mcnemar_p"]
    return (
        f"- {first} against {second}: weighted F1 {pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}); "
        f"McNemar's p {'below 0.001' if p < 0.001 else f'{p:.3f}'}"
    )


def _attack_table(robustness: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Difference of weighted F1 to the plain queries, and the change of false alarms, per attack, strength and set."""
    attacks = list(dict.fromkeys(attack for measured in robustness.values() for attack in measured))
    rows = []
    for attack in attacks:
        strengths = dict.fromkeys(one for measured in robustness.values() for one in measured.get(attack, {}))
        for strength in strengths:
            cells = [measured.get(attack, {}).get(strength) for measured in robustness.values()]
            rows.append([f"{attack}, {strength}", *("" if cell is None else _drop(cell) for cell in cells)])
    return markdown(["attack", *(f"{name}: weighted F1 (95%), false alarms" for name in robustness)], rows)


def _drop(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{cell['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {cell['fpr']:.3f}"


def cost_table(result: Mapping[str, Any]) -> list[str]:
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
    return markdown([*head, "failures", "tokens in + out", "dollars"], rows) if rows else ["Not timed."]


def paper_table(result: Mapping[str, Any], table: str) -> list[str]:
    """One of the paper's tables row for row: what it reported, and what its system's guard measured here on the set
    `data/paper.yaml` names; where it was not run, the command that would."""
    facts = paper()
    entry = facts["tables"][table]
    measured_on = entry["measured_on"]
    if measured_on not in result["config"]["sets"]:
        return []
    rows = []
    for row in entry["rows"]:
        spec = facts["guards"][row["system"]]
        ran = next((one for one in result["guards"].values() if one["spec"] == spec), None)
        figures = ran["sets"].get(measured_on) if ran else None
        here = (
            [_triple(figures[f"{group}_{figure}"] for figure in facts["columns"]) for group in _GROUPS]
            if figures
            else ["", "", f"not run: `haechi evaluate configs/evaluate/paper.yaml 'guards=[\"{spec}\"]'`"]
        )
        size = f" ({row['size']})" if "size" in row else ""
        rows.append([row["system"] + size, *(_triple(row[group]) for group in _GROUPS), *here])
    head = [
        "system",
        *(f"{group} P/R/F1, reported" for group in _GROUPS),
        *(f"{group} P/R/F1, measured here" for group in _GROUPS),
    ]
    return [f"## The paper's table on {entry['title']}", "", entry["note"], "", *markdown(head, rows)]


def point_table(points: Mapping[str, Point]) -> list[str]:
    """Operating points and what they measured where they were fitted."""
    head = ["point", "threshold", "precision", "recall", "false alarms", "weighted F1"]
    return markdown(
        head,
        [
            [
                name,
                f"{point.threshold:.3f}",
                *(_number(value) for value in (point.precision, point.recall, point.false_alarms, point.weighted_f1)),
            ]
            for name, point in points.items()
        ],
    )


def model_card(sheet: Sheet) -> str:
    """A README for the folder, made from its sheet."""
    policy = sheet.policy()
    language = policy.languages[0]
    lines = [
        f"# {sheet.name}",
        "",
        f"A Haechi guard: judges a query and writes the safeguard answer. Made from `{sheet.base}`, {sheet.precision}.",
        "",
        f"- policy: {policy.name}, version `{sheet.taxonomy_version}`, languages {', '.join(policy.languages)}",
        f"- attention: {sheet.template.attention}; window {sheet.template.window} tokens, "
        f"overlap {sheet.template.overlap}",
        "",
        "## Operating points",
        "",
        f"Fitted with a temperature of {sheet.temperature:.3f} on labelled rows that were not trained on; the figures "
        "are of those rows.",
        "",
        *point_table(sheet.points),
        "",
        "## Categories",
        "",
        *(f"- `{category.code}`: {category.definition[language]}" for category in policy.categories),
        "",
        "## Trained on",
        "",
        "| stage | data | SHA-256 of the rows |",
        "|---|---|---|",
        *(
            f"| {stage} | {data.get('rows') or data.get('text')} | {str(data.get('train', 'see haechi.json'))[:16]} |"
            for stage, data in sheet.trained_on.items()
        ),
        "",
        "## Where the points were fitted",
        "",
        "| measure | value |",
        "|---|---:|",
        *(f"| {name} | {value:.4f} |" for name, value in sheet.metrics.get("calibration", {}).items()),
        "",
        'Use: `haechi check --model FOLDER "query"`. Meant as one layer before a language model, not the only one; '
        "it judges single user queries in the policy's languages.",
        "",
    ]
    return "\n".join(lines)


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
        *markdown(head, rows),
        "",
    ]
    for side, checked in checks.items():
        problems = ", ".join(f"{problem} {count}" for problem, count in checked["problems"].items())
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
        parts += [f"## {question['text']}", "", *markdown(head, rows), "", *failures, *([""] if failures else [])]
    return "\n".join(parts)


def _spread(cell: Mapping[str, float | None], sign: str = "") -> str:
    if cell["mean"] is None:
        return ""
    return f"{cell['mean']:{sign}.3f}" + ("" if cell["half"] is None else f" ± {cell['half']:.3f}")


def _difference(cell: Mapping[str, float | None] | None) -> str:
    return f"<br>({_spread(cell, '+')})" if cell and cell["mean"] is not None else ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, first column left, others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _category_table(result: Mapping[str, Any]) -> list[str]:
    """Recall on unsafe rows / FPR on safe rows, over the sets that use the policy's categories."""
    sets = [name for name in result["config"]["sets"] if name.startswith("policy_test")]
    rows = []
    for guard, measured in result["guards"].items():
        codes = sorted({code for name in sets for code in measured["sets"][name]["by_category"]})
        for code in codes:
            cells = [measured["sets"][name]["by_category"].get(code, {}) for name in sets]
            rows.append(
                [guard, code, *(f"{_number(cell.get('recall'))} / {_number(cell.get('fpr'))}" for cell in cells)]
            )
    return markdown(["guard", "category", *(f"{name} recall / FPR" for name in sets)], rows) if sets else []


def _answer_table(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for guard, measured in result["guards"].items():
        for name, figures in measured["answers"].items():
            problems = (
                ", ".join(f"{problem} {count}" for problem, count in sorted(figures["problems"].items())) or "none"
            )
            rows.append(
                [guard, name, f"{figures['answers']} of {figures['harmful']}", _number(figures["passed"]), problems]
            )
    return markdown(["guard", "set", "answers written", "all checks passed", "problems"], rows)


def _triple(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
