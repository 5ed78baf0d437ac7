"""Writes figures for people."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "milliseconds_text", "percent_text", "points_text", "times_text"]


def count_text(number: float) -> str:
    """``308074`` as ``308 k``; three digits that count."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size * 0.9995:
            return f"{_three(number / size)}{unit}"
    return _three(number)


def bytes_text(number: float) -> str:
    """``116908`` as ``117 kB``, in powers of 1000."""
    return f"{count_text(number)}B" if number >= 999.5 else f"{number:.0f} B"


def milliseconds_text(number: float) -> str:
    """``0.1552`` as ``0.155 ms``."""
    return f"{_three(number)} ms"


def percent_text(share: float) -> str:
    """``0.98889`` as ``98.89 %``; only what is wholly so is called 100 %."""
    text = f"{share * 100:.2f}"
    if text == "100.00":
        return "100 %" if share == 1.0 else "99.99 %"
    return f"{text} %"


def points_text(change: float) -> str:
    """A change of a share in percentage points, with its sign."""
    points = change * 100
    if abs(points) < 0.005:
        return "±0.00 points"
    return f"{'+' if points > 0 else '−'}{abs(points):.2f} points"


def times_text(ratio: float) -> str:
    """``3.187`` as ``3.2×``; large ratios without decimals."""
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def _three(number: float) -> str:
    """Three significant digits, without an exponent."""
    magnitude = abs(number)
    if magnitude >= 99.95:
        return f"{number:.0f}"
    if magnitude >= 9.995:
        return f"{number:.1f}"
    if magnitude >= 0.9995 or magnitude == 0:
        return f"{number:.2f}"
    return f"{number:.3f}" if magnitude >= 0.0995 else f"{number:.3g}"
