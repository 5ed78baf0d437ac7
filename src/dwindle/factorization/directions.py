"""A weight seen through few of its directions, while it is trained: what a low rank will leave of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dwindle.factorization.forms import LayerForm, method_for
from dwindle.factorization.tucker import unfolded
from dwindle.simulate.hard_concrete import expected_gate, hard_concrete, median_when_open

__all__ = ["GatedDirections", "gated_modes", "head_start", "principal_directions"]

_HEAD_START = 4.0


def gated_modes(form: LayerForm) -> tuple[int, ...]:
    """Return the modes of the kernel ``[out, in, ...]`` whose directions get gates.

    The smaller mode of a matrix (so that all directions together are the whole weight), both of a larger kernel: the
    ranks that SVD and Tucker-2 need.
    """
    if method_for(form) == "tucker":
        return (0, 1)
    return (0,) if form.outputs <= form.inputs else (1,)


def principal_directions(kernel: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of a mode, the directions with the most energy first.

    Args:
        kernel: ``[out, in, ...]``.
        mode: 0 or 1.

    Returns:
        ``[size, full rank]``, one direction a column, and the energy of each.
    """
    matrix = unfolded(kernel, mode)
    values, vectors = torch.linalg.eigh(matrix @ matrix.t())
    most = min(matrix.shape)
    return vectors.flip(1)[:, :most], values.flip(0)[:most].clamp(min=0)


def head_start(energies: Tensor) -> Tensor:
    """Return how much further open the gates of directions begin: 4 for the largest, 0 below ``exp(-4)`` of its energy.

    All gates are pushed alike, so without a reason in the task the small directions close first, as in an SVD.

    Args:
        energies: Largest first.
    """
    largest = energies[0].clamp(min=torch.finfo(energies.dtype).tiny)
    return (energies / largest).clamp(min=math.exp(-_HEAD_START)).log() + _HEAD_START


class GatedDirections(nn.Module):
    """Multiplies the directions of a weight's modes by gates: ``U diag(g) U' W`` for each mode.

    With all gates open the weight is what it was; with r open gates of a mode it has rank r there. The weight itself is
    trained within the open directions.

    Args:
        bases: Orthonormal columns ``[size, directions]``, one for each mode.
        modes: Of the kernel ``[out, in, ...]``.
        log_alphas: Where the gates begin, ``[directions]`` for each mode.
        transposed: The weight is ``[in, out]``.

    Attributes:
        sampling: Whether gates are drawn in training; otherwise they are plain factors.
    """

    def __init__(
        self,
        bases: Sequence[Tensor],
        modes: Sequence[int],
        log_alphas: Sequence[Tensor],
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.modes, self.transposed = tuple(modes), transposed
        self.sampling = True
        self.gates = nn.ParameterList()
        for number, (basis, log_alpha) in enumerate(zip(bases, log_alphas, strict=True)):
            like = basis if basis.dtype.itemsize >= 4 else basis.float()
            self.register_buffer(f"basis_{number}", basis)
            self.register_buffer(f"noise_{number}", like.new_zeros(basis.shape[1]), persistent=False)
            self.register_buffer(f"open_{number}", like.new_ones(basis.shape[1]))
            self.gates.append(nn.Parameter(log_alpha.to(like)))

    def factors(self, number: int) -> Tensor:
        """Return the gates of one mode as they act now."""
        gate = self.gates[number]
        if not self.sampling:
            return gate * self._held("open", number)
        return hard_concrete(gate, self._held("noise", number)) if self.training else expected_gate(gate)

    def _held(self, name: str, number: int) -> Tensor:
        held: Tensor = self._buffers[f"{name}_{number}"]  # type: ignore[assignment]
        return held

    def draw(self, noises: Sequence[Tensor]) -> None:
        """Renew the noise of each mode."""
        for number, noise in enumerate(noises):
            self._held("noise", number).copy_(noise)

    def ranks(self) -> tuple[int, ...]:
        """Return how many directions of each mode are open."""
        return tuple(int(self._held("open", number).sum()) for number in range(len(self.modes)))

    def close(self, numbers: Sequence[Tensor]) -> None:
        """Make the gates final: the given directions go, the gates of the others become plain factors.

        Args:
            numbers: For each mode which directions stay, boolean.
        """
        with torch.no_grad():
            for number, stay in enumerate(numbers):
                gate = self.gates[number]
                gate.copy_(torch.where(stay, median_when_open(gate), 0))
                self._held("open", number).copy_(stay)
        self.sampling = False

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the weight through its gates, of the same shape and dtype."""
        kernel = tensor.t() if self.transposed else tensor
        for number, mode in enumerate(self.modes):
            basis = self._held("basis", number).to(kernel.dtype)
            gate = self.factors(number).to(kernel.dtype)
            rows = kernel.movedim(mode, 0)
            seen = basis @ (gate[:, None] * (basis.t() @ rows.reshape(rows.shape[0], -1)))
            kernel = seen.reshape(rows.shape).movedim(0, mode)
        return kernel.t() if self.transposed else kernel

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"modes {self.modes}, rank {'x'.join(map(str, self.ranks()))}"
