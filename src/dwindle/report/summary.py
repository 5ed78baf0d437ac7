"""What a run found, as values: the form that the page is made from, and that ``summary.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dwindle.config.errors import FileFormatError

__all__ = ["FORMAT", "Figure", "Row", "RunSummary", "RuntimeFigures", "SeedRun"]

FORMAT = "dwindle-summary-1"


@dataclass(frozen=True)
class Figure:
    """One figure of one model: its value for each seed, and their mean.

    Attributes:
        values: One value a seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest value."""
        return max(self.values) - min(self.values)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Figure | None:
        """Return the figure, or None when a seed lacks it."""
        known = [float(value) for value in values if value is not None]
        return cls(tuple(known)) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class RuntimeFigures:
    """One model in one runtime.

    Attributes:
        p50: Median milliseconds of one forward pass, one value a seed.
        p90: Nine of ten calls are faster.
        score: Accuracy (or agreement with the original) in this runtime.
        parity: Share of answers equal to those of the model in torch (the simulation, for int8).
        different: Answers that are not equal.
        simulated: Torch only simulates this model's numbers, so its time says nothing.
        failure: Why it does not run there, or None.
    """

    p50: Figure | None = None
    p90: Figure | None = None
    score: Figure | None = None
    parity: Figure | None = None
    different: Figure | None = None
    simulated: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """One model: the original, or what a stage made of it.

    Attributes:
        label: Name of the stage.
        kind: Kind of the stage; ``original`` for the first.
        title: What to call it before people.
        parameters: How many numbers it has learned.
        macs: Multiply-accumulates a sample.
        bytes: Size of its file.
        bytes_of: Which file: ``onnxruntime`` (ONNX), ``openvino``, ``safetensors``.
        accuracy: On the test data, in torch (simulated, for int8).
        agreement: Share of answers equal to the original's.
        peak_activation_bytes: Largest number of bytes of activations alive at one time.
        runtimes: By runtime.
    """

    label: str
    kind: str
    title: str
    parameters: Figure | None
    macs: Figure | None
    bytes: Figure | None
    bytes_of: str | None
    accuracy: Figure | None
    agreement: Figure | None
    peak_activation_bytes: Figure | None = None
    runtimes: dict[str, RuntimeFigures] = field(default_factory=dict)

    def score(self, metric: str) -> Figure | None:
        """The figure that the run is judged by."""
        return self.accuracy if metric == "accuracy" else self.agreement


@dataclass(frozen=True)
class SeedRun:
    """The records of the stages of one seed, in order.

    Attributes:
        seed: The seed.
        stages: Each has ``kind``, ``label``, ``settings``, ``seconds`` and ``result``.
    """

    seed: int
    stages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class RunSummary:
    """Everything the page shows.

    Attributes:
        name: The recipe's name.
        title: Heading.
        description: A sentence or two, or None.
        metric: ``accuracy``, or ``agreement`` where there are no labels.
        model: Name of the model.
        data: Name of the data.
        samples: Test answers that were compared.
        rows: The models, the original first.
        seeds: The records behind them.
        recipe_text: The recipe file.
        versions: Of dwindle, torch and the runtimes.
        machine: Cores, threads, instruction set.
        batch_size: Samples a timed forward pass, or None when nothing was timed.
        threads: Threads of each runtime while it was timed; None: its own choice.
    """

    name: str
    title: str
    description: str | None
    metric: Literal["accuracy", "agreement"]
    model: str
    data: str
    samples: int
    rows: tuple[Row, ...]
    seeds: tuple[SeedRun, ...]
    recipe_text: str
    versions: dict[str, str]
    machine: dict[str, str]
    batch_size: int | None = None
    threads: int | None = None

    @property
    def original(self) -> Row:
        """The model before."""
        return self.rows[0]

    @property
    def final(self) -> Row:
        """The model after everything."""
        return self.rows[-1]

    def table(self) -> list[dict[str, Any]]:
        """The figures that are the same whenever the recipe is run: everything but times."""
        table = []
        for row in self.rows:
            values = asdict(row)
            for figures in values["runtimes"].values():
                del figures["p50"], figures["p90"]
            table.append(values)
        return table

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunSummary:
        """Return the summary that :meth:`to_json` wrote.

        Raises:
            FileFormatError: It is something else.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise FileFormatError(f"this is not the summary of a run (no format {FORMAT!r})")
        fields = {key: value for key, value in values.items() if key != "format"}
        try:
            fields["rows"] = tuple(_row(row) for row in fields["rows"])
            fields["seeds"] = tuple(SeedRun(s["seed"], tuple(s["stages"])) for s in fields["seeds"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"the summary of the run is damaged: {error}") from error


def _figure(value: Any) -> Figure | None:
    return None if value is None else Figure(tuple(value["values"]))


def _row(values: Mapping[str, Any]) -> Row:
    figures = ("parameters", "macs", "bytes", "accuracy", "agreement", "peak_activation_bytes")
    runtimes = {
        name: RuntimeFigures(
            **{key: _figure(entry[key]) for key in ("p50", "p90", "score", "parity", "different")},
            simulated=entry["simulated"],
            failure=entry["failure"],
        )
        for name, entry in values["runtimes"].items()
    }
    return Row(**{**values, **{key: _figure(values[key]) for key in figures}, "runtimes": runtimes})
