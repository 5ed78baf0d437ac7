"""``dw.sparsify``: makes zeros in linear layers real where that is measured to be faster, and says where not."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Target, history
from dwindle.config.errors import ConfigError, RealizeError
from dwindle.pruning.masks import tied_targets
from dwindle.realize.module_places import ModulePlaces
from dwindle.realize.sparse_linear import BLOCKS, SparseLinear, block_density, from_description
from dwindle.training.linear_layers import input_of, is_linear_layer, to_matrix
from dwindle.training.progress import tracked

_MOST = 0.5
"""Layers (and blocks) that hold a larger share than this are not tried: no layout was ever faster on those."""


@dataclass(frozen=True)
class SparseRow:
    """What was found of one layer that holds zeros.

    Attributes:
        name: Path of the layer.
        kind: Its class.
        zeros: Share of its weights that are zero.
        milliseconds: Time of one call in each form that was tried (``"dense"``, ``"csr"``, ``"bsr16"``, ...).
        chosen: The form it has now.
        reason: Why it stays dense; empty when it does not.
    """

    name: str
    kind: str
    zeros: float
    milliseconds: dict[str, float]
    chosen: str
    reason: str = ""

    @property
    def gain(self) -> float:
        """How many times faster it is than before."""
        if self.chosen == "dense" or not self.milliseconds:
            return 1.0
        return self.milliseconds["dense"] / self.milliseconds[self.chosen]


@dataclass
class SparseResult:
    """The model, layer by layer.

    Attributes:
        model: The model itself, some of its layers replaced by :class:`SparseLinear`.
        rows: One for each layer that holds zeros.
        milliseconds: Time of the whole model, ``"before"`` and ``"after"``.
        max_difference: Largest difference of the outputs, over the largest output.
    """

    model: nn.Module
    rows: list[SparseRow] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    max_difference: float = 0.0

    def summary(self) -> str:
        """Return a readable account, with what the zeros brought and where they brought nothing."""
        real = [row for row in self.rows if row.chosen != "dense"]
        lines = [f"{len(real)} of {len(self.rows)} layers with zeros are sparse now"]
        for row in self.rows:
            tried = ", ".join(f"{form} {ms:.3f} ms" for form, ms in row.milliseconds.items())
            said = f"{row.chosen}, {row.gain:.2f} times as fast" if not row.reason else f"dense: {row.reason}"
            lines.append(
                f"  {row.name} ({row.kind}, {row.zeros:.0%} zeros): {said}{f' ({tried})' if tried else ''}"
            )
        if self.milliseconds:
            before, after = self.milliseconds["before"], self.milliseconds["after"]
            lines.append(
                f"the model: {before:.3f} ms before, {after:.3f} ms after ({before / after:.2f} times as fast)"
            )
        if real:
            lines.append("ONNX Runtime and OpenVINO gain nothing from zeros; dw.densified(model) goes there")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data (without the model)."""
        return {
            "layers": [{**asdict(row), "gain": row.gain} for row in self.rows],
            "milliseconds": self.milliseconds,
            "max_difference": self.max_difference,
        }


def sparsify(
    model: nn.Module,
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    least_gain: float = 1.1,
    rounds: int = 15,
    tolerance: float = 1e-4,
) -> SparseResult:
    """Replace linear layers that hold many zeros by sparse ones, where that is faster on this machine, in place.

    Each layer is timed as it is and in torch's CSR and BSR layouts, on inputs of the size that the example inputs
    give it, the forms taking turns. What is not faster stays as it is, and the result says why: convolutions, N:M
    patterns and scattered zeros bring nothing on a CPU. The stored numbers are the same to the bit.

    Args:
        model: The model, on the CPU, with zeros in its weights and no masks on them (:func:`dwindle.realize` makes
            masks permanent). Used for inference afterwards.
        example_inputs: A tensor or a tuple of positional inputs, of the batch size the model will be used with.
        example_kwargs: Keyword inputs.
        least_gain: A layer is replaced when it gets at least so many times faster.
        rounds: Calls of each form; the fastest counts, as it is the one that nothing else disturbed.
        tolerance: Largest difference of the outputs, over the largest output, that rounding may cause.

    Raises:
        ConfigError: Masks are still attached, or an argument is not valid.
        RealizeError: The outputs changed; the model is as it was.
    """
    if least_gain < 1 or rounds < 1:
        raise ConfigError("least_gain must be at least 1 and rounds at least 1")
    masked = simulate.simulated_targets(model)
    if masked:
        raise ConfigError(
            f"{next(iter(masked))} has a mask or another simulator; make it permanent first with dw.realize"
        )
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    result = SparseResult(model)
    parents = ModulePlaces(model)

    def run() -> Any:
        return model(*args, **kwargs)

    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            sizes, before = _observed(model, run)
            original = _fastest({"model": run}, 3)["model"]
            candidates = _layers_with_zeros(model)
            found = {}
            for name, layer in tracked(list(candidates.items()), "sparse layers"):
                row, replacement = _try(model, name, layer, sizes.get(name), least_gain, rounds)
                result.rows.append(row)
                if replacement is not None:
                    found[name] = replacement
            try:
                for name, replacement in found.items():
                    parents.put(name, replacement)
                result.max_difference = _difference(before, _tensors(run()))
                if result.max_difference > tolerance:
                    raise RealizeError(
                        f"with sparse layers the outputs differ by {result.max_difference:.2g} of the largest; "
                        "the model is unchanged"
                    )
            except BaseException:
                for name in found:
                    parents.put(name, candidates[name])
                raise
            result.milliseconds = {"before": original, "after": _fastest({"model": run}, 3)["model"]}
    finally:
        for module, training in flags:
            module.training = training
    if found:
        layers = {name: layer.description() for name, layer in found.items()}
        history.record(model, {"kind": "sparsify", "layers": layers})
    return result


