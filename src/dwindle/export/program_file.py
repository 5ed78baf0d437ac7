"""Writes and reads a ``torch.export`` program (``.pt2``) that holds no pickle.

``torch.export.save`` writes the graph as JSON and the weights as raw bytes, but the sample inputs as a
pickled archive, and unusual constants as pickled objects. Sample inputs are left out here (they are not
needed to run), and anything else pickled is refused, in writing and before reading.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from dwindle.config.errors import ExportError, FileFormatError


def write_program(program: ExportedProgram, path: Path) -> list[Path]:
    """Write a program as one ``.pt2`` file.

    Args:
        program: The program.
        path: The file.

    Raises:
        ExportError: The program holds objects that only pickle can store.
    """
    full = path.with_name(f"{path.stem}.with-inputs.pt2")
    try:
        torch.export.save(program, str(full))
        _without_sample_inputs(full, path)
    finally:
        full.unlink(missing_ok=True)
    pickled = pickled_entries(path)
    if pickled:
        path.unlink()
        raise ExportError(f"the program holds objects that only pickle could store: {', '.join(pickled)}")
    return [path]


def read_program(path: Path) -> ExportedProgram:
    """Read a program that :func:`write_program` wrote.

    Raises:
        FileFormatError: The file is damaged, or holds pickled objects.
    """
    try:
        pickled = pickled_entries(path)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise FileFormatError(f"{path} is not a whole .pt2 file: {error}") from error
    if pickled:
        raise FileFormatError(
            f"{path} holds pickled objects, which could run foreign code: {', '.join(pickled)}"
        )
    try:
        return torch.export.load(str(path))
    except Exception as error:  # the reader raises whatever its parts raise
        raise FileFormatError(f"{path} cannot be read as a torch.export program: {error}") from error


def _without_sample_inputs(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            content = b"" if _is_sample_inputs(entry.filename) else old.read(entry)
            new.writestr(zipfile.ZipInfo(entry.filename, date_time=(1980, 1, 1, 0, 0, 0)), content)


def _is_sample_inputs(name: str) -> bool:
    return "/data/sample_inputs/" in f"/{name}"


def pickled_entries(path: Path) -> list[str]:
    """Return the entries of a ``.pt2`` file that reading would unpickle.

    Args:
        path: The file.

    Raises:
        zipfile.BadZipFile: It is no zip archive.
        ValueError: A description inside is no JSON.
    """
    found: list[str] = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/" not in entry.filename:  # the format before torch 2.8, whose weights are pickled
                found.append(entry.filename)
            elif _is_sample_inputs(entry.filename):
                if entry.file_size:
                    found.append(entry.filename)
            elif entry.filename.endswith(("weights_config.json", "constants_config.json")):
                found.extend(_pickled_payloads(json.loads(archive.read(entry))))
    return found


def _pickled_payloads(config: Any) -> list[str]:
    entries = config.get("config", {}) if isinstance(config, dict) else {}
    return [
        name
        for name, payload in entries.items()
        if payload.get("use_pickle") or not str(payload.get("path_name")).startswith(("weight_", "tensor_"))
    ]
