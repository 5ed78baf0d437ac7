"""Models that carry masks of ``torch.nn.utils.prune`` compute the same after the import, and shrink."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dwindle as dw
from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.pruning import import_torch_masks, split_torch_state


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 12),
        nn.Linear(12, 5),
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pruned() -> nn.Sequential:
    """Several methods, several parameters, one of them pruned twice."""
    model = network()
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.custom_from_mask(model[0], "bias", (model[0].weight_mask.flatten(1).sum(1) > 0).float())
    prune.random_unstructured(model[4], "weight", amount=0.3)
    prune.l1_unstructured(model[4], "weight", amount=0.5)
    prune.global_unstructured([(model[4], "weight"), (model[5], "weight")], prune.L1Unstructured, amount=0.4)
    return model


def test_the_model_computes_the_same_and_is_plain_again() -> None:
    model = pruned()
    expected = model(X)
    originals = {id(p) for p in model.parameters()}
    counts = {
        name: int((buffer == 0).sum()) for name, buffer in model.named_buffers() if name.endswith("_mask")
    }
    masks = import_torch_masks(model)
    assert torch.equal(model(X), expected)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in network().named_parameters()
    ]
    assert {id(p) for p in model.parameters()} == originals
    assert not prune.is_pruned(model)
    found = {f"{m}.{t}_mask": int((mask == 0).sum()) for m, own in masks.items() for t, mask in own.items()}
    assert found == counts
    simulate.detach(model)
    assert torch.equal(model(X), expected)
    plain = network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), expected)


def test_the_optimizer_goes_on_and_masked_weights_stay_masked() -> None:
    twin, model = pruned(), pruned()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (twin, model)]
    for step in range(4):
        if step == 2:
            import_torch_masks(model)
        for m, optimizer in zip((twin, model), optimizers, strict=True):
            m(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(model(X), twin(X), rtol=0, atol=1e-7)


def test_what_is_masked_is_cut_with_proof() -> None:
    model = pruned().eval()
    expected = model(X)
    import_torch_masks(model)
    result = dw.realize(model, X)
    assert model[0].out_channels < 8 or result.notes
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_a_state_dict_is_split() -> None:
    model = pruned()
    plain, masks = split_torch_state(model.state_dict())
    fresh = network()
    fresh.load_state_dict(plain)
    assert torch.equal(fresh[4].weight, model[4].weight_orig)
    assert set(masks) == {"0", "4", "5"}
    with torch.no_grad():
        for module, own in masks.items():
            for name, mask in own.items():
                getattr(fresh[int(module)], name).mul_(mask)
    assert torch.equal(fresh(X), model(X))
    assert split_torch_state(plain) == (plain, {})


def test_recurrent_modules() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(4, 6), torch.randn(3, 2, 4)
    plain = copy.deepcopy(model)
    prune.l1_unstructured(model, "weight_hh_l0", amount=0.5)
    mask = model.weight_hh_l0_mask.clone()
    import_torch_masks(model)
    with torch.no_grad():
        plain.weight_hh_l0.mul_(mask)
    assert torch.equal(model(x)[0], plain(x)[0])
    simulate.detach(model)
    assert torch.equal(model(x)[0], plain(x)[0])
    assert list(model.state_dict()) == list(plain.state_dict())


def test_other_models_are_left_alone() -> None:
    model = network()
    model[0].register_buffer("own_mask", torch.ones(2))
    keys = list(model.state_dict())
    assert import_torch_masks(model) == {}
    assert list(model.state_dict()) == keys


def test_errors_before_anything_changed() -> None:
    model = pruned()
    keys = list(model.state_dict())
    with torch.no_grad():
        model[5].weight_mask[0, 0] = 0.5
    with pytest.raises(ConfigError, match=r"5\.weight_mask holds other values"):
        import_torch_masks(model)
    assert list(model.state_dict()) == keys
    model = pruned()
    model[5]._forward_pre_hooks.clear()
    with pytest.raises(ConfigError, match="no hook"):
        import_torch_masks(model)
    assert prune.is_pruned(model[0])
    state = dict(pruned().state_dict())
    with pytest.raises(ConfigError, match=r"beside '0\.weight_orig'"):
        split_torch_state(state | {"0.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="has shape"):
        split_torch_state(state | {"0.weight_mask": torch.ones(1)})
