"""Writes an ONNX file as OpenVINO intermediate representation (``.xml`` and ``.bin``)."""

from __future__ import annotations

from pathlib import Path

from dwindle.config.errors import ExportError, require
from dwindle.export.capture import first_line


def write_openvino(onnx_path: Path, path: Path, *, half_weights: bool = False) -> list[Path]:
    """Convert an ONNX file to OpenVINO's own format.

    Args:
        onnx_path: The ONNX file.
        path: The ``.xml`` file; the weights stand beside it as ``.bin``.
        half_weights: Store float weights as float16 (half the bytes, slightly other results). OpenVINO's
            own tools do this unless told otherwise; here it is off, so that the file computes what the
            model computes.

    Returns:
        The ``.xml`` and the ``.bin``.

    Raises:
        ExportError: OpenVINO cannot convert the file.
        MissingDependencyError: OpenVINO is not installed.
    """
    openvino = require("openvino", "openvino")
    try:
        model = openvino.Core().read_model(str(onnx_path))
        openvino.save_model(model, str(path), compress_to_fp16=half_weights)
    except Exception as error:  # the front end raises classes of its own
        raise ExportError(f"OpenVINO cannot convert the model: {first_line(error)}") from error
    return [path, path.with_suffix(".bin")]
