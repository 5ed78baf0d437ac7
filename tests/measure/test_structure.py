"""Nested values taken apart and put together."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.measure.structure import (
    InputStructure,
    batched_inputs,
    example_call,
    flatten,
    output_names,
    with_batch,
)

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple | None = None


def test_round_trip_of_every_container():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    value = {
        "a": [one, 3, None],
        "b": Pair(two, "x"),
        "c": Output(three, (one, two)),
        "d": OrderedDict(e=one),
    }
    leaves, rebuild = flatten(value)
    assert [name for name, _ in leaves] == [
        "a_0", "b_left", "c_logits", "c_hidden_0", "c_hidden_1", "d_e",
    ]  # fmt: skip
    new = rebuild([tensor * 2 for _, tensor in leaves])
    assert new["a"][0] == 2
    assert new["a"][1:] == [3, None]
    assert isinstance(new["b"], Pair)
    assert new["b"].right == "x"
    assert torch.equal(new["c"].hidden[1], two * 2)
    assert isinstance(new["d"], OrderedDict)


def test_model_output_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(
        last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1), torch.ones(3))
    )
    leaves, rebuild = flatten(value)
    assert [name for name, _ in leaves] == ["last_hidden_state", "hidden_states_0", "hidden_states_1"]
    new = rebuild([tensor + 1 for _, tensor in leaves])
    assert type(new) is outputs.BaseModelOutput
    assert torch.equal(new.last_hidden_state, torch.full((2,), 2.0))
    assert torch.equal(new["hidden_states"][1], torch.full((3,), 2.0))


class Model(nn.Module):
    def forward(self, image, scale=1.0, *rest, extra=None, **options):
        return image


def test_names_come_from_the_signature_however_it_is_called():
    a, b, c, d, e = (torch.full((2,), float(i)) for i in range(5))
    structure = InputStructure(Model(), (a, 2.0, b), {"extra": {"x": c, "y": 1}, "free": d})
    assert structure.names == ["image", "rest_0", "extra_x", "free"]
    args, kwargs = structure.unflatten([a, b, c, e])
    assert args[0] is a
    assert args[1:] == (2.0, b)
    assert kwargs["extra"] == {"x": c, "y": 1}
    assert kwargs["free"] is e

    simple = InputStructure(Model(), (a,), {"extra": b})
    assert simple.flatten((), {"extra": c, "image": d}) == [d, c]
    with pytest.raises(ConfigError, match=r"missing \['extra'\]"):
        simple.flatten((a,), {})


def test_equal_tensor_twice_stays_two_inputs():
    x = torch.ones(2)
    structure = InputStructure(Model(), (x,), {"extra": x})
    y, z = torch.zeros(2), torch.full((2,), 5.0)
    args, kwargs = structure.unflatten([y, z])
    assert args[0] is y
    assert kwargs["extra"] is z


def test_wrong_arguments():
    class One(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match="do not fit"):
        InputStructure(One(), (torch.ones(1), torch.ones(1)))
    with pytest.raises(ConfigError, match="no tensor"):
        InputStructure(One(), (3,))
    with pytest.raises(ConfigError, match="example_inputs must be"):
        example_call(One(), 3, None)


def test_use_cache_is_switched_off_unless_said():
    class Decoder(nn.Module):
        config = type("Config", (), {"use_cache": True})()

        def forward(self, input_ids, use_cache=None):
            return input_ids

    x = torch.ones(1, 2, dtype=torch.long)
    assert example_call(Decoder(), (x,), None) == ((x,), {"use_cache": False})
    assert example_call(Decoder(), {"input_ids": x, "use_cache": True}, None)[1]["use_cache"] is True


def test_batches():
    image, ids, scalar, table = (
        torch.arange(6.0).view(2, 3),
        torch.tensor([1, 2]),
        torch.tensor(1.0),
        torch.ones(5, 2),
    )
    assert batched_inputs([image, ids, scalar, table]) == [True, True, False, False]
    more = with_batch([image, ids, scalar, table], 5)
    assert [tuple(tensor.shape) for tensor in more] == [(5, 3), (5,), (), (5, 2)]
    assert more[1].tolist() == [1, 2, 1, 2, 1]
    assert with_batch([image], 1)[0].tolist() == [[0.0, 1.0, 2.0]]


def test_output_names():
    x = torch.ones(1)
    assert output_names(x) == ["output"]
    assert output_names((x, [x])) == ["output_0", "output_1_0"]
    assert output_names({"logits": x, "more": (x,)}) == ["logits", "more_0"]
