"""The bar: silent where nobody looks, and never in the way of the items."""

from __future__ import annotations

import pytest

from dwindle.training.progress import tracked


@pytest.mark.parametrize("shown", [None, False, True])
def test_the_items_come_as_they_are(
    shown: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich this is a terminal, for sys.stderr it is none
    assert list(tracked(iter([3, 1, 2]), "counting", total=3, shown=shown)) == [3, 1, 2]
    assert list(tracked([], "nothing", shown=shown)) == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("counting" in printed.err) == (shown is True)


def test_items_are_asked_for_one_by_one() -> None:
    asked = []

    def items() -> object:
        for number in range(3):
            asked.append(number)
            yield number

    for number in tracked(items(), "counting"):
        assert asked[-1] == number
        if number == 1:
            break
    assert asked == [0, 1]
