"""`haechi calibrate LABELLED`: refit a model's temperature and operating points on a user's own labelled queries."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from haechi.calibration import DEFAULT_AIMS, Aims, Scored, calibrated, measured, scored
from haechi.card import model_card, point_table
from haechi.errors import ConfigError, DataError, did_you_mean
from haechi.figures import sweep_plot
from haechi.guards.slm import SLM, load
from haechi.modelfolder import Sheet, default_model, write_sheet
from haechi.schema import Example
from haechi.sets import load_set, measured_only
from haechi.store import write_text


def run(
    labelled: str,
    *,
    model: Path | None = None,
    output: Path | None = None,
    aims: Aims = DEFAULT_AIMS,
    per_category: bool = False,
    plot: Path | None = None,
    report: Callable[[str], None] = print,
) -> Sheet:
    """Fit on a JSONL file of {"query", "label"} rows or a set by name; returns the new sheet.

    `output` gets a copy of the model with it, or the model's own folder is changed in place; without one nothing is.
    Raises DataError for an evaluation set, too few rows of a label, an unknown category, or rows without a score.
    """
    if measured_only(labelled):
        raise DataError(
            f"data set {labelled!r} is for measuring only: a model fitted to it could not be measured on it"
        )
    folder = model or default_model()
    in_place = output is not None and output.exists() and output.samefile(folder)
    if output is not None and output.exists() and not in_place:
        raise ConfigError(f"{output} exists already; name a new folder, or the model's own to change it in place")
    rows = [row for row in load_set(labelled) if row.label]
    guard = load(folder)
    if per_category:
        _require_known(guard, rows, labelled)
    verdicts = guard.check([row.query for row in rows])
    known = scored([row.label or "safe" for row in rows], verdicts, guard.sheet.temperature)
    sheet = calibrated(guard.sheet, known, aims, per_category=per_category)
    for line in _comparison(guard.sheet, sheet, known):
        report(line)
    if per_category:
        for line in _thresholds(sheet, guard.taxonomy.codes):
            report(line)
    if plot is not None:
        sweep_plot(plot, known.truth, known.scores(sheet.temperature), sheet.points)
        report(f"sweep in {plot}")
    if output is None:
        report("nothing written: --output FOLDER keeps a copy of the model with these points")
        return sheet
    if not in_place:
        shutil.copytree(folder, output)
    write_sheet(output, sheet)
    write_text(output / "README.md", model_card(sheet))
    report(f"model with these points in {output}")
    return sheet


def _require_known(guard: SLM, rows: Sequence[Example], labelled: str) -> None:
    codes = [*guard.taxonomy.codes, "general"]
    for row in rows:
        if row.category is not None and row.category not in codes:
            raise DataError(
                f"{labelled}: row {row.id!r} has the category {row.category!r}, which the model's policy lacks"
                f"{did_you_mean(row.category, codes)}"
            )


def _comparison(before: Sheet, after: Sheet, rows: Scored) -> list[str]:
    """The new points, and what the old ones do on the same rows."""
    old = {f"{name}, before": measured(rows, before.temperature, point) for name, point in before.points.items()}
    unsafe = int(rows.truth.sum())
    return [
        f"{unsafe} unsafe and {len(rows.truth) - unsafe} safe rows; temperature {after.temperature:.3f} "
        f"(before {before.temperature:.3f})",
        "",
        *point_table({**old, **after.points}).lines(),
        "",
    ]


def _thresholds(sheet: Sheet, codes: Sequence[str]) -> list[str]:
    """Each category's own thresholds; those with too few rows are told."""
    lines = []
    for code in codes:
        own = [
            f"{name} {point.categories[code]:.3f}" for name, point in sheet.points.items() if code in point.categories
        ]
        lines.append(f"{code}: {', '.join(own) or 'too few rows of a label, the general thresholds hold'}")
    return [*lines, ""]
