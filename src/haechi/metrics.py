"""Pure functions from labels and verdicts to figures. A row without a verdict is never right: it lowers recall."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from haechi.errors import MissingExtra
from haechi.schema import Verdict

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
CELLS = ("safe/safe", "safe/unsafe", "safe/none", "unsafe/safe", "unsafe/unsafe", "unsafe/none")
"""Label and verdict of a row, in the order of a count vector."""


class Said(NamedTuple):
    """What a guard said of every row, in columns, so that a million rows are nine megabytes."""

    unsafe: npt.NDArray[np.int8]
    """[rows] 1 unsafe, 0 safe, -1 no verdict."""
    score: Array
    """[rows] probability of unsafe; NaN where there is none."""
    named: bool = False
    """Whether any verdict is known to name a category."""

    @classmethod
    def of(cls, verdicts: Iterable[tuple[bool | None, float | None]]) -> Said:
        """Columns of `unsafe, score` pairs."""
        unsafe, score = array("b"), array("d")
        for said, probability in verdicts:
            unsafe.append(-1 if said is None else said)
            score.append(np.nan if probability is None else probability)
        return cls(np.frombuffer(unsafe, np.int8), np.frombuffer(score, np.float64))

    @classmethod
    def from_verdicts(cls, verdicts: Iterable[Verdict]) -> Said:
        """Columns of verdicts."""
        return cls.of((verdict.unsafe, verdict.score) for verdict in verdicts)

    def cut(self, threshold: float) -> Said:
        """Unsafe from this score on; a row that had no verdict, or has no score, has none."""
        lacking = (self.unsafe < 0) | np.isnan(self.score)
        return self._replace(unsafe=np.where(lacking, -1, self.score >= threshold).astype(np.int8))


def cells(truth: Bools, said: Said) -> Array:
    """How many rows fall in each of CELLS; `truth` is [rows], whether the label is unsafe."""
    return np.bincount(_placed(truth, said), minlength=len(CELLS)).astype(np.float64)


def _placed(truth: Bools, said: Said) -> npt.NDArray[np.int64]:
    """Each row's number in CELLS."""
    return np.where(truth, 3, 0) + np.where(said.unsafe < 0, 2, said.unsafe)


def scores(counts: Array) -> dict[str, Array]:
    """Precision, recall and F1 for safe, unsafe and their average weighted by rows; FPR: safe rows called unsafe.

    `counts` is [..., 6] in the order of CELLS; each result is [...]. 0/0 counts as 0.
    """
    ss, su, sn, us, uu, un = np.moveaxis(counts, -1, 0)
    result: dict[str, Array] = {}
    rows = {"safe": ss + su + sn, "unsafe": us + uu + un}
    for name, hit, called in (("safe", ss, ss + us), ("unsafe", uu, uu + su)):
        precision, recall = _ratio(hit, called), _ratio(hit, rows[name])
        result |= {
            f"{name}_precision": precision,
            f"{name}_recall": recall,
            f"{name}_f1": _ratio(2 * precision * recall, precision + recall),
        }
    total = rows["safe"] + rows["unsafe"]
    for figure in ("precision", "recall", "f1"):
        weighed = sum(result[f"{name}_{figure}"] * rows[name] for name in rows)
        result[f"weighted_{figure}"] = _ratio(np.asarray(weighed), total)
    result["fpr"] = _ratio(su, rows["safe"])
    return result


def _ratio(over: Array, under: Array) -> Array:
    return np.divide(over, under, out=np.zeros_like(np.asarray(over, np.float64)), where=np.asarray(under) > 0)


