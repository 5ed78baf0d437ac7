"""The runtimes a model can be run in: torch itself, ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean, require
from dwindle.graph.modes import in_mode
from dwindle.graph.nested_values import flatten
from dwindle.measure.runtime import PreparedModel, Runtime, Session
from dwindle.measure.structure import InputStructure


class TorchRuntime(Runtime):
    """Torch itself, eager, in evaluation mode and without gradients."""

    name = "torch"
    suffix = ""

    def check(self) -> None:
        """Torch is always there."""

    def export(self, model: nn.Module, structure: InputStructure, path: Path) -> list[Path]:
        """Nothing is written for torch."""
        return []

    def load(self, path: Path) -> Any:
        """Torch reads no model files here."""
        raise ConfigError("the torch runtime runs modules, not files; give the module itself")

    def session(
        self, model: nn.Module | str | Path, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Session:
        """Make a session of a module."""
        if not isinstance(model, nn.Module):
            return Session(self, self.load(Path(model)), None, None)
        return _TorchSession(self, model)

    def open(self, prepared: PreparedModel) -> Session:
        """Make a session of the module itself."""
        return _TorchSession(self, prepared.model)

    def feed(self, handle: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Take the tensors as keyword arguments."""
        return (), dict(tensors)

    def run(self, handle: Any, feed: Any) -> Any:
        """Run the module once; ``feed`` holds its positional and keyword arguments."""
        args, kwargs = feed
        with torch.inference_mode():
            return handle(*args, **kwargs)

    def tensors(self, result: Any) -> list[Tensor]:
        """Return the tensors of the result."""
        return [tensor for _, tensor in flatten(result)[0]]


