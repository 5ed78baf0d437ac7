"""Every hand-written awkward model: pruned by half, proven twice, trained in both modes, or left alone for a reason."""

from __future__ import annotations

import pytest
import torch

import dwindle as dw
from support.architectures.check import check, example_of
from support.architectures.hand_written import MODELS

#: Share of the parameters that must go at least, where it is not :data:`USUAL`, and why.
LEAST_GONE = {
    "encoder_layer_alone": 0.2,  # its width is input and output
    "channel_shuffle_of_groups": 0.35,  # 4 x 3 channels become 3 x 4
    "local_response_norm": 0.38,  # neighbouring channels are one
    "closure_constants": 0.38,  # a tensor of nobody has the channels
    "parametrized_symmetric": 0.15,  # the order of rows and columns matters
    "outer_products": 0.3,  # a factor times itself
    "gram_matrix": 0.0,  # nothing but a factor times itself
    "reductions_of_channels": 0.38,
    "best_channels": 0.4,  # the largest channels are picked
    "strided_views": 0.4,
    "einsum_diagonal": 0.4,
    "permuted_by_a_buffer": 0.4,
    "unused_head": 0.45,  # nothing calls it
    "single_linear": 0.0,
    "no_parameters": 0.0,
}
USUAL = 0.46
#: The part of each frozen axis' reason that must be told.
REASONS = {
    "gram_matrix": "multiplied with itself",
    "closure_constants": "a constant tensor that no module owns",
    "strided_views": "memory",
    "spectrogram": "Fourier",
    "literal_sizes": "is a literal in the code",
    "best_channels": "uses the order of its indices",
    "local_response_norm": "spatial",  # torch slides a window over the channels
    "parametrized_symmetric": "triu uses the order",
    "permuted_by_a_buffer": "looked up by number",
    "unused_head": "no recorded run uses it",
}


@pytest.mark.parametrize("name", MODELS)
def test_pruned_proven_and_trained(name: str) -> None:
    row = check(f"own/{name}", onnx=False)
    assert row.failures == {}
    assert 1 - row.left >= LEAST_GONE.get(name, USUAL)
    assert row.in_place or row.cuts == 0
    assert row.unknown == []
    if row.cuts and row.exact_left is not None and row.exact_left < 1:
        assert row.independent_difference is not None
        assert row.independent_moved is not None
        assert row.independent_moved > 1e-6


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_has_a_reason(name: str) -> None:
    example = example_of(f"own/{name}")
    result = dw.prune(example.model, example.args, example_kwargs=example.kwargs, ratio=0.5, verify=False)
    assert any(REASONS[name] in entry["reason"] for entry in result.frozen)


@pytest.mark.parametrize("name", ["spectral_norm_by_hook", "spectral_norm_parametrized"])
def test_pruning_takes_no_step_of_the_power_iteration(name: str) -> None:
    """In training mode reading a spectrally normed weight moves its vectors: dwindle must not."""
    model = example_of(f"own/{name}").model.train()
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    example = example_of(f"own/{name}")
    result = dw.prune(model, example.args, ratio=0.5)
    for key, tensor in model.named_buffers():
        expected = before[key]
        for dim, index in result.plan.keep[key].items():
            expected = expected.index_select(dim, index)
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("name", ["single_linear", "no_parameters", "gram_matrix"])
def test_nothing_to_prune_is_said(name: str) -> None:
    example = example_of(f"own/{name}")
    result = dw.prune(example.model, example.args, example_kwargs=example.kwargs, ratio=0.5)
    assert result.plan.is_empty()
    assert any("nothing was cut" in note for note in result.notes)