def densified(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose sparse layers are dense again, for runtimes that know no sparse layers.

    Args:
        model: A model with :class:`SparseLinear` layers; not changed.
    """
    dense = copy.deepcopy(model)
    places = ModulePlaces(dense)
    for name, module in list(dense.named_modules()):
        if isinstance(module, SparseLinear):
            places.put(name, module.to_linear())
    return dense


def replay_sparse(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put empty sparse layers where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The model before that step, changed in place.
        entry: The step of its history.

    Raises:
        FileFormatError: The entry does not fit the model.
    """
    places = ModulePlaces(model)
    for name, description in entry["layers"].items():
        layer = from_description(description)
        old = model.get_submodule(name)
        sizes = (layer.out_features, layer.in_features)
        if not is_linear_layer(old) or tuple(_numbers(old)[0].shape) != sizes:
            raise ConfigError(
                f"{name} is no linear layer of {layer.in_features} and {layer.out_features} features"
            )
        places.put(name, layer.train(old.training))
    return model


def _layers_with_zeros(model: nn.Module) -> dict[str, nn.Module]:
    """Return linear layers with at least one zero in ten weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and is_linear_layer(module)
        and float((module.get_parameter("weight") == 0).float().mean()) >= 0.1
    }


def _observed(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, tuple[int, ...]], list[Tensor]]:
    """Run the model; return the shape of the input of each linear layer, and the outputs."""
    sizes: dict[str, tuple[int, ...]] = {}

    def look(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = input_of(args, kwargs)
            if given is not None:
                sizes.setdefault(name, tuple(given.shape))

        return keep

    handles = [
        module.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, module in model.named_modules()
        if is_linear_layer(module)
    ]
    try:
        return sizes, _tensors(run())
    finally:
        for handle in handles:
            handle.remove()


def _try(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    shape: tuple[int, ...] | None,
    least_gain: float,
    rounds: int,
) -> tuple[SparseRow, SparseLinear | None]:
    """Time a layer in all its forms; return what was found, and the sparse layer when it is faster."""
    matrix, bias = _numbers(layer)
    zeros = float((matrix == 0).float().mean())
    kind = type(layer).__name__
    reason = _unfit(model, name, layer, shape, zeros)
    if reason or shape is None:
        return SparseRow(name, kind, zeros, {}, "dense", reason), None
    sparse: dict[str, SparseLinear] = {}
    if 1 - zeros <= _MOST:
        sparse["csr"] = SparseLinear(matrix, bias, layout="csr")
    for block in BLOCKS:
        if block_density(matrix, block) <= _MOST:
            sparse[f"bsr{block}"] = SparseLinear(matrix, bias, layout="bsr", block=block)
    x = torch.randn(shape, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    forms = {form: partial(own, x) for form, own in {"dense": layer, **sparse}.items()}
    times = _fastest(forms, rounds)
    best = min(times, key=lambda form: times[form])
    gain = times["dense"] / times[best]
    if best == "dense" or gain < least_gain:
        reason = "no layout is faster" if best == "dense" else f"{best} is only {gain:.2f} times as fast"
        return SparseRow(name, kind, zeros, times, "dense", reason), None
    if not torch.equal(sparse[best].weight, matrix):
        raise RealizeError(f"{name}: the layout {best} does not give its weights back")
    return SparseRow(name, kind, zeros, times, best), sparse[best].train(layer.training)


def _numbers(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the matrix (of the first group) and the bias of a linear layer."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    return to_matrix(layer, weight.detach())[0].contiguous(), None if bias is None else bias.detach()


def _unfit(model: nn.Module, name: str, layer: nn.Module, shape: tuple[int, ...] | None, zeros: float) -> str:
    """Return why a layer is not tried; empty when it is."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "torch has no sparse convolution, so its zeros are multiplied like other numbers"
    if shape is None:
        return "the forward does not call it (its weight may be read directly)"
    matrix, _ = _numbers(layer)
    if matrix.device.type != "cpu" or matrix.dtype not in (torch.float32, torch.float64):
        return f"sparse kernels are for float32 on the CPU, this is {matrix.dtype} on {matrix.device.type}"
    if Target(name, "weight") in tied_targets(model):
        return "its weight is shared with another layer"
    if _is_two_of_four(matrix):
        return "2:4 patterns have a kernel on GPUs only"
    if 1 - zeros > _MOST and min(block_density(matrix, block) for block in BLOCKS) > _MOST:
        return "too few zeros: sparse layouts gain from about 80 % on, or from whole blocks"
    return ""


def _is_two_of_four(matrix: Tensor) -> bool:
    if matrix.shape[1] % 4:
        return False
    return bool(((matrix != 0).reshape(len(matrix), -1, 4).sum(2) == 2).all())


def _fastest(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the shortest time of each, in milliseconds; they take turns, so that a disturbance meets all."""
    best = dict.fromkeys(forms, float("inf"))
    for number in range(rounds + 1):
        for name, run in forms.items():
            begin = time.perf_counter()
            run()
            if number:  # the first round warms up
                best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
    return best


def _tensors(output: Any) -> list[Tensor]:
    """Return the floating tensors in an output, copied."""
    if isinstance(output, Tensor):
        return [output.clone()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference of outputs over the largest output."""
    largest = max((float(tensor.abs().max()) for tensor in before if tensor.numel()), default=0.0)
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return difference / max(largest, 1e-30)