def interval(counts: Array, *, draws: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% bootstrap intervals of `scores`: resampling rows is a multinomial draw of the cell counts."""
    total = int(counts.sum())
    if not total:
        return {}
    sampled = np.random.default_rng(seed).multinomial(total, counts / total, size=draws).astype(np.float64)
    return {name: _middle(values) for name, values in scores(sampled).items()}


def compare(truth: Bools, ours: Said, theirs: Said, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Two guards on the same rows: weighted F1 of the first less that of the second, its 95% interval by a bootstrap
    that draws both verdicts of a row together, and the p of McNemar's exact test on which rows each got right."""
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise MissingExtra("eval", "comparing guards") from None
    width = len(CELLS)
    joint = np.bincount(_placed(truth, ours) * width + _placed(truth, theirs), minlength=width**2).astype(np.float64)
    sampled = np.random.default_rng(seed).multinomial(len(truth), joint / joint.sum(), size=draws)

    def difference(counts: Array) -> Array:
        table = counts.reshape(*counts.shape[:-1], width, width)
        return scores(table.sum(-1))["weighted_f1"] - scores(table.sum(-2))["weighted_f1"]

    right = np.array([cell in ("safe/safe", "unsafe/unsafe") for cell in CELLS])
    table = joint.reshape(width, width)
    only_ours, only_theirs = int(table[right][:, ~right].sum()), int(table[~right][:, right].sum())
    both = only_ours + only_theirs
    return {
        "difference": float(difference(joint)),
        "interval": _middle(difference(sampled.astype(np.float64))),
        "only_first_right": only_ours,
        "only_second_right": only_theirs,
        "mcnemar_p": float(binomtest(only_ours, both).pvalue) if both else 1.0,
    }


RANKING = ("ece", "auprc", "auroc", "recall_at_1_fpr")
"""What `ranking` gives; with rows of one label only the first."""

RECALL_AT = 0.01
"""The share of false alarms at which `ranking` gives the recall."""


def ranking(truth: Bools, score: Array, *, draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """ECE, and with two classes AUPRC, AUROC and the recall at 1% false alarms, each with a 95% bootstrap interval.

    Rows without a score (NaN) are left out; empty when none has one.
    """
    known = ~np.isnan(score)
    truth, score = truth[known], score[known]
    if not len(truth):
        return {}
    names = RANKING if truth.any() and not truth.all() else RANKING[:1]
    try:
        from sklearn.metrics import auc, average_precision_score, roc_curve
    except ImportError:
        raise MissingExtra("eval", "AUPRC and AUROC") from None

    # Rows of equal label and score are one row with a weight; a bootstrap draws weights.
    kinds = [np.unique(score[of], return_counts=True) for of in (~truth, truth)]
    score, weight = (np.concatenate(columns) for columns in zip(*kinds, strict=True))
    truth = np.arange(len(score)) >= len(kinds[0][0])

    def figures(weight: npt.NDArray[Any]) -> list[float]:
        error = expected_calibration_error(truth, score, weight)
        if len(names) == 1:
            return [error]
        false_alarms, recall, _ = roc_curve(truth, score, sample_weight=weight, drop_intermediate=False)
        return [
            error,
            average_precision_score(truth, score, sample_weight=weight),
            auc(false_alarms, recall),
            recall[false_alarms <= RECALL_AT].max(),
        ]

    rows = weight.sum()
    rng = np.random.default_rng(seed)
    sampled = (rng.multinomial(rows, weight / rows) for _ in range(draws))
    spread = np.array([figures(drawn) for drawn in sampled if len(names) == 1 or 0 < drawn[truth].sum() < rows])
    result: dict[str, Any] = {}
    for name, value, values in zip(names, figures(weight), spread.T, strict=True):
        result |= {name: float(value), f"{name}_interval": _middle(values)}
    return result


def curves(truth: Bools, score: Array, bins: int = 10) -> dict[str, Any]:
    """What figures are drawn from, each value rounded: `pr`, the best precision at recalls 0, 0.02 ... 1 or beyond (two
    classes only), and `calibration`, mean score, share of unsafe rows and rows of each score bin that has any."""
    known = ~np.isnan(score)
    truth, score = truth[known], score[known]
    result: dict[str, Any] = {}
    if not len(truth):
        return result
    place = np.minimum((score * bins).astype(int), bins - 1)
    result["calibration"] = [
        [round(float(score[at].mean()), 4), round(float(truth[at].mean()), 4), int(at.sum())]
        for at in (place == bin for bin in range(bins))
        if at.any()
    ]
    if truth.any() and not truth.all():
        figures = scores(sweep(truth, score)[1])
        recall, precision = figures["unsafe_recall"], np.maximum.accumulate(figures["unsafe_precision"])
        # Cuts ascend and recall falls: of those that reach a recall, the last has the best precision so far.
        result["pr"] = [
            round(float(precision[np.flatnonzero(recall >= step - 1e-12).max()]), 4) for step in np.linspace(0, 1, 51)
        ]
    return result


def expected_calibration_error(
    truth: Bools, score: Array, weight: npt.NDArray[Any] | None = None, bins: int = 10
) -> float:
    """Mean gap between score and share of unsafe rows over equal-width bins, weighted by rows (Guo et al. 2017).

    `weight` is how many rows each one stands for; one where it is None.
    """
    weight = np.ones(len(score)) if weight is None else weight
    place = np.minimum((score * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, (score - truth) * weight)).sum() / weight.sum())


def share_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share (Wilson 1927). Raises MissingExtra without scipy."""
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise MissingExtra("eval", "comparing guards") from None
    low, high = binomtest(hits, total).proportion_ci(method="wilson")
    return float(low), float(high)


def _middle(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def fit_temperature(truth: Bools, margins: Array) -> float:
    """The temperature that minimises the log loss of sigmoid(margin / T), by golden-section search over log T.

    `margins` are unsafe minus safe logits (Guo et al. 2017, "On Calibration of Modern Neural Networks").
    """
    sign = np.where(truth, 1.0, -1.0)

    def loss(log_t: float) -> float:
        return float(np.logaddexp(0, -sign * margins / np.exp(log_t)).mean())

    low, high, ratio = np.log(0.05), np.log(20.0), (np.sqrt(5) - 1) / 2
    for _ in range(60):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    return float(np.exp((low + high) / 2))


def sweep(truth: Bools, score: Array) -> tuple[Array, Array]:
    """Every cut that tells two scores apart, ascending, and the counts [cuts, 6] in the order of CELLS there."""
    edges = np.unique(score)
    cuts = np.concatenate([[edges[0]], (edges[1:] + edges[:-1]) / 2])
    counts = np.zeros((len(cuts), len(CELLS)))
    for missed, called, of in ((0, 1, ~truth), (3, 4, truth)):
        counts[:, missed] = np.searchsorted(np.sort(score[of]), cuts)
        counts[:, called] = of.sum() - counts[:, missed]
    return cuts, counts


def threshold_for_recall(truth: Bools, score: Array, recall: float) -> float:
    """The highest cut that calls at least this share of the unsafe rows unsafe."""
    cuts, counts = sweep(truth, score)
    return float(cuts[scores(counts)["unsafe_recall"] >= recall].max())


def threshold_for_false_alarms(truth: Bools, score: Array, share: float) -> float:
    """The lowest cut that calls at most this share of the safe rows unsafe; just above 1 where only none does."""
    cuts, counts = sweep(truth, score)
    return float(cuts[scores(counts)["fpr"] <= share].min(initial=np.nextafter(1, 2)))


def best_threshold(truth: Bools, score: Array) -> float:
    """The threshold of highest weighted F1; of equal neighbours the middle, so that it does not hug a row's score, and
    of several such stretches the longest."""
    cuts, counts = sweep(truth, score)
    # A few rows decide between neighbouring cuts; a running mean over 1% of them finds the plateau, not the spike.
    width = max(1, len(cuts) // 100) | 1
    smooth = np.convolve(scores(counts)["weighted_f1"], np.ones(width) / width, mode="same")
    best = np.flatnonzero(np.isclose(smooth, smooth.max()))
    stretches = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    return float(np.median(cuts[max(stretches, key=len)]))
