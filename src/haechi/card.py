"""What a model folder says of itself: its README and its operating points, from its sheet."""

from __future__ import annotations

from collections.abc import Mapping

from haechi.modelfolder import Point, Sheet
from haechi.table import Table, number


def point_table(points: Mapping[str, Point]) -> Table:
    """Operating points and what they measured where they were fitted."""
    head = ["point", "threshold", "precision", "recall", "false alarms", "weighted F1"]
    return Table(
        head,
        [
            [
                name,
                f"{point.threshold:.3f}",
                *(number(value) for value in (point.precision, point.recall, point.false_alarms, point.weighted_f1)),
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
        f"A Haechi guard: judges a query and gives the safeguard answer. Made from `{sheet.base}`, {sheet.precision}.",
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
        *point_table(sheet.points).lines(),
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
