"""Scenes, with cut-outs made here: the package that has the real ones need not be installed."""

import numpy as np
import pytest
import torch

from dwindle import zoo
from dwindle.zoo import cutouts as module

pytest.importorskip("skimage")
image = pytest.importorskip("PIL.Image")


@pytest.fixture
def stamps(tmp_path, monkeypatch):
    """A folder as the package has it: red discs on nothing, one too small, one drawn, one mirrored."""

    def write(name, size):
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[..., 1] = 255  # what cannot be seen is green
        rows, columns = np.mgrid[:size, :size]
        disc = (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 3) ** 2
        pixels[disc] = (255, 0, 0, 255)
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)

    for name in ("animals/bear_brown", "animals/bear_white", "animals/cat", "vehicles/bus", "plants/oak"):
        write(name, 200)
    for name in ("animals/cat_mirror", "animals/cartoon/dog", "symbols/a"):
        write(name, 200)
    write("animals/ant", 40)
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    read = module.read_cutout
    read.cache_clear()
    yield tmp_path
    read.cache_clear()


def test_things_that_were_photographed_are_found_and_shared_out(stamps):
    names = ["animals/bear_brown", "animals/bear_white", "animals/cat", "plants/oak", "vehicles/bus"]
    assert sorted(zoo.cutout_names()) == names
    calibration, agreement = zoo.cutout_names("calibration"), zoo.cutout_names("agreement")
    assert sorted(calibration + agreement) == names
    assert not set(calibration) & set(agreement)
    assert ("animals/bear_brown" in calibration) == ("animals/bear_white" in calibration)
    with pytest.raises(ValueError, match="part must be"):
        zoo.cutout_names("test")


def test_a_cutout_has_no_empty_border(stamps):
    disc = zoo.read_cutout("animals/cat")
    assert disc.shape[0] == 4
    assert 130 < disc.shape[1] == disc.shape[2] < 137  # two thirds of 200
    assert float(disc[3, disc.shape[1] // 2, 0]) == 1.0


def test_scenes_are_photographs_with_one_thing_each(stamps):
    names = zoo.cutout_names()
    made = zoo.scenes(names, ["camera", "moon"], 12, size=64, mean=(0, 0, 0), std=(1, 1, 1), seed=3)
    assert made.shape == (12, 3, 64, 64)
    assert torch.equal(
        made, zoo.scenes(names, ["camera", "moon"], 12, size=64, mean=(0, 0, 0), std=(1, 1, 1), seed=3)
    )
    assert not torch.equal(
        made, zoo.scenes(names, ["camera", "moon"], 12, size=64, mean=(0, 0, 0), std=(1, 1, 1))
    )
    red, green, blue = made.unbind(1)
    thing = (red > 0.95) & (green < 0.05)
    longest = torch.stack([own.any(0).sum() for own in thing])
    assert (longest >= 64 * 0.5 - 3).all()
    assert (longest <= 64).all()
    assert longest.unique().numel() > 3
    # both photographs are grey, and what cannot be seen of a cut-out (green) does not shine through at its edges
    assert torch.equal(green, blue)
    assert bool((red >= green - 1 / 255).all())


def test_every_thing_appears_equally_often(stamps, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "read_cutout", lambda name: seen.append(name) or torch.ones(4, 8, 8))
    zoo.scenes(["a", "b", "c"], ["camera"], 8, size=32)
    assert sorted(seen.count(name) for name in "abc") == [2, 3, 3]


def test_what_is_missing_is_named(stamps, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="0 cut-outs, 1 photographs"):
        zoo.scenes([], ["camera"], 3)
    monkeypatch.setattr(module, "_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        zoo.cutout_names()
