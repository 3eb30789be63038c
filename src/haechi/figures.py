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
    figure, ((axes,),) = _canvas(8, 4.8)
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


def ablation_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Every question's variants: each seed a dot, the mean with its 95% interval, the first one's mean dotted."""
    questions, names = result["questions"], result["config"]["figures"]
    heights = [len(question["variants"]) + 1 for question in questions]
    figure, grid = _canvas(
        3.2 + 2.6 * len(names), 0.34 * sum(heights), len(questions), len(names), height_ratios=heights, sharex="col"
    )
    for line, question in zip(grid, questions, strict=True):
        for column, (axes, name) in enumerate(zip(line, names, strict=True)):
            for row, variant in enumerate(question["variants"]):
                cell = variant["figures"][name]
                values = [value for value in cell["values"] if value is not None]
                axes.plot(values, [row] * len(values), ".", color="0.6", markersize=5)
                if cell["mean"] is not None:
                    axes.errorbar(cell["mean"], row, xerr=cell["half"], fmt="|", color="C0", capsize=2, markersize=11)
            first = question["variants"][0]["figures"][name]["mean"]
            if first is not None:
                axes.axvline(first, color="0.5", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(question["variants"])))
            axes.set_yticklabels([variant["name"] for variant in question["variants"]] if column == 0 else [])
            axes.set_ylim(len(question["variants"]) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.25)
        line[0].set_title(question["text"], loc="left", fontsize=9)
    for axes, name in zip(grid[-1], names, strict=True):
        axes.set_xlabel(name)
    save(figure, path)


def size_plot(path: Path, result: Mapping[str, Any], question: str) -> None:
    """Quality over the number of parameters, a panel per figure, latency written beside each point."""
    names = result["config"]["figures"]
    (asked,) = (one for one in result["questions"] if one["name"] == question)
    figure, grid = _canvas(3.4 * len(names), 3.2, 1, len(names))
    for axes, name in zip(grid[0], names, strict=True):
        points = [
            (one["parameters"] / 1e6, one["figures"][name], one["latency_ms"])
            for one in asked["variants"]
            if one["parameters"] and one["figures"][name]["mean"] is not None
        ]
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [size for size, _, _ in points],
            [cell["mean"] for _, cell, _ in points],
            yerr=[cell["half"] or 0 for _, cell, _ in points],
            marker="o",
            capsize=3,
        )
        for size, cell, latency in points:
            axes.annotate(f"{latency:.1f} ms", (size, cell["mean"]), (4, -11), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set(xlabel="million parameters", ylabel=name)
        axes.grid(alpha=0.25)
    save(figure, path)


def _canvas(width: float, height: float, rows: int = 1, columns: int = 1, **ratios: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("eval", "drawing a figure") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **ratios)


def save(figure: Any, path: Path) -> None:
    """Write a figure. Raises ConfigError for a suffix that names no picture format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot draw {path}: {str(error).splitlines()[0]}") from None
