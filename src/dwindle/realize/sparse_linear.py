"""A linear layer whose zeros are not stored and not multiplied: torch's CSR and BSR layouts on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, FileFormatError

#: Sides of the square blocks that are tried; the kernels behind torch's BSR layout take squares only.
BLOCKS = (32, 16, 8, 4)

LAYOUTS = ("csr", "bsr")


class SparseLinear(nn.Module):
    """``y = x A' + b`` with A in a sparse layout; for inference on the CPU, in float32 or float64.

    Its numbers are plain dense tensors (``crow``, ``col``, ``values``, ``bias``), so they are saved, loaded and moved
    like any other. Code that reads ``.weight`` gets the dense matrix, made anew each time.

    Args:
        weight: The matrix with its zeros, ``[out, in]``; None leaves room for ``count`` blocks that will be loaded.
        bias: ``[out]`` or None.
        layout: ``"csr"`` or ``"bsr"``.
        block: Side of the blocks of ``"bsr"``; it divides both sizes.
        shape: Of the matrix, when there is no weight.
        count: Number of stored blocks (of entries, for CSR), when there is no weight.

    Raises:
        ConfigError: The layout is unknown, or the block does not divide the matrix.
    """

    values: Tensor
    crow: Tensor
    col: Tensor

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        layout: str = "csr",
        block: int = 1,
        shape: tuple[int, int] | None = None,
        count: int = 0,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ConfigError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
        sizes = tuple(weight.shape) if weight is not None else shape
        if sizes is None or any(size % block for size in sizes):
            raise ConfigError(f"blocks of {block} do not divide a matrix of shape {sizes}")
        self.out_features, self.in_features = sizes
        self.layout, self.block = layout, block if layout == "bsr" else 1
        crow, col, values = self._room(count) if weight is None else self._stored(weight.detach())
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)
        self.values = nn.Parameter(values, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._matrix: Tensor | None = None

    def _stored(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
            if self.layout == "csr":
                sparse = weight.to_sparse_csr()
            else:
                sparse = weight.contiguous().to_sparse_bsr((self.block, self.block))
        return sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values().contiguous()

    def _room(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        sides = () if self.layout == "csr" else (self.block, self.block)
        crow = torch.zeros(self.out_features // self.block + 1, dtype=torch.int32)
        return crow, torch.zeros(count, dtype=torch.int32), torch.zeros(count, *sides)

    @property
    def matrix(self) -> Tensor:
        """The matrix in its sparse layout; it shares memory with the stored numbers."""
        if self._matrix is None:
            kind = torch.sparse_csr if self.layout == "csr" else torch.sparse_bsr
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
                self._matrix = torch.sparse_compressed_tensor(
                    self.crow,
                    self.col,
                    self.values.detach(),
                    (self.out_features, self.in_features),
                    layout=kind,
                    check_invariants=False,
                )
        return self._matrix

    @property
    def weight(self) -> Tensor:
        """The dense matrix, ``[out, in]``."""
        return self.matrix.to_dense()

    @property
    def density(self) -> float:
        """Share of the matrix that is stored."""
        return self.values.numel() / max(self.out_features * self.in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x A' + b`` for ``x`` of shape ``[..., in]``."""
        columns = x.reshape(-1, self.in_features).t()
        # Sparse times dense columns: functional.linear with a sparse weight is up to nine times slower here.
        if self.bias is None:
            product = self.matrix @ columns
        else:
            product = torch.addmm(self.bias[:, None], self.matrix, columns)
        return product.t().reshape(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer with the same numbers."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.to(self.values).train(self.training)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.requires_grad_(False)

    def description(self) -> dict[str, Any]:
        """Return what :func:`from_description` makes an empty layer of: JSON values."""
        return {
            "layout": self.layout,
            "block": self.block,
            "shape": [self.out_features, self.in_features],
            "count": self.col.numel(),
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        blocks = f", blocks of {self.block}" if self.layout == "bsr" else ""
        return f"{self.in_features}, {self.out_features}, {self.layout}{blocks}, {self.density:.1%} stored"

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._matrix = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._matrix = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None}


def from_description(entry: Mapping[str, Any]) -> SparseLinear:
    """Return a layer with room for the numbers that are to be loaded.

    Raises:
        FileFormatError: The entry is none of :meth:`SparseLinear.description`.
    """
    try:
        rows, columns = (int(size) for size in entry["shape"])
        layout, block, count = str(entry["layout"]), int(entry["block"]), int(entry["count"])
        if min(rows, columns, block) < 1 or not 0 <= count <= rows * columns // block**2:
            raise ValueError(f"{count} blocks of {block} in a matrix of {rows} x {columns}")
        bias = torch.zeros(rows) if entry["bias"] else None
        return SparseLinear(None, bias, layout=layout, block=block, shape=(rows, columns), count=count)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise FileFormatError(f"this is no description of a sparse layer: {error}") from error


def block_density(weight: Tensor, block: int) -> float:
    """Return the share of square blocks that hold anything but zeros; 1.0 where the block does not divide."""
    if any(size % block for size in weight.shape):
        return 1.0
    rows, columns = (size // block for size in weight.shape)
    held = (weight != 0).reshape(rows, block, columns, block).any(3).any(1)
    return float(held.float().mean())
