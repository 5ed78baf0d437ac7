"""``dw.quantize_weights``: small integers for the weights of linear layers, layer after layer."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import CaptureError, ConfigError, DwindleError, did_you_mean
from dwindle.config.history import record as record_history
from dwindle.config.targets import Target
from dwindle.quantization.free_scales import FreeScales, find_free_scales
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.simulation import is_quantized
from dwindle.quantization.weight_only.awq import awq_scale, output_error
from dwindle.quantization.weight_only.groups import GroupFormat, from_levels, merge, split
from dwindle.quantization.weight_only.methods import METHODS, WITH_DATA, Method, round_matrix
from dwindle.quantization.weight_only.packed_weight import PackedWeight, from_description
from dwindle.quantization.weight_only.statistics import InputSums, input_sums
from dwindle.quantization.weight_only.structure import Reading, free_units, readings
from dwindle.simulate import refuse_shards
from dwindle.simulate.attaching import (
    detach,
    disabled,
    register_simulator,
    simulated_targets,
    simulator_of,
)
from dwindle.training.inputs import batches_of, forward_inputs
from dwindle.training.linear_layers import is_linear_layer, to_matrix
from dwindle.training.model_pass import within_memory
from dwindle.training.progress import tracked

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightRow:
    """One quantized layer.

    Attributes:
        name: The module.
        bits: Bits of a level.
        group_size: Neighbours that share a scale; None is a row.
        error: Share of the layer's output (or, without data, of the weight) that was lost, as a sum of squares.
        stored_bytes: Bytes of levels, scales and zero points.
        float_bytes: Bytes of the float weight.
    """

    name: str
    bits: int
    group_size: int | None
    error: float | None
    stored_bytes: int
    float_bytes: int


def quantize_weights(
    model: nn.Module,
    bits: int = 4,
    group_size: int | None = 64,
    method: str = "rtn",
    *,
    data: Any = None,
    symmetric: bool = False,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    batches: int | None = None,
    adapt: Callable[[Any], Any] | None = None,
    act_order: bool = True,
    damping: float = 0.1,
    fit: bool = False,
    keep_zeros: bool = False,
    memory: int = 1 << 30,
    in_place: bool = False,
) -> nn.Module:
    """Quantize the weights of linear layers, and nothing else, to 2 to 8 bits in groups along the inputs.

    Activations stay float, so this makes a model smaller, and faster where reading weights is what takes the time:
    language models that give one token after the other. The result simulates the packed weights in its ordinary
    forward; ``dw.pack_weights`` makes them real in torch, ``dw.export`` writes them for ONNX Runtime and OpenVINO.

    Args:
        model: A float model.
        bits: Bits of a level, 2 to 8.
        group_size: Neighbours along the inputs that share a scale; None is one scale for each output.
        method: ``"rtn"`` rounds to nearest; ``"hqq"`` (half-quadratic) lets outliers count less, without data;
            ``"gptq"`` lets later columns make up for the error of earlier ones; ``"awq"`` rounds the columns of large
            inputs more finely. The last two need ``data``.
        data: Batches of inputs; labels are ignored. A few dozen windows of text are enough.
        symmetric: Fix the zero point in the middle.
        config_list: Other settings for single layers: ``quant_dtype`` (``"int3"`` symmetric, ``"uint4"`` affine,
            unless ``quant_scheme`` says otherwise; None leaves the layer in float) and ``granularity`` (``[1, 32]``,
            or ``"out_channel"``). Without it all Linear layers (and Hugging Face's Conv1D) are taken whose weight is no
            other module's too, such as an output layer tied to the embedding.
        batches: How many batches are used; None takes all.
        adapt: Applied to each batch first.
        act_order: For ``"gptq"``: columns of large inputs first, which nothing in the file or at run time pays for.
        damping: For ``"gptq"``: share of the mean of the diagonal of ``X X'`` that is added to it.
        fit: Choose ranges of least squared error instead of whole ones; slower, better at 2 and 3 bits.
        keep_zeros: For ``"gptq"``, which moves errors to weights that come later: leave those at zero that are exactly
            zero, such as what ``dw.realize`` left of masks. Zeros of masks that are still on the model always stay,
            and the other methods keep all zeros.
        memory: Bytes that the matrices ``X X'`` of one pass over the data may take; with less there are more passes,
            and later layers see the inputs that quantized layers give. No activation is kept.
        in_place: Change the model itself instead of a copy; after an error it is as it was.

    Returns:
        The simulated model, in evaluation mode.

    Raises:
        ConfigError: An argument is not valid, the model is quantized already, or the data end early.
        DwindleError: Weights or inputs are not finite.
    """
    refuse_shards(model, "dw.quantize_weights")
    if method not in METHODS:
        raise ConfigError(
            f"method {method!r} is not one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}"
        )
    if damping <= 0 or memory < 1:
        raise ConfigError("damping and memory must be above 0")
    if method in WITH_DATA and data is None:
        raise ConfigError(f"method {method!r} needs data: batches of inputs")
    forms = _chosen(model, config_list, GroupFormat(bits, group_size, symmetric))
    _check(model, forms)
    changed = model if in_place else copy.deepcopy(model)
    how = Method(method, act_order, damping, fit, keep_zeros)
    work = _Work(changed, forms, how, keep=in_place)
    try:
        with torch.no_grad():
            work.run(data, batches, adapt, memory)
    except BaseException:
        work.undo()
        raise
    layers = {name: own.description() for name, own in packed_weights(changed).items()}
    changed.eval()
    record_history(changed, {"kind": "quantize_weights", "method": method, "layers": layers})
    return changed


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the simulators of quantized weights by the names of their modules; empty for other models."""
    return {
        target.module: own
        for target, own in simulated_targets(model, "quantize").items()
        if isinstance(own, PackedWeight)
    }


def weight_rows(model: nn.Module) -> list[WeightRow]:
    """Return one row for each quantized layer, the worst first."""
    rows = [
        WeightRow(
            name,
            own.form.bits,
            own.form.group_size,
            own.error,
            own.stored_bytes,
            _parameter(model, f"{name}.weight").nbytes,
        )
        for name, own in packed_weights(model).items()
    ]
    return sorted(rows, key=lambda row: -(row.error or 0.0))


def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put empty packed weights where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The model before that step, changed in place.
        entry: The step of its history.
    """
    for name, description in entry["layers"].items():
        register_simulator(model, Target(name, "weight"), from_description(description), "quantize")
    return model


def _chosen(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]] | None, default: GroupFormat
) -> dict[str, GroupFormat]:
    """Return the layers and their formats.

    Raises:
        ConfigError: Nothing is left, or a setting does not fit.
    """
    if config_list is None:
        names = [name for name, module in model.named_modules() if _is_matrix(module)]
        shared = _shared(model)
        forms = {name: default for name in names if id(model.get_submodule(name).weight) not in shared}
    else:
        forms = _configured(model, config_list, default)
    if not forms:
        raise ConfigError("no linear layer is left to quantize")
    return forms


def _configured(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], default: GroupFormat
) -> dict[str, GroupFormat]:
    from dwindle.config import resolve

    found = {}
    for target, setting in resolve(model, config_list, kind="quantization").items():
        if target.name == "bias" or setting.quant_dtype is None:
            continue
        if target.name != "weight" or not _is_matrix(model.get_submodule(target.module)):
            raise ConfigError(
                f"{target}: quantize_weights takes the weights of Linear and Conv1D layers only; say "
                'target_names: ["weight"], or use dw.quantize'
            )
        parsed = NumberFormat.parse(setting.quant_dtype, setting.quant_scheme)
        form = replace(default, bits=(parsed.highest - min(parsed.lowest, 0)).bit_length())
        form = replace(form, symmetric=parsed.symmetric)
        found[target.module] = replace(form, group_size=_group_size(target, setting.granularity, default))
    return found


def _group_size(target: Target, granularity: Any, default: GroupFormat) -> int | None:
    if granularity == "default":
        return default.group_size
    if granularity in ("out_channel", "per_channel"):
        return None
    if isinstance(granularity, list | tuple) and len(granularity) == 2 and granularity[0] == 1:
        return None if granularity[1] == -1 else int(granularity[1])
    raise ConfigError(f"{target}: granularity {granularity!r}: groups are [1, size], or 'out_channel'")


def _is_matrix(module: nn.Module) -> bool:
    return is_linear_layer(module) and not isinstance(module, _CONVOLUTIONS)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter as the optimizer has it, whatever simulates it."""
    target = Target.parse(name)
    parameter = model.get_submodule(target.module)._parameters[target.name]
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _shared(model: nn.Module) -> set[int]:
    """Return the identities of parameters that stand in several places."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _check(model: nn.Module, forms: Mapping[str, GroupFormat]) -> None:
    if is_quantized(model):
        raise ConfigError("this model is quantized already; quantize the original instead")
    for name in forms:
        module = model.get_submodule(name)
        if simulator_of(model, Target(name, "weight"), "quantize") is not None:
            raise ConfigError(f"{name}.weight is quantized already; quantize the original instead")
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise ConfigError(f"{name}.weight is no plain floating-point parameter")
        if not weight.numel():
            raise ConfigError(f"{name}.weight is empty")
        if not bool(torch.isfinite(weight).all()):
            raise DwindleError(f"{name}.weight holds NaN or infinite values")


class _Work:
    """One run over the layers of a model."""

    def __init__(
        self, model: nn.Module, forms: Mapping[str, GroupFormat], method: Method, *, keep: bool
    ) -> None:
        self.model, self.forms, self.method, self.keep = model, forms, method, keep
        self.done: list[Target] = []
        self.before: dict[str, Tensor] = {}
        self.scales: FreeScales | None = None

    def undo(self) -> None:
        """Put everything back."""
        detach(self.model, keep_values=False, targets=self.done, stage="quantize")
        for name, value in self.before.items():
            _parameter(self.model, name).data.copy_(value)

    def run(self, data: Any, batches: int | None, adapt: Callable[[Any], Any] | None, memory: int) -> None:
        """Quantize every layer; layers that no module call reads are rounded without data."""
        left = list(self.forms)
        if self.method.name in WITH_DATA or (self.method.fit and data is not None):
            source = batches_of(data)
            if iter(source) is source:
                source = list(itertools.islice(source, batches))  # read several times
            first = next(iter(source), None)
            if first is None:
                raise ConfigError("data holds no batch")
            example = forward_inputs(self.model, first, adapt)
            order = readings(self.model, example, self.forms.keys())
            if self.method.name == "awq":
                with disabled(self.model), contextlib.suppress(CaptureError):
                    self.scales = find_free_scales(self.model, *example)
            for group in within_memory(order, self._bytes, memory):
                sums = input_sums(self.model, group, source, batches, adapt)
                for reading in tracked(group, f"{self.method.name}: layers"):
                    self._together(reading, sums.pop(reading.layers[0]))
            left = [name for name in left if Target(name, "weight") not in self.done]
        for name in tracked(left, f"{self.method.name}: layers"):
            self._layer(name, None)

    def _bytes(self, reading: Reading) -> int:
        columns = self._matrix(reading.layers[0]).shape[1]
        return 4 * columns * columns

    def _matrix(self, name: str) -> Tensor:
        """Return the weight as the model computes with it, ``[rows, columns]``."""
        module = self.model.get_submodule(name)
        weight: Tensor = getattr(module, "weight").detach()  # noqa: B009 (a simulator may compute it)
        return to_matrix(module, weight if weight.dtype == torch.float64 else weight.float())[0]

    def _together(self, reading: Reading, sums: InputSums) -> None:
        """Quantize the layers that read one tensor."""
        factor = None
        if self.method.name == "awq":
            matrices = [self._matrix(name) for name in reading.layers]
            hessian, magnitude = sums.hessian.to(matrices[0]), sums.magnitude.to(matrices[0])
            forms = [self.forms[name] for name in reading.layers]
            scale, power = awq_scale(matrices, hessian, magnitude, forms)
            if power and self._fold(reading, scale):
                sums.products /= (scale[:, None] * scale).to(sums.products)
            elif power:
                factor = 1 / scale
        for name in reading.layers:
            self._layer(name, sums.hessian, factor)

    def _layer(self, name: str, hessian: Tensor | None, factor: Tensor | None = None) -> None:
        """Round one layer and put the result on it."""
        module, form = self.model.get_submodule(name), self.forms[name]
        matrix = self._matrix(name)
        wanted = matrix if factor is None else matrix / factor
        if hessian is not None:
            hessian = hessian.to(matrix)
            own = hessian if factor is None else hessian * factor[:, None] * factor
        else:
            own = None
        masked = simulator_of(self.model, Target(name, "weight"), "mask") is not None
        zeros = wanted == 0 if masked or self.method.keep_zeros else None
        levels, scale, zero = round_matrix(wanted, form, self.method, own, zeros)
        rows, columns = matrix.shape
        transposed = not isinstance(module, nn.Linear)  # Hugging Face's Conv1D holds [in, out]
        packed = PackedWeight(form, rows, columns, transposed=transposed, scaled_input=factor is not None)
        packed.store(levels, scale, zero)
        if factor is not None:
            packed.input_factor = factor.float()
        new = merge(from_levels(split(levels, form), scale, zero), matrix.shape[1])
        packed.error = _lost(wanted, new, own)
        target = Target(name, "weight")
        register_simulator(self.model, target, packed.to(matrix.device), "quantize")
        self.done.append(target)

    def _fold(self, reading: Reading, scale: Tensor) -> bool:
        """Divide what makes the layers' input by the scale and multiply their weights; False where that cannot be."""
        units = None if self.scales is None else free_units(self.scales, reading)
        if self.scales is None or units is None:
            return False
        for name, own in [*self.scales.made.items(), *self.scales.read.items()]:
            if bool(torch.isin(own, units).any()):
                self._keep(name)
        factors = torch.ones(self.scales.count, dtype=torch.float64)
        factors[units] = 1 / scale.double().cpu()
        with disabled(self.model):
            self.scales.apply(self.model, factors)
        for name, own in self.scales.made.items():
            packed = simulator_of(self.model, Target.parse(name), "quantize")
            if isinstance(packed, PackedWeight):  # its rows make channels
                packed.scale.mul_(factors[own].reshape(-1, 1).to(packed.scale))
        return True

    def _keep(self, name: str) -> None:
        if self.keep and name not in self.before:
            self.before[name] = _parameter(self.model, name).detach().clone()


def _lost(old: Tensor, new: Tensor, hessian: Tensor | None) -> float:
    if hessian is None:
        lost, whole = (old - new).square().sum(), old.square().sum()
    else:
        lost, whole = output_error(old, new, hessian), output_error(old, torch.zeros_like(old), hessian)
    return float(lost / whole.clamp(min=torch.finfo(old.dtype).tiny))
