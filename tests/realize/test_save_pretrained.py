"""After a prune a Hugging Face model saves and loads by its own library, with no dwindle in the process."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw

transformers = pytest.importorskip("transformers")
T: Any = transformers

#: Loads what was saved and compares the outputs with the saved ones, folder by folder as they are named on its
#: input. It knows torch and transformers only.
READER = """
import json, sys, traceback
import torch, transformers

def read(folder):
    case = json.load(open(folder + "/case.json"))
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    expected = torch.load(folder + "/outputs.pt", weights_only=True)
    model = getattr(transformers, case["class"]).from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = [t for t in model(**inputs).values() if isinstance(t, torch.Tensor)]
    gaps = [float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    return {"gap": max(gaps), "parameters": parameters, "dwindle": "dwindle" in sys.modules}

for line in sys.stdin:
    try:
        seen = read(line.strip())
    except Exception:
        seen = {"failed": traceback.format_exc()}
    print("SEEN", json.dumps(seen), flush=True)
"""

Made = tuple[nn.Module, dict[str, torch.Tensor]]


def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 7))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def bert() -> Made:
    config = T.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return T.BertForSequenceClassification(config), {"input_ids": tokens()}


def gpt2() -> Made:
    config = T.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    return T.GPT2LMHeadModel(config), {"input_ids": tokens()}


def llama() -> Made:
    config = T.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        use_cache=False,
    )
    return T.LlamaForCausalLM(config), {"input_ids": tokens()}


def t5() -> Made:
    config = T.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens()}


def vit() -> Made:
    config = T.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    return T.ViTForImageClassification(config), {"pixel_values": images()}


def opt() -> Made:
    config = T.OPTConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        use_cache=False,
    )
    return T.OPTForCausalLM(config), {"input_ids": tokens()}


def distilbert() -> Made:
    config = T.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    return T.DistilBertForSequenceClassification(config), {"input_ids": tokens()}


def resnet() -> Made:
    config = T.ResNetConfig(embedding_size=16, hidden_sizes=[32, 48], depths=[2, 2])
    return T.ResNetForImageClassification(config), {"pixel_values": images()}


def convnext() -> Made:
    config = T.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, patch_size=4)
    return T.ConvNextForImageClassification(config), {"pixel_values": images()}


def clip() -> Made:
    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "max_position_embeddings": 32, "eos_token_id": 98}  # fmt: skip
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return T.CLIPModel(config), {"input_ids": tokens(), "pixel_values": images()}


MODELS: dict[str, Callable[[], Made]] = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit, "opt": opt, "distilbert": distilbert,
    "resnet": resnet, "convnext": convnext, "clip": clip,
}  # fmt: skip


def prune(made: Made, **options: Any) -> dw.realize.ShrinkResult:
    model, inputs = made
    model.eval()
    return dw.prune(model, (), example_kwargs=inputs, **{"ratio": 0.5, **options})


def tensors(output: Any) -> list[torch.Tensor]:
    return [tensor for tensor in output.values() if isinstance(tensor, torch.Tensor)]


def read_elsewhere(made: Made, folder: Path) -> dict[str, Any]:
    """Save with the model's own method, load in another process, and return what that one saw."""
    model, inputs = made
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save(tensors(model(**inputs)), folder / "outputs.pt")
    torch.save(inputs, folder / "inputs.pt")
    (folder / "case.json").write_text(json.dumps({"class": type(model).__name__}))
    reader = reading_process()
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(f"{folder}\n")
    reader.stdin.flush()
    said = next(line for line in reader.stdout if line.startswith("SEEN "))
    seen: dict[str, Any] = json.loads(said.removeprefix("SEEN "))
    assert "failed" not in seen, seen["failed"]
    return seen


@functools.cache
def reading_process() -> subprocess.Popen[str]:
    """The other process: one for all tests, since it takes seconds to import what it needs."""
    reader = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(reader.kill)
    return reader


def assert_round_trip(made: Made, folder: Path) -> None:
    seen = read_elsewhere(made, folder)
    assert not seen["dwindle"]
    assert seen["parameters"] == sum(parameter.numel() for parameter in made[0].parameters())
    assert seen["gap"] < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_half_of_everything_round_trips(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = MODELS[name]()
    result = prune(made, uniform=True)
    assert result.parameters_after < 0.6 * result.parameters_before
    assert result.configuration.described, result.configuration.reason
    assert result.configuration.difference < 1e-9
    assert_round_trip(made, tmp_path)


def test_without_being_asked_a_uniform_result_is_described() -> None:
    made = bert()
    result = prune(made)
    assert result.configuration.settings == {
        "hidden_size": (32, 16),
        "intermediate_size": (48, 24),
        "num_attention_heads": (4, 2),
    }
    assert made[0].config.hidden_size == 16
    assert made[0].config.num_attention_heads == 2
    assert made[0].bert.encoder.layer[0].attention.self.num_attention_heads == 2


def test_uniform_moves_what_the_config_sizes_together() -> None:
    """For BERT hidden = heads x width in every layer, and nothing between 32 and 24 has three heads of 8."""
    made = bert()
    result = prune(made, ratio=0.3, uniform=True)
    assert result.configuration.settings["hidden_size"] == (32, 24)
    assert result.configuration.settings["num_attention_heads"] == (4, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5, "scope": "global"},
        {"ratio": None, "target": {"params": 0.5}},
        {"ratio": None, "target": {"macs": 0.5}, "scope": "global"},
        {"ratio": 0.34, "axes": ["block", "feed_forward"]},
        {"ratio": 0.5, "round_to": 8},
    ],
    ids=str,
)
def test_uniform_goes_with_every_way_to_choose(options: dict[str, Any], tmp_path: Path) -> None:
    made = llama()
    result = prune(made, **{"uniform": True, **options})
    assert result.configuration is not None
    assert result.configuration.settings
    if "target" in options:
        ((name, share),) = options["target"].items()
        assert name == "macs" or abs(result.parameters_after / result.parameters_before - share) < 0.02
    assert_round_trip(made, tmp_path)


