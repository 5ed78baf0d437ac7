"""A small plot made of HTML and SVG: lines stretch with the page, words and dots keep their size.

All coordinates are shares of the plot: x from 0 (left) to 1 (right), y from 0 (bottom) to 1 (top).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["Plot"]

Point = tuple[float, float]


class Plot:
    """Collects marks and writes them.

    Args:
        label: What the picture shows, for those who do not see it.
    """

    def __init__(self, label: str):
        self.label = label
        self._shapes: list[str] = []
        self._words: list[str] = []

    def band(self, left: float, right: float, name: str) -> None:
        """Shade a part from top to bottom."""
        self._shapes.append(
            f'<rect class="{name}" x="{left * 100:.3f}" y="0" width="{(right - left) * 100:.3f}" height="100"/>'
        )

    def level(self, y: float, text: str) -> None:
        """Draw a horizontal rule with its tick label."""
        self._shapes.append(f'<line class="level" x1="0" x2="100" y1="{_down(y)}" y2="{_down(y)}"/>')
        self._words.append(f'<span class="tick" style="top:{_down(y)}%">{escape(text)}</span>')

    def line(self, points: Sequence[Point], name: str) -> None:
        """Draw a line through points."""
        if len(points) > 1:
            path = " ".join(f"{x * 100:.3f},{_down(y)}" for x, y in points)
            self._shapes.append(f'<polyline class="{name}" points="{path}"/>')

    def dot(self, point: Point, name: str, title: str = "") -> None:
        """Set a round dot."""
        hint = f' title="{escape(title)}"' if title else ""
        self._words.append(
            f'<span class="dot {name}" style="left:{point[0] * 100:.3f}%;top:{_down(point[1])}%"{hint}></span>'
        )

    def word(self, point: Point, text: str, name: str) -> None:
        """Write a word centred at a point."""
        self._words.append(
            f'<span class="word {name}" style="left:{point[0] * 100:.3f}%;top:{_down(point[1])}%">{escape(text)}</span>'
        )

    def markup(self) -> str:
        """Return the HTML of the plot."""
        shapes, words = "".join(self._shapes), "".join(self._words)
        return (
            f'<div class="plot" role="img" aria-label="{escape(self.label)}"><div class="field">'
            f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
            f"{words}</div></div>"
        )


def _down(y: float) -> str:
    """SVG and CSS count from the top."""
    return f"{(1.0 - y) * 100:.3f}"
