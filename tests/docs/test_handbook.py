"""The handbook says what is there: quoted messages, public names, measured figures, the pages of the navigation."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import dwindle as dw

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
GAP = "…"


@cache
def sources() -> dict[Path, str]:
    """Return the text of every source file."""
    return {path: path.read_text() for path in (ROOT / "src/dwindle").rglob("*.py")}


@cache
def messages_of(path: Path) -> list[str]:
    """Return the texts in a source file, with a sign in place of what is filled in."""
    found = []
    for node in ast.walk(ast.parse(sources()[path])):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def is_said(message: str) -> bool:
    """Say whether a text of the sources holds all parts of a quoted message, in their order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split(GAP)), re.S)
    words = re.findall(r"[a-z]{3,}", message)
    likely = [path for path, text in sources().items() if all(word in text for word in words)]
    return any(pattern.search(text) for path in likely for text in messages_of(path))


QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), flags=re.M)


def test_thirty_messages_are_explained() -> None:
    assert len(QUOTED) == len(set(QUOTED)) >= 30


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_raised(message: str) -> None:
    assert max(len(part) for part in message.split(GAP)) >= 12
    assert is_said(message)


def test_a_message_that_nobody_raises_is_noticed() -> None:
    assert not is_said(f"the model has no module {GAP} of this unheard-of kind")


ROOMS = sorted(set(dw._ROOMS) | set(dw._VERBS))


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_docstrings(room: str) -> None:
    module = importlib.import_module(f"dwindle.{room}")
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{room}.{name} has no docstring"


def public_functions() -> list[str]:
    """Return the functions of the public face, as ``room.name``."""
    names = []
    for room in ROOMS:
        module = importlib.import_module(f"dwindle.{room}")
        names += [f"{room}.{name}" for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    return names


@pytest.mark.parametrize("name", public_functions())
def test_arguments_of_public_functions_are_explained(name: str) -> None:
    room, function = name.split(".")
    value = getattr(importlib.import_module(f"dwindle.{room}"), function)
    text = inspect.getdoc(value) or ""
    parameters = inspect.signature(value).parameters.values()
    own = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    if len(own) >= 3:  # what takes one or two says it in its first sentence
        missing = [parameter.name for parameter in own if not re.search(rf"\b{parameter.name}\b", text)]
        assert not missing, f"{name}: the docstring says nothing of {missing}"


def test_the_overview_names_everything_public() -> None:
    page = (DOCS / "reference/index.md").read_text()
    for name in set(dw.__all__) - {"__version__"}:
        assert f"`dw.{name}`" in page, name


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"])))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def table_rows() -> list[tuple[str, str]]:
    """Return what was measured and where it stands, for each row of the page of decisions."""
    rows = []
    for line in (DOCS / "which_method.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        link = re.search(r"\]\(([^)#]+)\)", cells[-2]) if line.startswith("|") and len(cells) >= 4 else None
        if link:
            rows.append((cells[-3], link[1]))
    return rows


def figures(text: str) -> list[str]:
    """Return the numbers of a cell that are measurements: those with a decimal point."""
    return re.findall(r"-?\d+\.\d+", text)


@pytest.mark.parametrize(("measured", "page"), table_rows())
def test_measured_figures_stand_on_the_page_named(measured: str, page: str) -> None:
    found = figures(measured) or re.findall(r"\d+", measured)
    source = (DOCS / page).read_text()
    assert found
    missing = [figure for figure in found if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", source)]
    assert not missing, f"{page} does not say {missing}"


def test_decisions_have_rows_for_what_brings_nothing() -> None:
    honest = (DOCS / "which_method.md").read_text().split("## Where a method brings nothing")[1]
    assert len(re.findall(r"^\| .*\]\(", honest, flags=re.M)) >= 10


def test_the_table_of_the_first_page_is_that_of_the_recorded_run() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| (?:parameters|file|test accuracy|ONNX Runtime|OpenVINO).*$",
        (DOCS / "index.md").read_text(),
        re.M,
    )
    assert len(rows) >= 4
    assert all(row in readme for row in rows)


def explained_methods() -> list[tuple[str, str]]:
    """Return the methods that need a formula and a paper, with the page that has them."""
    from dwindle.distillation.methods import METHODS as losses
    from dwindle.quantization.quantizers import METHODS as quantizers

    frames = {"ObservingPruner", "ScheduledPruner", "TrainingPruner", "Pruner"}
    pruners = [name for name in dw.pruning.__all__ if name.endswith("Pruner") and name not in frames]
    pages = {"pruning.md": [*dw.pruning.AXIS_IMPORTANCES], "": pruners}
    pages |= {"distillation.md": [*losses], "training_quantizers.md": [*quantizers]}
    return [(page, name) for page, names in pages.items() for name in names]


@pytest.mark.parametrize(("page", "name"), explained_methods())
def test_methods_have_a_formula_and_a_paper(page: str, name: str) -> None:
    pages = [page] if page else ["pruning.md", "data_driven.md", "training_sparsity.md", "layerwise.md"]
    lines = "\n".join((DOCS / own).read_text() for own in pages).splitlines()
    said = [line for line in lines if re.search(rf"`\"?{name}\b", line)]
    papers = r"arxiv\.org|arXiv:|no paper|baseline|19\d\d|NNCF"
    assert any(re.search(papers, line, flags=re.I) for line in said), f"{name}: no paper in {pages}"
    assert any(len(re.findall(r"`[^`]+`", line)) >= 2 or "baseline" in line for line in said), (
        f"{name}: no formula"
    )


def test_each_extension_takes_at_most_forty_lines() -> None:
    chapters = (DOCS / "extending.md").read_text().split("\n## ")[1:]
    assert len(chapters) == 5
    for chapter in chapters:
        blocks = re.findall(r"^```python\n(.*?)^```", chapter, flags=re.S | re.M)
        assert blocks
        assert sum(bool(line.strip()) for block in blocks for line in block.splitlines()) <= 40, chapter[:40]
