"""What a weight-only quantized layer holds: packed levels, scales, zero points, and a factor for each input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle.quantization.weight_only.groups import GroupFormat, from_levels, merge, split
from dwindle.quantization.weight_only.packing import pack, packed_bytes, unpack


class PackedWeight(nn.Module):
    """A matrix of small integers in groups. As a simulator it takes the place of a layer's weight.

    Args:
        form: The groups and their levels.
        rows: Outputs of the layer.
        columns: Inputs of the layer.
        transposed: The layer holds its weight as ``[columns, rows]`` (Hugging Face's Conv1D).
        scaled_input: Leave room for ``input_factor``.

    Attributes:
        packed: uint8, ``[rows, bytes]``: the levels of a row as a stream of bits, groups filled up.
        scale: float32, ``[rows, count]``.
        packed_zero: uint8, ``[rows, bytes]``: zero points as a stream of bits; None when symmetric.
        input_factor: float32, ``[columns]``: what the inputs are multiplied with before the product (AWQ); None is one.
        error: Share of the layer's output (its sum of squares) that the rounding lost, where inputs were seen; of the
            weight itself otherwise.
    """

    packed: Tensor
    scale: Tensor
    packed_zero: Tensor | None
    input_factor: Tensor | None

    def __init__(
        self,
        form: GroupFormat,
        rows: int,
        columns: int,
        *,
        transposed: bool = False,
        scaled_input: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.rows, self.columns, self.transposed = form, rows, columns, transposed
        count, width = form.count(columns), form.width(columns)
        self.error: float | None = None
        self.register_buffer(
            "packed", torch.zeros(rows, packed_bytes(count * width, form.bits), dtype=torch.uint8)
        )
        self.register_buffer("scale", torch.ones(rows, count))
        zero = (
            None if form.symmetric else torch.zeros(rows, packed_bytes(count, form.bits), dtype=torch.uint8)
        )
        self.register_buffer("packed_zero", zero)
        self.register_buffer("input_factor", torch.ones(columns) if scaled_input else None)

    def store(self, levels: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take what a method found.

        Args:
            levels: ``[rows, columns]``, whole numbers.
            scale: ``[rows, count]``.
            zero_point: ``[rows, count]``.
        """
        self.packed = pack(split(levels, self.form).flatten(1), self.form.bits)
        self.scale = scale.float().contiguous()
        if not self.form.symmetric:
            self.packed_zero = pack(zero_point, self.form.bits)

    def levels(self) -> Tensor:
        """Return the levels in groups, uint8 ``[rows, count, width]``; what fills up the last group is 0."""
        count, width = self.form.count(self.columns), self.form.width(self.columns)
        return unpack(self.packed, self.form.bits, count * width).unflatten(-1, (count, width))

    def zero_point(self) -> Tensor:
        """Return the zero points, uint8 ``[rows, count]``."""
        if self.packed_zero is None:
            return torch.full_like(self.scale, self.form.middle, dtype=torch.uint8)
        return unpack(self.packed_zero, self.form.bits, self.scale.shape[1])

    def matrix(self) -> Tensor:
        """Return what the integers stand for, float32 ``[rows, columns]``: the weight for inputs times the factor."""
        values = from_levels(self.levels().float(), self.scale, self.zero_point().float())
        return merge(values, self.columns)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the matrix in the layout and the dtype of the layer's weight, whose own values do not matter."""
        matrix = self.matrix()
        if self.input_factor is not None:
            matrix = matrix * self.input_factor
        matrix = matrix.to(weight.dtype)
        return matrix.t() if self.transposed else matrix

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty one of: JSON values."""
        return {
            **self.form.to_json(),
            "rows": self.rows,
            "columns": self.columns,
            "transposed": self.transposed,
            "scaled_input": self.input_factor is not None,
            "error": self.error,
        }

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        kind = "symmetric" if self.form.symmetric else "affine"
        return f"{self.rows}, {self.columns}, {self.form.bits} bits, groups of {self.form.group_size}, {kind}"


def from_description(entry: dict[str, Any]) -> PackedWeight:
    """Return an empty matrix that the numbers can be loaded into.

    Args:
        entry: What :meth:`PackedWeight.description` gave.
    """
    form = GroupFormat(int(entry["bits"]), entry["group_size"], bool(entry["symmetric"]))
    made = PackedWeight(
        form,
        int(entry["rows"]),
        int(entry["columns"]),
        transposed=bool(entry["transposed"]),
        scaled_input=bool(entry["scaled_input"]),
    )
    made.error = entry["error"]
    return made
