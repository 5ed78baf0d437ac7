"""The loop trains, measures, and resumes with the same bits."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dwindle.config.errors import ConfigError, DwindleError, FileFormatError
from dwindle.training import TrainingOptions, accuracy, fit
from dwindle.zoo import BatchLoader, random_shift, residual_network

pytestmark = pytest.mark.filterwarnings("ignore:training without oneDNN")

IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(48) % 3


def make(kind: str = "sgd"):
    torch.manual_seed(3)
    model = residual_network((4, 6), (1, 1), classes=3)
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)
    return model, optimizer, schedule


def own_loader():
    return BatchLoader(IMAGES, LABELS, 16, shuffle=True, augment=random_shift, seed=5)


def torch_loader():
    generator = torch.Generator().manual_seed(9)
    return DataLoader(TensorDataset(IMAGES, LABELS), 16, shuffle=True, generator=generator)


def global_loader():
    return DataLoader(TensorDataset(IMAGES, LABELS), 16, shuffle=True)


class Killed(BaseException):
    pass


def killed_after(epochs: int):
    """An evaluate function that interrupts the run in the epoch after ``epochs``."""
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) > epochs:
            raise Killed
        return float(torch.rand(()))

    return evaluate


@pytest.mark.parametrize("loader", [own_loader, torch_loader, global_loader])
@pytest.mark.parametrize(("kind", "channels_last"), [("sgd", False), ("adam", True)])
def test_a_killed_run_resumes_bit_by_bit(tmp_path, loader, kind, channels_last):
    options = TrainingOptions(channels_last=channels_last, accumulate=2)
    plain = lambda model: float(torch.rand(()))
    whole, optimizer, schedule = make(kind)
    reference = fit(whole, loader(), optimizer, epochs=4, schedule=schedule, evaluate=plain, options=options)
    first, optimizer, schedule = make(kind)
    with pytest.raises(Killed):
        fit(
            first, loader(), optimizer, epochs=4, schedule=schedule, evaluate=killed_after(2),
            options=options, checkpoint=tmp_path / "state",
        )  # fmt: skip
    second, optimizer, schedule = make(kind)
    result = fit(
        second, loader(), optimizer, epochs=4, schedule=schedule, evaluate=plain,
        options=options, checkpoint=tmp_path / "state",
    )  # fmt: skip
    assert result.resumed_from == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    figures = lambda run: [(r.epoch, r.loss, r.metric, r.learning_rate) for r in run.history]
    assert figures(result) == figures(reference)


def test_the_same_seed_gives_the_same_model_and_another_one_does_not():
    def trained(seed: int) -> torch.Tensor:
        model, optimizer, _ = make()
        fit(model, own_loader(), optimizer, epochs=1, options=TrainingOptions(seed=seed))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_accumulation_equals_the_larger_batch():
    model = nn.Linear(64, 3).double()
    other = copy.deepcopy(model)
    data = IMAGES.flatten(1).double()
    for network, size, accumulate in ((model, 16, 1), (other, 8, 2)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        fit(
            network, BatchLoader(data, LABELS, size), optimizer, epochs=2,
            options=TrainingOptions(accumulate=accumulate),
        )  # fmt: skip
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=1e-14)


def test_clipping_bounds_the_step():
    model = nn.Linear(64, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loader = BatchLoader(IMAGES.flatten(1) * 100, LABELS, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, loader, optimizer, epochs=1, options=TrainingOptions(clip_norm=0.25))
    moved = sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(model.parameters(), before, strict=True))
    assert moved**0.5 == pytest.approx(0.25, rel=1e-5)


def test_bfloat16_trains_too():
    model, optimizer, _ = make()
    result = fit(model, own_loader(), optimizer, epochs=1, options=TrainingOptions(precision="bfloat16"))
    assert result.history[0].loss > 0
    assert model.stem.weight.dtype == torch.float32


def test_batches_of_keywords_and_output_objects():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, *, pixels):
            return {"logits": self.linear(pixels.flatten(1))}

    batches = [{"pixels": IMAGES, "labels": LABELS}]
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    result = fit(model, batches, optimizer, epochs=30)
    assert result.history[-1].loss < result.history[0].loss / 2
    assert accuracy(model, batches) > 0.9


def test_accuracy_counts_and_leaves_the_flags():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    model[0].eval()
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    labels = torch.tensor([0, 1, 1, 2])
    assert accuracy(model, [(logits[:3], labels[:3]), (logits[3:], labels[3:])]) == 0.5
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_broken_loss_is_an_error_and_the_model_stays():
    model, optimizer, _ = make()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss(outputs, target):
        calls.append(1)
        return nn.functional.cross_entropy(outputs, target) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(DwindleError, match="nan in batch 3"):
        fit(model, own_loader(), optimizer, epochs=1, loss=loss)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, optimizer, _ = make()
    fit(model, own_loader(), optimizer, epochs=2, checkpoint=tmp_path / "state")
    with pytest.raises(FileFormatError, match="only 1 are asked for"):
        fit(model, own_loader(), optimizer, epochs=1, checkpoint=tmp_path / "state")
    other = nn.Linear(4, 3)
    with pytest.raises(FileFormatError, match="does not belong to this run"):
        fit(
            other, [], torch.optim.SGD(other.parameters(), lr=1.0), epochs=2,
            checkpoint=tmp_path / "state",
        )  # fmt: skip


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        TrainingOptions(precision="bfloat")
    with pytest.raises(ConfigError, match="schedule_every"):
        TrainingOptions(schedule_every="batch")
    with pytest.raises(ConfigError, match="accumulate"):
        TrainingOptions(accumulate=0)
    model, optimizer, _ = make()
    with pytest.raises(ConfigError, match="no batch"):
        fit(model, [], optimizer, epochs=1)
    with pytest.raises(ConfigError, match="labels"):
        fit(model, [{"x": IMAGES}], optimizer, epochs=1)


def test_the_progress_bar_is_silent_unless_asked_for(capsys):
    model, optimizer, _ = make()
    fit(model, own_loader(), optimizer, epochs=1)
    assert capsys.readouterr() == ("", "")
    fit(model, own_loader(), optimizer, epochs=1, options=TrainingOptions(progress=True), description="tune")
    assert capsys.readouterr().out == ""
