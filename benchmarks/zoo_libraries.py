"""Imported once by the server that the sweep forks every model's process from: imports take longer than most models."""

import importlib
import pkgutil
import sys
from pathlib import Path

import dwindle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

importlib.import_module("support.torchvision_shim").install()

for name in (
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "support.architectures.check",
):
    importlib.import_module(name)

for module in pkgutil.walk_packages(dwindle.__path__, "dwindle."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