class _TorchSession(Session):
    """A module, called as it is; each call is in evaluation mode and leaves the module as it was."""

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        super().__init__(runtime, module, None, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with in_mode(self._handle, training=False), torch.no_grad():
            return self._handle(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Return a function that runs the module; switching modes is left to the caller, for it costs
        time.
        """
        return lambda: self.runtime.run(self._handle, (args, kwargs))


def _arrays(tensors: Mapping[str, Tensor], wanted: Sequence[str], runtime: str) -> dict[str, Any]:
    """Return NumPy arrays under the names that a file asks for: by name, else by order."""
    if all(name in tensors for name in wanted):
        chosen = {name: tensors[name] for name in wanted}
    elif len(wanted) == len(tensors):
        chosen = dict(zip(wanted, tensors.values(), strict=True))
    else:
        raise ConfigError(f"the model in {runtime} takes the inputs {list(wanted)}, but got {list(tensors)}")
    result = {}
    for name, tensor in chosen.items():
        if tensor.dtype is torch.bfloat16:
            raise ConfigError(
                f"the input {name!r} is bfloat16, which NumPy (and so {runtime}) has not; use float32"
            )
        result[name] = tensor.detach().cpu().contiguous().numpy()
    return result


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU.

    Worker threads stop spinning when a run ends, so that a session does not slow down what is timed next to
    it.
    """

    name = "onnxruntime"

    def check(self) -> None:
        """Raise when ``onnxruntime`` or ``onnx`` is missing."""
        require("onnxruntime", "onnx")
        require("onnx", "onnx")

    def options(self) -> Any:
        """Return the options of a session."""
        options = require("onnxruntime", "onnx").SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options

    def load(self, path: Path) -> Any:
        """Open an ``.onnx`` file."""
        onnxruntime, options = require("onnxruntime", "onnx"), self.options()
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes are not importable by a stable name
            raise ConfigError(f"ONNX Runtime cannot load {path}: {error}") from error

    def feed(self, handle: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Make NumPy arrays by input name."""
        return _arrays(tensors, [entry.name for entry in handle.get_inputs()], "ONNX Runtime")

    def run(self, handle: Any, feed: Any) -> Any:
        """Run once; a list of NumPy arrays."""
        return handle.run(None, feed)

    def tensors(self, result: Any) -> list[Tensor]:
        """Make torch tensors."""
        return [torch.from_numpy(array.copy()) for array in result]


class OpenVinoRuntime(Runtime):
    """OpenVINO on the CPU.

    OpenVINO computes in bfloat16 or float16 by itself where the processor is fast at it, which is neither
    comparable with other runtimes nor the same on all machines. Here the default is float32;
    ``precision=None`` gives OpenVINO's own choice.

    Args:
        threads: Threads for one forward pass; None leaves it to OpenVINO.
        precision: ``"f32"``, ``"bf16"``, ``"f16"``, or None.
    """

    name = "openvino"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("f32", "bf16", "f16")

    def __init__(self, *, threads: int | None = None, precision: str | None = "f32") -> None:
        super().__init__(threads=threads)
        if precision is not None and precision not in self.PRECISIONS:
            raise ConfigError(
                f"precision {precision!r} is none of {', '.join(self.PRECISIONS)}, None"
                f"{did_you_mean(precision, self.PRECISIONS)}"
            )
        self.precision = precision

    @property
    def label(self) -> str:
        """``openvino``, or ``openvino:bf16`` and so on when the precision is not float32."""
        return self.name if self.precision == "f32" else f"{self.name}:{self.precision or 'default'}"

    def check(self) -> None:
        """Raise when ``openvino`` or ``onnx`` is missing."""
        require("openvino", "openvino")
        require("onnx", "onnx")

    def settings(self) -> dict[str, Any]:
        """Return the settings of a compiled model."""
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if self.precision is not None:
            config["INFERENCE_PRECISION_HINT"] = self.precision
        if self.precision == "f32":
            # Else the inputs of layers with packed weights are rounded to int8, on processors that are fast at it.
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = str(self.threads)
        return config

    def load(self, path: Path) -> Any:
        """Open an ``.onnx`` or ``.xml`` file."""
        openvino = require("openvino", "openvino")
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", self.settings())
        except Exception as error:  # each front end raises classes of its own
            raise ConfigError(f"OpenVINO cannot load {path}: {error}") from error
        return compiled.create_infer_request()

    def feed(self, handle: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Make NumPy arrays by input name."""
        return _arrays(tensors, [entry.any_name for entry in handle.model_inputs], "OpenVINO")

    def run(self, handle: Any, feed: Any) -> Any:
        """Run once; OpenVINO's mapping of outputs, which stays valid until the next run."""
        return handle.infer(feed, share_inputs=True, share_outputs=True)

    def tensors(self, result: Any) -> list[Tensor]:
        """Copy the outputs into torch tensors."""
        return [torch.from_numpy(result[index].copy()) for index in range(len(result))]


RUNTIMES: dict[str, type[Runtime]] = {
    runtime.name: runtime for runtime in (TorchRuntime, OnnxRuntime, OpenVinoRuntime)
}
"""Runtimes by name; a project may add its own class."""


def get_runtime(runtime: str | Runtime, *, threads: int | None = None) -> Runtime:
    """Return a runtime by name.

    Args:
        runtime: A name of :data:`RUNTIMES`, ``"openvino:bf16"`` (or ``f16``, ``f32``, ``default``) for a
            precision, or a runtime object, which is returned as it is.
        threads: Threads for one forward pass, when a name is given.

    Raises:
        ConfigError: There is no such runtime.
        MissingDependencyError: Its library is not installed.
    """
    if isinstance(runtime, Runtime):
        runtime.check()
        return runtime
    name, _, precision = runtime.partition(":")
    if name not in RUNTIMES:
        raise ConfigError(
            f"there is no runtime {name!r}{did_you_mean(name, RUNTIMES)}; known are {', '.join(RUNTIMES)}"
        )
    options: dict[str, Any] = {"threads": threads}
    if precision:
        if name != OpenVinoRuntime.name:
            raise ConfigError(f"{runtime!r}: only openvino takes a precision")
        options["precision"] = None if precision == "default" else precision
    made = RUNTIMES[name](**options)
    made.check()
    return made
