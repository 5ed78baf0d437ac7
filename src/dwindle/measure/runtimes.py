"""The runtimes a model can be run in: torch itself, ONNX Runtime and OpenVINO.

A new runtime is one class: ``export`` writes what the runtime reads, ``load`` opens it, ``feed`` brings
tensors into its form and ``run`` runs it. Sessions are called like the model they were made from, tensors
in and tensors out.
"""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, ExportError, did_you_mean, require
from dwindle.graph.modes import in_mode
from dwindle.graph.nested_values import Rebuild, flatten
from dwindle.measure.structure import InputStructure


class Session:
    """A model loaded in a runtime; call it like the model.

    Attributes:
        runtime: The runtime it lives in.
        files: The files that were written for it (empty for torch).
        bytes_on_disk: Their size together, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        handle: Any,
        structure: InputStructure | None,
        rebuild: Rebuild | None,
        bytes_on_disk: int | None = None,
    ) -> None:
        self.runtime = runtime
        self.bytes_on_disk = bytes_on_disk
        self._handle = handle
        self._structure = structure
        self._rebuild = rebuild

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and return its output as torch tensors, in the structure the model itself gives."""
        feed = self.runtime.feed(self._handle, self._tensors(args, kwargs))
        outputs = self.runtime.tensors(self.runtime.run(self._handle, feed))
        if self._rebuild is not None:
            return self._rebuild(outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Return a function that only runs the model on inputs brought into the runtime's form beforehand."""
        feed = self.runtime.feed(self._handle, self._tensors(args, kwargs))
        run, handle = self.runtime.run, self._handle
        return lambda: run(handle, feed)

    def _tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        if self._structure is not None:
            return dict(zip(self._structure.names, self._structure.flatten(args, kwargs), strict=True))
        leaves, _ = flatten(tuple(args), "argument")
        return {**dict(leaves), **dict(flatten(dict(kwargs))[0])}


class Runtime(abc.ABC):
    """A runtime. Subclasses say how it writes, loads and runs.

    Args:
        threads: Threads for one forward pass; None leaves it to the runtime.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ".onnx"

    def __init__(self, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self.threads = threads

    @property
    def label(self) -> str:
        """The name under which measurements of this runtime are listed."""
        return self.name

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ``MissingDependencyError`` when the runtime's library is not installed."""

    def export(self, model: nn.Module, structure: InputStructure, path: Path) -> list[Path]:
        """Write the file that :meth:`load` reads (ONNX unless a subclass says otherwise); return all
        files.
        """
        from dwindle.export.writing import (
            write_onnx_of,  # the exporter checks what it wrote with these runtimes
        )

        return write_onnx_of(model, structure, path).files

    @abc.abstractmethod
    def load(self, path: Path) -> Any:
        """Open a file for running."""

    @abc.abstractmethod
    def feed(self, handle: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Bring named tensors into the runtime's form."""

    @abc.abstractmethod
    def run(self, handle: Any, feed: Any) -> Any:
        """Run once."""

    @abc.abstractmethod
    def tensors(self, result: Any) -> list[Tensor]:
        """Bring the result of :meth:`run` into torch tensors of their own memory."""

    def session(
        self,
        model: nn.Module | str | Path,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Session:
        """Make a session of a model or of a file.

        Args:
            model: A module (it is exported with the example inputs into a temporary file), or a file this
                runtime reads.
            args: Example positional inputs; needed for a module.
            kwargs: Example keyword inputs.
        """
        self.check()
        if isinstance(model, (str, Path)):
            path = Path(model)
            if not path.is_file():
                raise ConfigError(f"there is no file {str(path)!r}")
            return Session(self, self.load(path), None, None, path.stat().st_size)
        with tempfile.TemporaryDirectory(prefix="dwindle-session-", ignore_cleanup_errors=True) as directory:
            return self.open(PreparedModel(model, args, kwargs, Path(directory)))

    def open(self, prepared: PreparedModel) -> Session:
        """Make a session of a model whose exported files are shared with other runtimes."""
        files = prepared.files_for(self)
        size = sum(file.stat().st_size for file in files)
        return Session(self, self.load(files[0]), prepared.structure, prepared.rebuild, size)


class PreparedModel:
    """A model with its example call and the files written for runtimes; each kind of file is written once.

    Args:
        model: The model.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        directory: Where files are written.

    Attributes:
        structure: How its inputs become flat tensors.
        rebuild: How its flat outputs become what the model returns.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, directory: Path
    ) -> None:
        self.model = model
        self.structure = InputStructure(model, args, kwargs)
        with in_mode(model, training=False), torch.no_grad():
            _, self.rebuild = flatten(model(*self.structure.args, **self.structure.kwargs))
        self._directory = directory
        self._files: dict[tuple[Any, str], list[Path]] = {}

    def files_for(self, runtime: Runtime) -> list[Path]:
        """Return the files a runtime reads, writing them when no runtime before wrote the same kind."""
        key = (type(runtime).export, runtime.suffix)
        if key not in self._files:
            refuse_bfloat16(self.model, self.structure)
            folder = self._directory / str(len(self._files))
            folder.mkdir()
            self._files[key] = runtime.export(self.model, self.structure, folder / f"model{runtime.suffix}")
        return self._files[key]


def refuse_bfloat16(model: nn.Module, structure: InputStructure) -> None:
    """Raise when a model or its inputs are bfloat16, which NumPy and ONNX Runtime's CPU operators have
    not.
    """
    named = [*model.named_parameters(), *zip(structure.names, structure.example, strict=True)]
    for name, tensor in named:
        if tensor.dtype is torch.bfloat16:
            raise ExportError(
                f"{name!r} is bfloat16, which these runtimes cannot take in on the CPU: export the model in float32 "
                '(model.float()); runtimes can compute in bfloat16 by themselves, such as "openvino:bf16"'
            )


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
