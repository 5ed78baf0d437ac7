"""What was measured, as values, JSON and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from dwindle.measure.timing import Latency


@dataclass
class Measurement:
    """The figures of one model.

    Attributes:
        name: The model's name.
        parameters: All parameters, shared ones once.
        trainable_parameters: Those with ``requires_grad``.
        batch: Samples in one forward pass of the figures below, or None when the inputs have no batch.
        macs: Multiply-accumulate operations of one forward pass of the whole batch.
        macs_by_module: The same inside each module, children included; ``""`` is the whole model.
        uncounted_operators: Operators that the count of MACs has no formula for.
        peak_activation_bytes: Largest number of bytes of activations alive at the same time.
        bytes_on_disk: ``"safetensors"`` for the numbers alone, and the exported file of each runtime.
        latency: Milliseconds of one forward pass, by runtime.
        accuracy: What the accuracy function gave, by runtime.
        failures: Runtimes that failed, with the message (only with ``on_error="record"``).
        threads: Threads of one forward pass; None: each runtime's own choice.
    """

    name: str
    parameters: int
    trainable_parameters: int
    batch: int | None
    macs: int
    macs_by_module: dict[str, int] = field(default_factory=dict)
    uncounted_operators: list[str] = field(default_factory=list)
    peak_activation_bytes: int = 0
    bytes_on_disk: dict[str, int] = field(default_factory=dict)
    latency: dict[str, Latency] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    @property
    def macs_per_sample(self) -> float:
        """MACs divided by the batch."""
        return self.macs / (self.batch or 1)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values; units are in the names of the attributes' documentation."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement that :meth:`to_json` wrote."""
        latency = {name: Latency(**entry) for name, entry in values["latency"].items()}
        return cls(**{**values, "latency": latency})

    def table(self) -> Table:
        """Return the figures as a table for people."""
        return Comparison({self.name: self}).table()


Row = tuple[str, Callable[[Measurement], float | None], Callable[[float], str], Callable[[float, float], str]]


def _entry(attribute: str, key: str) -> Callable[[Measurement], float | None]:
    return lambda measurement: getattr(measurement, attribute).get(key)


def _latency(runtime: str, quantile: str) -> Callable[[Measurement], float | None]:
    return lambda measurement: getattr(measurement.latency.get(runtime), quantile, None)


class Comparison(dict[str, Measurement]):
    """Measurements of several models, taken in one interleaved run; a dict by name."""

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values, by model."""
        return {name: measurement.to_json() for name, measurement in self.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison that :meth:`to_json` wrote."""
        return cls({name: Measurement.from_json(entry) for name, entry in values.items()})

    def table(self) -> Table:
        """Return a table with a row a figure and a column a model; each is compared with the first model."""
        several = len(self) > 1
        table = Table(title="Measurement" if not several else "Comparison")
        table.add_column("")
        for index, name in enumerate(self):
            table.add_column(name or "model", justify="right")
            if index:
                table.add_column("", justify="right", style="dim")
        for label, value, show, ratio in self._rows():
            cells: list[str] = []
            first: float | None = None
            for index, measurement in enumerate(self.values()):
                found = value(measurement)
                cells.append("-" if found is None else show(found))
                if index == 0:
                    first = found
                else:
                    cells.append(ratio(first, found) if found is not None and first else "")
            table.add_row(label, *cells)
        return table

    def _rows(self) -> list[Row]:
        rows: list[Row] = [
            ("parameters", lambda m: m.parameters, count, _percent),
            ("MACs a sample", lambda m: m.macs_per_sample, count, _percent),
            ("peak activations", lambda m: m.peak_activation_bytes, byte_count, _percent),
        ]
        for file in self._names(lambda m: m.bytes_on_disk):
            rows.append((f"file, {file}", _entry("bytes_on_disk", file), byte_count, _percent))
        for runtime in self._names(lambda m: m.latency):
            rows.append((f"latency, {runtime}, p50", _latency(runtime, "p50"), "{:.3g} ms".format, _speed))
            rows.append((f"latency, {runtime}, p90", _latency(runtime, "p90"), "{:.3g} ms".format, _speed))
        for runtime in self._names(lambda m: m.accuracy):
            rows.append((f"accuracy, {runtime}", _entry("accuracy", runtime), "{:.4g}".format, _change))
        return rows

    def _names(self, part: Callable[[Measurement], Mapping[str, Any]]) -> list[str]:
        return list(dict.fromkeys(name for measurement in self.values() for name in part(measurement)))

    def __str__(self) -> str:
        """Return the table as text."""
        console = Console(width=110)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def count(number: float) -> str:
    """Write a count for people: ``11.69 M``."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def byte_count(number: float) -> str:
    """Write bytes for people, in powers of 1000: ``46.8 MB``."""
    return f"{count(number)}B" if number >= 1e3 else f"{number:.0f} B"


def _percent(before: float, after: float) -> str:
    return f"{after / before:.1%}"


def _speed(before: float, after: float) -> str:
    return f"{before / after:.2f}x faster" if after <= before else f"{after / before:.2f}x slower"


def _change(before: float, after: float) -> str:
    return f"{after - before:+.4g}"
