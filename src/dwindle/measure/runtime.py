"""What a runtime is: how a model becomes a file, a session, and outputs.

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

from dwindle.config.errors import ConfigError, ExportError
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
