"""What an exhibit is: a cause, what was published against it, what removes it, and counts of all three."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["FIX", "OURS", "STOCK", "Exhibit", "Figure", "Row", "Series", "largest", "spread"]

STOCK, FIX, OURS = "stock", "published fix", "stablekern"


@dataclass(frozen=True)
class Row:
    """`bad` of `of` things went wrong in `case` when done by `name`; `who` is one of STOCK, FIX, OURS.

    `largest` is what the exhibit measures beside the count, of what is finite; None if nothing is, or nothing measured.
    """

    who: str
    name: str
    case: str
    bad: int
    of: int
    largest: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve; a point that is not finite is a gap in it, and counted by the rows."""

    who: str
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Figure:
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True)
class Exhibit:
    """`counted` says what is bad about a bad one, `measured` what `largest` is; `seconds` is filled by `zoo.run`."""

    name: str
    seen: str
    cause: str
    published: str
    remedy: str
    counted: str
    measured: str | None
    rows: tuple[Row, ...]
    figure: Figure
    seconds: float = 0.0

    def total(self, who: str) -> tuple[int, int]:
        """(bad, of) over all rows of STOCK, FIX or OURS."""
        rows = [row for row in self.rows if row.who == who]
        return sum(row.bad for row in rows), sum(row.of for row in rows)


def spread(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from `low` to `high` in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def largest(values: Iterable[float]) -> float | None:
    """The largest finite one."""
    return max((value for value in values if math.isfinite(value)), default=None)
