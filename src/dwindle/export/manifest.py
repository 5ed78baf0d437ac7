"""The manifest of a saved model: one JSON file that says what the other files are, and notices any altered
byte.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dwindle.config.errors import FileFormatError

FORMAT = "dwindle-model"
FORMAT_VERSION = 2
"""The newest version; 1 knew no tensors that are stored without their zeros, and is written where there are none."""

MANIFEST = "manifest.json"
STATE = "model.safetensors"
PROGRAM = "program.pt2"


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path, content: dict[str, Any], files: list[str]) -> None:
    """Write the manifest of a directory whose other files are finished.

    Args:
        directory: Where.
        content: What the manifest says beside the format, its version and the checksums; JSON values.
        files: Names of the other files.
    """
    version = FORMAT_VERSION if content.get("packed") else 1
    manifest = {"format": FORMAT, "format_version": version, **content}
    manifest["files"] = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": file_checksum(directory / name)}
        for name in files
    }
    (directory / MANIFEST).write_bytes(_signed(manifest))


def _signed(manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest, its own checksum last."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    body["checksum"] = hashlib.sha256(_dump(body)).hexdigest()
    return _dump(body)


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest of a directory, and the checksums of all the files it names.

    Raises:
        FileFormatError: The directory was not written by dwindle, was written by a newer one, or something
            in it is missing, truncated or altered. The message names the file.
    """
    manifest = _parse(directory)
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"{directory / MANIFEST} is not a manifest of dwindle (no format {FORMAT!r})")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FileFormatError(
            f"{directory} has format version {version}, and this dwindle reads up to {FORMAT_VERSION}; "
            "it was written by a newer dwindle: upgrade to read it"
        )
    if (directory / MANIFEST).read_bytes() != _signed(manifest):
        raise FileFormatError(
            f"{directory / MANIFEST} was altered: its content does not match its own checksum"
        )
    for name, entry in manifest["files"].items():
        _check_file(directory, name, entry)
    return manifest


def _parse(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise FileFormatError(f"there is no directory {str(directory)!r}")
    if not path.is_file():
        raise FileFormatError(f"{str(directory)!r} holds no {MANIFEST}, so dwindle did not write it")
    try:
        manifest = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is truncated or altered; it is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise FileFormatError(f"{path} is not a manifest of dwindle: it holds a {type(manifest).__name__}")
    return manifest


def _check_file(directory: Path, name: str, entry: dict[str, Any]) -> None:
    path = directory / name
    if Path(name).name != name:
        raise FileFormatError(f"{directory / MANIFEST} names {name!r}, which is not a file beside it")
    if not path.is_file():
        raise FileFormatError(f"{directory} lacks {name}, which its manifest names")
    size = path.stat().st_size
    if size != entry["bytes"]:
        kind = "truncated" if size < entry["bytes"] else "altered"
        raise FileFormatError(f"{path} is {kind}: it has {size} bytes instead of {entry['bytes']}")
    if file_checksum(path) != entry["sha256"]:
        raise FileFormatError(f"{path} was altered: its content does not match the checksum in {MANIFEST}")
