"""Figures from results, drawn with matplotlib; the suffix of the file decides its format."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from haechi import metrics
from haechi.errors import ConfigError, MissingExtra
from haechi.modelfolder import Point
from haechi.report import HEADLINES, headline


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


class Sized(NamedTuple):
    """A model in a plot of quality over size."""

    size: float
    """Its place on the axis."""
    latency: float
    """Milliseconds of one query."""
    figures: Mapping[str, Mapping[str, Any]]
    """By name: `mean` (None: not measured) and `half`, half its interval."""


def size_plot(path: Path, label: str, models: Sequence[Sized]) -> None:
    """Quality over size, a panel per figure, latency written above each model; `label` says what the size is."""
    names = list(models[0].figures)
    columns = min(3, len(names))
    figure, grid = _canvas(3.6 * columns, 3.2 * -(-len(names) // columns), -(-len(names) // columns), columns)
    for axes, name in zip(grid.flat, names, strict=False):
        points = [(one, one.figures[name]) for one in sorted(models, key=lambda one: one.size)]
        points = [(one, cell) for one, cell in points if cell["mean"] is not None]
        axes.errorbar(
            [one.size for one, _ in points],
            [cell["mean"] for _, cell in points],
            yerr=[cell["half"] or 0 for _, cell in points],
            marker="o",
            capsize=3,
        )
        for one, _ in points:
            text, place = f"{one.latency:.1f} ms", (one.size, 1.02)
            axes.annotate(text, place, xycoords=("data", "axes fraction"), rotation=60, ha="center", fontsize=8)
        axes.set_xscale("log")
        axes.set(xlabel=label, ylabel=name)
        axes.grid(alpha=0.25)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    save(figure, path)


def forest_plot(result: Mapping[str, Any]) -> Any:
    """Every guard on every set by the figure the set's labels allow, with its 95% interval; a figure of matplotlib."""
    names, guards = result["config"]["sets"], list(result["guards"])
    figure, ((axes,),) = _canvas(8, 0.7 + len(names) * (0.14 + 0.11 * len(guards)))
    for number, guard in enumerate(guards):
        labelled = False
        shift = (number - (len(guards) - 1) / 2) * 0.8 / max(2, len(guards))
        for place, name in enumerate(names):
            figures = result["guards"][guard]["sets"].get(name)
            if figures is None:
                continue
            key = headline(figures)
            low, high = figures["intervals"][key]
            value = figures[key]
            axes.errorbar(
                value,
                place + shift,
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                fmt="o" if key == "weighted_f1" else "s" if key == "unsafe_recall" else "x",
                color=f"C{number}",
                markersize=5,
                capsize=2,
                label=None if labelled else guard,
            )
            labelled = True
    labels = [
        f"{name} ({HEADLINES[headline(next(g['sets'][name] for g in result['guards'].values() if name in g['sets']))]})"
        for name in names
    ]
    axes.set_yticks(range(len(names)), labels, fontsize=9)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def curve_plot(result: Mapping[str, Any], kind: str) -> Any | None:
    """A panel per set: precision over recall (`pr`, each guard's own threshold marked), or share of unsafe rows over
    score (`calibration`); None when no set has such curves."""
    names = [
        name
        for name in result["config"]["sets"]
        # A set of one label has neither curve.
        if any("pr" in guard["sets"].get(name, {}).get("curves", {}) for guard in result["guards"].values())
    ]
    if not names:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = _canvas(2.9 * columns, 2.7 * lines + 0.3, lines, columns, sharex=True, sharey=True)
    panels = [axes for line in grid for axes in line]
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        for number, (guard, measured) in enumerate(result["guards"].items()):
            figures = measured["sets"].get(name, {})
            curve = figures.get("curves", {}).get(kind)
            if curve is None:
                continue
            style = {"color": f"C{number}", "label": guard}
            if kind == "pr":
                axes.plot(np.linspace(0, 1, len(curve)), curve, linewidth=1.5, **style)
                axes.plot(figures["unsafe_recall"], figures["unsafe_precision"], "o", color=f"C{number}", markersize=4)
            else:
                score, share, _ = zip(*curve, strict=True)
                axes.plot(score, share, marker="o", markersize=3, linewidth=1.2, **style)
        if kind == "calibration":
            axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.25)
    figure.supxlabel("recall" if kind == "pr" else "score", fontsize=9)
    figure.supylabel("precision" if kind == "pr" else "share of unsafe rows", fontsize=9)
    drawn = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def heat_map(
    columns: Sequence[str],
    rows: Sequence[str],
    values: metrics.Array,
    *,
    worst: float,
    best: float,
    colors: str = "Reds",
) -> Any:
    """Values [rows, columns] as colours and numbers, NaN left blank; darkest at `worst`, white at `best`."""
    figure, ((axes,),) = _canvas(1.9 + 0.62 * len(columns), 0.9 + 0.26 * len(rows))
    badness = np.clip((np.ma.masked_invalid(values) - best) / (worst - best), 0, 1)
    axes.imshow(badness, cmap=colors, vmin=0, vmax=1.25, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not np.isnan(value):
                dark = badness[row, column] > 0.75
                text = f"{value:.2f}".replace("-0.00", "0.00")
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "0.15")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="left", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def svg(figure: Any) -> str:
    """A figure as the text of an SVG file: letters stay letters, equal figures are equal texts."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "haechi", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


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
