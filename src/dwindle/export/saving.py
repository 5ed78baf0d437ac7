"""``dw.save``: writes a compressed model as ``model.safetensors`` and ``manifest.json``, whole or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import dwindle
from dwindle.config.errors import ConfigError
from dwindle.config.history import history as history_of
from dwindle.export.atomic import replace_directory, sibling_directory
from dwindle.export.capture import capture_program, structure_of
from dwindle.export.manifest import MANIFEST, PROGRAM, STATE, write_manifest
from dwindle.export.program_file import write_program
from dwindle.export.source import describe_source
from dwindle.export.state_file import write_state
from dwindle.measure.structure import example_call
from dwindle.quantization.aware_training import finished
from dwindle.realize import RewrittenModel
from dwindle.simulate import refuse_shards


def save(
    result_or_model: Any,
    directory: str | Path,
    *,
    source: str | Callable[..., Any] | None = None,
    source_kwargs: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    as_program: bool | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    without_zeros: bool = True,
) -> Path:
    """Save a model so that :func:`dwindle.load` gives it back with bit-identical outputs.

    Stored are the numbers (``model.safetensors``, shared tensors once) and a manifest: the history of what
    was done to the model, the name of what made it, versions, dtypes, shapes, and a checksum of every file.
    There is no pickle and no code. The directory appears in one step; a process killed while saving leaves
    what was there before.

    A model whose graph was rewritten (a ``RewrittenModel`` or a ``torch.fx.GraphModule``) cannot be rebuilt
    from its maker. It is stored as a ``torch.export`` program instead, for which example inputs are
    needed, and which runs in evaluation mode only.

    Args:
        result_or_model: A module, or a result that has one as ``.model``. One that is trained with quantizers is
            finished first (:func:`dwindle.quantization.finish_training`); to go on with training, keep a checkpoint.
        directory: Where. It must not exist, unless ``overwrite``.
        source: What makes the uncompressed model: ``"package.module:callable"``, ``"timm/NAME"`` or the
            callable. With it, ``dwindle.load(directory)`` needs nothing else.
        source_kwargs: Its keyword arguments (JSON values).
        example_inputs: Inputs for the program.
        example_kwargs: Keyword inputs for the program.
        as_program: Store a program (True) or numbers (False); None decides by the model.
        metadata: Anything of yours to keep in the manifest (JSON values).
        overwrite: Replace a directory that dwindle wrote.
        without_zeros: Store tensors that hold many zeros without them (half zeros: half the file). What comes back
            is equal; only the sign of negative zeros is lost. With False the file is a plain ``.safetensors`` of
            the state dict. A program is stored as it is.

    Returns:
        The directory.

    Raises:
        ConfigError: The directory exists, or holds files that dwindle did not write, or arguments do not fit.
        ExportError: The model holds something that cannot be stored.
    """
    model = (
        result_or_model if isinstance(result_or_model, nn.Module) else getattr(result_or_model, "model", None)
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"save takes a module or a result with .model, not {type(result_or_model).__name__}"
        )
    model = finished(model)
    refuse_shards(model, "dw.save")
    target = Path(directory)
    _check_target(target, overwrite)
    content = _describe(model, describe_source(source, source_kwargs), metadata)
    program = isinstance(model, fx.GraphModule | RewrittenModel) if as_program is None else as_program
    with sibling_directory(target) as draft:
        if program:
            _write_program(model, draft, content, example_inputs, example_kwargs)
        else:
            written = write_state(model, draft / STATE, without_zeros=without_zeros)
            content["aliases"], content["extra_state"] = written.aliases, written.extra_state
            if written.packed:
                content["packed"] = written.packed
        write_manifest(draft, content, [PROGRAM if program else STATE])
        replace_directory(draft, target)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """Make sure that nothing is lost that dwindle did not write."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{str(target)!r} is a file; give the name of a directory")
    present = {entry.name for entry in target.iterdir()}
    if not present:
        return
    if not overwrite:
        raise ConfigError(f"{str(target)!r} exists; pass overwrite=True to replace it")
    foreign = sorted(present - {MANIFEST, STATE, PROGRAM})
    if foreign or MANIFEST not in present:
        raise ConfigError(
            f"{str(target)!r} holds what dwindle did not save ({', '.join(foreign[:5]) or 'no manifest'}), "
            "which overwriting would delete; choose another directory"
        )


def _describe(
    model: nn.Module, source: dict[str, Any] | None, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    kind = type(model)
    modes = {name: module.training for name, module in model.named_modules()}
    return {
        "versions": {"dwindle": dwindle.__version__, "torch": torch.__version__},
        "source": source,
        "model_class": f"{kind.__module__}:{kind.__qualname__}",
        "history": history_of(model),
        "metadata": dict(metadata or {}),
        "tensors": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, Tensor)
        },
        "frozen": [name for name, tensor in model.named_parameters() if not tensor.requires_grad],
        "training": model.training,
        "other_mode": [name for name, training in modes.items() if training != model.training],
    }


def _write_program(
    model: nn.Module,
    draft: Path,
    content: dict[str, Any],
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
) -> None:
    if example_inputs is None and not example_kwargs:
        raise ConfigError(
            "this model's graph was rewritten, so it is saved as a program, which needs example inputs: "
            "dw.save(..., example_inputs=(x,))"
        )
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    program, is_dynamic, _ = capture_program(model, structure_of(model, args, kwargs))
    content["program"] = {"dynamic_batch": is_dynamic}
    write_program(program, draft / PROGRAM)
