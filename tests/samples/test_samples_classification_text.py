"""The samples of classification and text run from end to end at a size that takes seconds, and write their tables.

That integer text models give the same in ONNX Runtime stands in the table that the sample's own run writes.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dwindle import zoo

SAMPLES = Path(__file__).parents[2] / "samples"


def script(name: str, *runtimes: str) -> ModuleType:
    """Import a sample's train.py under a name of its own; it measures in these runtimes, shortly."""
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / name / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.table_of = functools.partial(  # type: ignore[attr-defined]
        module.table_of, runtimes=runtimes, max_seconds=0.2
    )
    return module


def cells(text: str, title: str) -> list[str]:
    """Return the cells of the row that begins with a title."""
    begin = f"| {title} |" if title else "| |"
    (line,) = [own for own in text.splitlines() if own.startswith(begin)]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def share(cell: str) -> float:
    """Return the share in brackets: "12 k (34.5%)" is 0.345."""
    return float(cell.split("(")[1].rstrip("%)")) / 100


def test_classification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = script("classification", "torch", "onnxruntime")
    data = zoo.digits().first(1_024, 100)
    torch.manual_seed(0)
    monkeypatch.setattr(
        module, "load", lambda small, digits: ("digits", data, zoo.digits_resnet((16, 32), (1, 1)))
    )
    readme = tmp_path / "README.md"
    readme.write_text((SAMPLES / "classification/README.md").read_text())
    monkeypatch.setattr(module, "HERE", tmp_path)
    recipe = SAMPLES / "classification/all_at_once.yaml"
    text = module.main(["--epochs", "12", "--recipe", str(recipe), "--readme"])
    assert text in readme.read_text()
    assert cells(text, "")[:2] == ["float", "all at once"]
    assert share(cells(text, "multiply-accumulates")[1]) < 0.4
    assert share(cells(text, "bytes of the ONNX file")[1]) < 0.25
    accuracies = cells(text, "test accuracy, ONNX Runtime")
    assert all(float(cell.rstrip("%")) > 60 for cell in accuracies)
    assert all(
        float(cell.rstrip("%")) >= 98 for cell in cells(text, "answers equal to torch's, ONNX Runtime")
    )
    assert cells(text, "ms (fastest call), torch")[1] == "simulated"
    module.write_table(readme, "again")
    assert text not in readme.read_text()
    assert "again" in readme.read_text()
    (tmp_path / "none.md").write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        module.write_table(tmp_path / "none.md", "x")


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    module: Any = script("text", "torch")

    def load(train: int, test: int) -> tuple[Any, Any, Any]:
        """Sentences in which one of two words says the class; a small encoder with random weights."""
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        tokens = torch.randint(3, 40, (256, 10))
        labels = torch.arange(256) % 2
        tokens[:, 2] = 1 + labels
        tokens[::3, 8:] = 0
        encoder = transformers.BertModel(config, add_pooling_layer=False)
        sets = module.Sentences(tokens[:192], labels[:192]), module.Sentences(tokens[192:], labels[192:])
        return *sets, module.SentenceClassifier(encoder)

    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "train", functools.partial(_faster, module.train))
    recipe = SAMPLES / "text/all_at_once.yaml"
    text = module.main(["--epochs", "4", "--recipe", str(recipe)])
    assert share(cells(text, "multiply-accumulates")[1]) < 0.75
    assert all(float(cell.rstrip("%")) > 70 for cell in cells(text, "test accuracy, torch"))
    assert cells(text, "ms (fastest call), torch")[1] == "simulated"


def _faster(train: Any, model: Any, loader: Any, epochs: int, rate: float, run: Any = None) -> None:
    train(model, loader, epochs, 2e-3, run)  # weights that are not pretrained need larger steps
