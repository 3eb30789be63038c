"""A table before anyone has decided how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A head and rows of cells; `<br>` breaks a line within a cell."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """As Markdown, first column left, others right."""
        lines = [f"| {' | '.join(self.head)} |", f"|---|{'---:|' * (len(self.head) - 1)}"]
        return lines + [f"| {' | '.join(row)} |" for row in self.rows]


def number(value: float | None) -> str:
    """A figure with three decimals; empty for None."""
    return "" if value is None else f"{value:.3f}"


def triple(values: Iterable[float]) -> str:
    """Precision, recall and F1 in one cell, two decimals each as in the paper."""
    return " / ".join(f"{value:.2f}" for value in values)
