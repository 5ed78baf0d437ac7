"""``save`` and ``load``: what comes back, and what a damaged or foreign file gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, ExportError, FileFormatError
from dwindle.config.history import history, record
from dwindle.export import load, register_replay, save
from dwindle.export.manifest import MANIFEST, STATE, _signed


class Net(nn.Module):
    def __init__(self, width: int = 8, extra: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 5)
        if extra:
            self.extra = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids):
        return self.head(self.embedding(ids)) * self.scale


def annotated(width: int = 8) -> nn.Module:
    return Net(width)


def unannotated(width=8):
    return Net(width)


def trained(width: int = 8) -> Net:
    """A model whose every number differs from a fresh one's."""
    model = Net(width)
    model(torch.randn(16, 3, 8, 8) * 3 + 1)
    return model


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def saved(tmp_path):
    return save(trained().eval(), tmp_path / "model", source=Net)


def cut_width(model: nn.Module, entry: dict) -> nn.Module:
    """A stand-in for a structural step: another width."""
    model.conv = nn.Conv2d(3, entry["width"], 3)
    model.norm = nn.BatchNorm2d(entry["width"])
    model.last = nn.Linear(entry["width"], 5)
    return model


register_replay("test_width", cut_width)


def test_round_trip_is_bit_identical(tmp_path, x):
    model = trained()
    model.norm.eval()
    model.last.bias.requires_grad_(False)
    path = save(model, tmp_path / "deep" / "model")
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, STATE]
    back = load(path, Net)
    assert [module.training for module in back.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(back.eval()(x), model.eval()(x))
    assert not list(tmp_path.glob("**/.*")), "nothing else is left behind"


def test_an_instance_is_copied_not_changed(saved, x):
    fresh = Net()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    back = load(saved, fresh)
    assert back is not fresh
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_fresh_process(tmp_path, x):
    """Saved here, loaded by a process that knows only the directory."""
    model = Net()
    (tmp_path / "homemade.py").write_text(
        textwrap.dedent("""
        from torch import nn

        class Small(nn.Sequential):
            def __init__(self, width=8):
                super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        """)
    )
    make = "import sys, torch; sys.path.insert(0, '.'); import homemade; torch.manual_seed(3); import dwindle.export\n"
    first = make + (
        "m = homemade.Small(6); m(torch.randn(8, 3, 8, 8)); m.eval()\n"
        "dwindle.export.save(m, 'm', source=homemade.Small, source_kwargs={'width': 6})\n"
        "torch.save(m(torch.ones(2, 3, 8, 8)), 'out')"
    )
    second = make + (
        "m = dwindle.export.load('m')\n"
        "assert torch.equal(m(torch.ones(2, 3, 8, 8)), torch.load('out')), 'other outputs'"
    )
    for code in (first, second):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert model.training


def test_history_is_repeated(tmp_path, x):
    model = cut_width(Net(), {"width": 3}).eval()
    record(model, {"kind": "test_width", "width": 3})
    record(model, {"kind": "finetune", "epochs": 2})
    path = save(model, tmp_path / "m", source=annotated)
    back = load(path)
    assert torch.equal(back(x), model(x))
    assert history(back) == history(model) == json.loads((path / MANIFEST).read_text())["history"]
    assert torch.equal(load(save(back, tmp_path / "again"), Net)(x), model(x))


def test_unknown_step(tmp_path):
    model = Net()
    record(model, {"kind": "shrinkk"})
    with pytest.raises(
        FileFormatError, match="'shrinkk', which nothing here can repeat; did you mean 'shrink'"
    ):
        load(save(model, tmp_path / "m"), Net)


def test_shrink_of_this_house(tmp_path, x):
    realize = pytest.importorskip("dwindle.realize")
    model = trained().eval()
    small = realize.prune(model, (x,), ratio=0.5)
    expected = small.model(x)
    assert small.model.conv.out_channels < 8
    back = load(save(small, tmp_path / "m"), Net)
    assert back.conv.out_channels == small.model.conv.out_channels
    assert torch.equal(back(x), expected)
    with pytest.raises(FileFormatError, match=r"not the one that was compressed|does not fit"):
        load(tmp_path / "m", lambda: Net(3))


def test_quantized_of_this_house(tmp_path, x):
    quantization = pytest.importorskip("dwindle.quantization")
    simulated = quantization.quantize(trained().eval(), [x], example_inputs=(x,))
    with torch.no_grad():
        expected = simulated(x)
        back = load(save(simulated, tmp_path / "m"), Net)
        assert torch.equal(back(x), expected)


def test_tied_parameters(tmp_path):
    model, ids = Tied(), torch.arange(6).view(2, 3)
    nn.init.normal_(model.embedding.weight)
    path = save(model, tmp_path / "m")
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["aliases"] == {"head.weight": "embedding.weight"}
    assert (path / STATE).stat().st_size < 2 * 40 * 4 + 300
    back = load(path, Tied)
    assert back.head.weight is back.embedding.weight
    assert torch.equal(back(ids), model(ids))


def test_dtypes_and_odd_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))
            self.register_buffer("scalar", torch.tensor(3))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("turned", torch.randn(3, 5).t())
            storage = torch.arange(10.0)
            self.register_buffer("left", storage[:6])
            self.register_buffer("right", storage[4:])

    model = Odd()
    model.w.data = model.w.data.to(torch.bfloat16)
    back = load(save(model, tmp_path / "m"), Odd)
    assert back.w.dtype is torch.bfloat16
    assert isinstance(back.w, nn.Parameter)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_extra_state(tmp_path):
    class Extra(nn.Linear):
        def __init__(self, state=None):
            super().__init__(2, 2)
            self.state = state

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    assert load(save(Extra({"a": [1, 2.5]}), tmp_path / "m"), Extra).state == {"a": [1, 2.5]}
    with pytest.raises(ExportError, match="neither as a tensor nor as JSON"):
        save(Extra(object()), tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_program_for_rewritten_graphs(tmp_path, x):
    model = torch.fx.symbolic_trace(trained().eval())
    with pytest.raises(ConfigError, match="example_inputs"):
        save(model, tmp_path / "m")
    path = save(model, tmp_path / "m", example_inputs=(x,))
    back = load(path)
    assert torch.equal(back(x), model(x))
    assert torch.equal(back(x[:1]), model(x[:1]))
    assert back.eval() is back
    with pytest.raises(NotImplementedError):
        back.train()
    back(x).sum().backward()
    assert all(parameter.grad is not None for parameter in back.parameters())


# --- where it comes from -----------------------------------------------------------------------------------


def test_makers(tmp_path, x, monkeypatch):
    model = trained(4).eval()
    for source in (Net, annotated, f"{__name__}:annotated"):
        path = save(model, tmp_path / "m", source=source, source_kwargs={"width": 4}, overwrite=True)
        assert torch.equal(load(path)(x), model(x))
    path = save(model, tmp_path / "m", source=unannotated, source_kwargs={"width": 4}, overwrite=True)
    with pytest.raises(FileFormatError, match="trust_source"):
        load(path)
    assert torch.equal(load(path, trust_source=True)(x), model(x))
    assert torch.equal(load(path, f"{__name__}:unannotated")(x), model(x))


def test_a_manifest_cannot_call_anything(tmp_path):
    marker = tmp_path / "called"
    path = save(Net(), tmp_path / "m", source="os:system", source_kwargs={"command": f"touch {marker}"})
    with pytest.raises(FileFormatError, match="not called unasked"):
        load(path)
    assert not marker.exists()


def test_bad_makers(tmp_path):
    with pytest.raises(ConfigError, match="lambda"):
        save(Net(), tmp_path / "m", source=lambda: Net())
    with pytest.raises(ConfigError, match="JSON"):
        save(Net(), tmp_path / "m", source=Net, source_kwargs={"width": object()})
    with pytest.raises(ConfigError, match="form"):
        save(Net(), tmp_path / "m", source="resnet18")
    with pytest.raises(FileFormatError, match="without the name of its maker"):
        load(save(Net(), tmp_path / "m"))
    with pytest.raises(FileFormatError, match=r"not a torch\.nn\.Module"):
        load(tmp_path / "m", lambda: 3)
    with pytest.raises(FileFormatError, match="cannot be found"):
        load(save(Net(), tmp_path / "n", source="no.such.module:thing"))


def test_the_wrong_constructor_is_named(saved):
    with pytest.raises(FileFormatError, match=r"module 'conv', parameter 'weight': shape \(6, 3, 3, 3\)"):
        load(saved, lambda: Net(6))
    with pytest.raises(FileFormatError, match=r"the file lacks 'extra.weight'"):
        load(saved, lambda: Net(extra=True))
    with pytest.raises(FileFormatError, match=r"lacks 'conv.weight'"):
        load(saved, lambda: nn.Linear(2, 2))


# --- damaged and foreign files -----------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(saved):
    for name in (MANIFEST, STATE):
        path = saved / name
        content = path.read_bytes()
        step = max(1, len(content) // 97)
        for position in [*range(0, len(content), step), len(content) - 1]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(FileFormatError):
                load(saved, Net)
        path.write_bytes(content)
    load(saved, Net)


def test_every_truncation_is_noticed(saved):
    for name in (MANIFEST, STATE):
        path = saved / name
        content = path.read_bytes()
        for length in [*range(0, len(content), max(1, len(content) // 61)), len(content) - 1]:
            path.write_bytes(content[:length])
            with pytest.raises(FileFormatError, match=name):
                load(saved, Net)
        path.write_bytes(content + b"\0")
        with pytest.raises(FileFormatError, match=name):
            load(saved, Net)
        path.write_bytes(content)


def test_truncated_numbers_say_so(saved):
    path = saved / STATE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match="truncated: it has"):
        load(saved, Net)


def test_swapped_manifests(tmp_path):
    first, second = save(trained(), tmp_path / "a"), save(trained(), tmp_path / "b")
    (first / MANIFEST).write_bytes((second / MANIFEST).read_bytes())
    with pytest.raises(FileFormatError, match="checksum"):
        load(first, Net)


def test_missing_and_foreign(saved, tmp_path):
    with pytest.raises(FileFormatError, match="no directory"):
        load(tmp_path / "nothing", Net)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="dwindle did not write it"):
        load(tmp_path / "empty", Net)
    (tmp_path / "empty" / MANIFEST).write_text('{"name": "a web page"}')
    with pytest.raises(FileFormatError, match="not a manifest of dwindle"):
        load(tmp_path / "empty", Net)
    (tmp_path / "empty" / MANIFEST).write_text("[1]")
    with pytest.raises(FileFormatError, match="holds a list"):
        load(tmp_path / "empty", Net)
    (saved / STATE).unlink()
    with pytest.raises(FileFormatError, match=f"lacks {STATE}"):
        load(saved, Net)


def rewrite(directory: Path, **changes) -> None:
    """Change a manifest and sign it again, as another program might."""
    manifest = {**json.loads((directory / MANIFEST).read_bytes()), **changes}
    (directory / MANIFEST).write_bytes(_signed(manifest))


def test_newer_format(saved):
    rewrite(saved, format_version=99)
    with pytest.raises(FileFormatError, match=r"version 99.*newer dwindle"):
        load(saved, Net)


def test_signed_but_hostile(saved):
    files = json.loads((saved / MANIFEST).read_bytes())["files"]
    rewrite(saved, files={**files, "../secret": {"bytes": 0, "sha256": ""}})
    with pytest.raises(FileFormatError, match="not a file beside it"):
        load(saved, Net)


# --- writing -----------------------------------------------------------------------------------------------


def test_overwriting(saved, tmp_path):
    with pytest.raises(ConfigError, match="overwrite=True"):
        save(Net(), saved)
    other = trained().eval()
    save(other, saved, overwrite=True)
    assert torch.equal(load(saved, Net).conv.weight, other.conv.weight)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        save(Net(), saved, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        save(Net(), tmp_path / "file")
    with pytest.raises(ConfigError, match="takes a module"):
        save({"not": "a model"}, tmp_path / "x")


def test_a_failure_leaves_the_old_one(saved, monkeypatch):
    before = {entry.name: entry.read_bytes() for entry in saved.iterdir()}

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("dwindle.export.saving.write_manifest", fails)
    with pytest.raises(OSError, match="disk full"):
        save(trained(), saved, overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_without_an_exchange_step(saved, monkeypatch):
    monkeypatch.setattr("dwindle.export.atomic._exchange", lambda first, second: False)
    other = trained().eval()
    save(other, saved, overwrite=True)
    assert torch.equal(load(saved, Net).conv.weight, other.conv.weight)
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_killed_while_saving(tmp_path):
    """A process that overwrites one model again and again is killed: what is there is whole, whenever it dies."""
    code = textwrap.dedent("""
        import sys, torch
        from torch import nn
        from dwindle.export import save
        model = nn.Linear(300, 300)
        save(model, "m", overwrite=True)
        print("ready", flush=True)
        while True:
            nn.init.normal_(model.weight)
            save(model, "m", overwrite=True)
        """)
    for moment in (0.0, 0.029, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moment)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        load(tmp_path / "m", lambda: nn.Linear(300, 300))
