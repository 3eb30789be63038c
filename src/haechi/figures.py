"""Figures from results, drawn with matplotlib; the suffix of the file decides its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haechi import metrics
from haechi.errors import ConfigError, MissingExtra
from haechi.modelfolder import Point


def sweep_plot(path: Path, truth: npt.NDArray[np.bool_], score: metrics.Array, points: Mapping[str, Point]) -> None:
    """Precision, recall, false alarms and weighted F1 at every threshold, the operating points marked."""
    figure, axes = _canvas(8, 4.8)
    cuts, counts = metrics.sweep(truth, score)
    figures = metrics.scores(counts)
    for name, key, style in (
        ("precision", "unsafe_precision", "-"),
        ("recall", "unsafe_recall", "-"),
        ("weighted F1", "weighted_f1", "-"),
        ("false alarms (share of safe rows)", "fpr", "--"),
    ):
        axes.plot(cuts, figures[key], style, label=name, linewidth=1.6)
    for name, point in points.items():
        axes.axvline(point.threshold, color="0.35", linewidth=1, linestyle=":")
        axes.annotate(
            f"{name} {point.threshold:.2f}",
            (point.threshold, 1.01),
            rotation=30,
            fontsize=8,
            xycoords=("data", "axes fraction"),
        )
    axes.set(xlabel="threshold on P(unsafe)", ylabel="share", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("eval", "drawing a figure") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: Any, path: Path) -> None:
    """Write a figure. Raises ConfigError for a suffix that names no picture format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot draw {path}: {str(error).splitlines()[0]}") from None