def test_only_the_embedding_is_asked_for() -> None:
    made = bert()
    result = prune(made, axes=["embedding"], uniform=True)
    assert result.configuration.described
    assert made[0].config.hidden_size == 16
    assert made[0].config.intermediate_size == 48


def test_what_the_class_refuses_is_widened(tmp_path: Path) -> None:
    """A hidden size of 45 with 6 heads is refused by the config's own check."""
    torch.manual_seed(0)
    made = llama()
    result = prune(made, ratio=0.3, uniform=True)
    assert result.configuration.described, result.configuration.reason
    assert made[0].config.num_attention_heads == 6
    assert made[0].config.hidden_size % 6 == 0
    assert_round_trip(made, tmp_path)


def test_a_setting_that_was_none_is_set(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = gpt2()
    result = prune(made, axes=["feed_forward"])
    assert result.configuration.settings == {"n_inner": (None, 64)}
    assert_round_trip(made, tmp_path)


def test_head_width_is_described_and_its_stored_scale_taken_up(tmp_path: Path) -> None:
    """Its scale is stored at construction; a model built anew has another one."""
    torch.manual_seed(0)
    made = vit()
    old = made[0].vit.layers[0].attention.scaling
    result = prune(made, axes=["head_width", "embedding"], uniform=True)
    assert result.configuration.described, result.configuration.reason
    assert made[0].config.num_attention_heads == 4
    assert made[0].config.hidden_size == 16
    new = made[0].vit.layers[0].attention.scaling
    assert new == pytest.approx(old * 2**0.5)
    assert result.plan.scales
    assert_round_trip(made, tmp_path)


def test_blocks_that_went_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = llama()
    result = prune(made, axes=["block", "feed_forward"])
    assert result.configuration.settings["num_hidden_layers"] == (2, 1)
    assert_round_trip(made, tmp_path)


def test_the_users_config_stays_as_it_was() -> None:
    config = T.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32
    )
    made = T.ViTForImageClassification(config), {"pixel_values": images()}
    prune(made)
    assert made[0].config.hidden_size == 16
    assert config.hidden_size == 32
    assert T.ViTForImageClassification(config).vit.embeddings.cls_token.shape[-1] == 32


def test_rotations_that_a_config_computes_otherwise_are_said_and_kept_out() -> None:
    """Frequencies depend on the head width: those that stayed are not those that a new config gives."""
    torch.manual_seed(0)
    made = llama()
    with torch.no_grad():
        for layer in made[0].model.layers:  # pairs 2 and 3 are the important ones
            layer.self_attn.q_proj.weight.view(8, 2, 4, -1)[:, :, 2:] *= 10
            layer.self_attn.k_proj.weight.view(4, 2, 4, -1)[:, :, 2:] *= 10
    result = prune(made, axes=["head_width"])
    assert not result.configuration.described
    assert "inv_freq" in result.configuration.reason
    assert any("dwindle.save" in note for note in result.notes)
    again = llama()
    uniform = prune(again, axes=["head_width", "feed_forward"], uniform=True)
    assert uniform.configuration.described, uniform.configuration.reason
    assert again[0].config.intermediate_size == 48


def nonuniform(made: Made) -> dw.realize.ShrinkResult:
    return prune(made, ratios={"bert.encoder.layer.0.intermediate": 0.25}, axes=["feed_forward"])


def test_what_no_config_describes_is_said_and_saved_with_the_manifest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = bert()
    result = nonuniform(made)
    model, inputs = made
    assert not result.configuration.described
    assert "intermediate_size gives both the same size" in result.configuration.reason
    assert model.config.intermediate_size == 48
    dw.save(result, tmp_path / "small")
    loaded = dw.load(tmp_path / "small", model=lambda: bert()[0]).eval()
    with torch.no_grad():
        for own, other in zip(tensors(model(**inputs)), tensors(loaded(**inputs)), strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize("name", ["bert", "clip", "t5"])
def test_described_models_go_through_the_manifest_too(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = MODELS[name]()
    result = prune(made)
    assert result.configuration.described
    dw.save(result, tmp_path / "small")
    loaded = dw.load(tmp_path / "small", model=lambda: MODELS[name]()[0]).eval()
    assert loaded.config.to_dict() == made[0].config.to_dict()
    with torch.no_grad():
        for own, other in zip(tensors(made[0](**made[1])), tensors(loaded(**made[1])), strict=True):
            assert torch.equal(own, other)


def test_pruned_twice_described_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = gpt2()
    prune(made, ratio=0.25, uniform=True)
    assert (made[0].config.n_embd, made[0].config.n_head) == (24, 3)
    prune(made, ratio=0.4, uniform=True)
    assert (made[0].config.n_embd, made[0].config.n_head) == (16, 2)
    assert_round_trip(made, tmp_path)


def test_uniform_needs_a_config() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(dw.ConfigError, match="uniform: Sequential has no config"):
        dw.prune(model, torch.randn(2, 4), ratio=0.5, uniform=True)
    assert model[0].out_features == 8
