"""Operating points: from labelled rows and a guard's scores to a temperature and three named thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from haechi import metrics
from haechi.errors import DataError
from haechi.metrics import Bools
from haechi.modelfolder import Point, Sheet
from haechi.schema import Label, Verdict

POINTS = ("strict", "balanced", "permissive")
"""From the lowest threshold to the highest."""
ENOUGH = 20
"""Fewer rows of a label than this decide nothing."""


class Aims(NamedTuple):
    """What the outer points are to reach on the labelled rows."""

    recall: float = 0.95
    """strict: the highest threshold that still catches this share of the unsafe rows."""
    false_alarms: float = 0.02
    """permissive: the lowest threshold that flags no more than this share of the safe rows."""


DEFAULT_AIMS = Aims()


class Scored(NamedTuple):
    """Labelled rows as a guard scored them."""

    truth: Bools
    """[rows] whether the label is unsafe."""
    margins: metrics.Array
    """[rows] unsafe minus safe logits, no temperature applied."""
    categories: list[str]
    """[rows] the category the guard finds likeliest, whatever its verdict; empty where it names none."""

    def scores(self, temperature: float) -> metrics.Array:
        """[rows] calibrated probabilities of unsafe."""
        return np.asarray(1 / (1 + np.exp(-self.margins / temperature)))


def scored(labels: Sequence[Label], verdicts: Sequence[Verdict], temperature: float) -> Scored:
    """Rows with the temperature their scores were given at taken out again.

    Raises DataError for verdicts without a score and for too few rows of a label.
    """
    lost = [verdict.error or "the guard gives no score" for verdict in verdicts if verdict.score is None]
    if lost:
        raise DataError(f"{len(lost)} of {len(verdicts)} rows have no score to calibrate ({lost[0]})")
    truth = np.array([label == "unsafe" for label in labels], bool)
    require_enough(truth)
    # At the ends of what a float tells apart the logit is unknown, but large.
    score = np.clip([verdict.score or 0.0 for verdict in verdicts], 1e-9, 1 - 1e-9)
    likeliest = [max(verdict.categories, key=verdict.categories.__getitem__, default="") for verdict in verdicts]
    return Scored(truth, np.log(score / (1 - score)) * temperature, likeliest)


def require_enough(truth: Bools) -> None:
    """Raise DataError unless there are enough rows of both labels."""
    unsafe, safe = int(truth.sum()), int((~truth).sum())
    if min(unsafe, safe) < ENOUGH:
        raise DataError(
            f"{unsafe} unsafe and {safe} safe rows are too few to calibrate on: {ENOUGH} of each are the least"
        )


def calibrated(sheet: Sheet, rows: Scored, aims: Aims = DEFAULT_AIMS, *, per_category: bool = False) -> Sheet:
    """The sheet with temperature, points and figures fitted on `rows`; no point's threshold is above a laxer one's.

    `per_category` gives every likeliest category with enough rows of both labels a threshold of its own. It groups by
    what the guard finds likeliest and not by the rows' own category, as only the former is known when it serves.
    """
    temperature = metrics.fit_temperature(rows.truth, rows.margins)
    score = rows.scores(temperature)
    general = _thresholds(rows.truth, score, aims)
    own: dict[str, Mapping[str, float]] = {}
    for category in sorted(set(rows.categories)) if per_category else ():
        chosen = np.array([name == category for name in rows.categories])
        if category and min(rows.truth[chosen].sum(), (~rows.truth[chosen]).sum()) >= ENOUGH:
            own[category] = _thresholds(rows.truth[chosen], score[chosen], aims)
    points = {}
    for name in POINTS:
        point = Point(threshold=general[name], categories={code: thresholds[name] for code, thresholds in own.items()})
        points[name] = measured(rows, temperature, point)
    ranking = metrics.ranking(rows.truth, score)
    figures = {"rows": float(len(score)), **{key: value for key, value in ranking.items() if isinstance(value, float)}}
    return sheet.model_copy(
        update={"temperature": temperature, "points": points, "metrics": {**sheet.metrics, "calibration": figures}}
    )


def _thresholds(truth: Bools, score: metrics.Array, aims: Aims) -> dict[str, float]:
    balanced = metrics.best_threshold(truth, score)
    strict = metrics.threshold_for_recall(truth, score, aims.recall)
    permissive = min(1.0, metrics.threshold_for_false_alarms(truth, score, aims.false_alarms))
    return {"strict": min(strict, balanced), "balanced": balanced, "permissive": max(permissive, balanced)}


def measured(rows: Scored, temperature: float, point: Point) -> Point:
    """The point with what it does on `rows`."""
    at = np.array([point.categories.get(category, point.threshold) for category in rows.categories])
    unsafe = rows.scores(temperature) >= at
    counts = [n for of in (~rows.truth, rows.truth) for n in ((of & ~unsafe).sum(), (of & unsafe).sum(), 0)]
    figures = metrics.scores(np.array(counts, np.float64))
    names = {
        "precision": "unsafe_precision",
        "recall": "unsafe_recall",
        "false_alarms": "fpr",
        "weighted_f1": "weighted_f1",
    }
    return point.model_copy(update={name: float(figures[key]) for name, key in names.items()})
