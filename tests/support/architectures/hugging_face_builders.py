"""Builds Hugging Face models from small configs, with fitting inputs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from support.architectures.example import Builder, Example

#: Sizes that nearly every config understands; rows add to them or change them.
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 10}
AUDIO: dict[str, Any] = {
    "conv_dim": (32, 32),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}

Inputs = Callable[[], dict[str, torch.Tensor]]


def tokens(length: int = 8, low: int = 3) -> torch.Tensor:
    """A batch of two sentences without special tokens."""
    return torch.randint(low, 100, (2, length))


def text() -> dict[str, torch.Tensor]:
    """One sentence an example."""
    return {"input_ids": tokens()}


def masked_text() -> dict[str, torch.Tensor]:
    """Sentences with their padding mask, as a tokenizer gives them."""
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}


def long_text() -> dict[str, torch.Tensor]:
    """Enough tokens for local attention windows."""
    return {"input_ids": tokens(32)}


def text_with_entities() -> dict[str, torch.Tensor]:
    """Sentences in which two entities of three words each are marked."""
    spans = torch.tensor([[1, 2, 3, -1], [4, 5, 6, -1]])
    return {
        "input_ids": tokens(),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "entity_ids": torch.randint(1, 20, (2, 2)),
        "entity_attention_mask": torch.ones(2, 2, dtype=torch.int64),
        "entity_position_ids": spans.expand(2, 2, 4).contiguous(),
    }


def picture_among_words() -> dict[str, torch.Tensor]:
    """Sentences in which sixteen placeholders stand for the patches of a picture."""
    words = tokens(20).clamp(max=98)
    words[:, 2:18] = 99
    return {"input_ids": words, "pixel_values": torch.randn(2, 3, 32, 32)}


def sequence_pair() -> dict[str, torch.Tensor]:
    """Source and target of an encoder-decoder."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def image(size: int = 32, channels: int = 3) -> Inputs:
    """Pictures."""
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def wave(samples: int = 800) -> Inputs:
    """Raw audio."""
    return lambda: {"input_values": torch.randn(2, samples)}


def spectrum(name: str, *shape: int) -> Inputs:
    """Spectrograms or other features under the model's own name."""
    return lambda: {name: torch.randn(2, *shape)}


def picture_and_text() -> dict[str, torch.Tensor]:
    """A picture with a caption."""
    return {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which ``("Config", {...})`` has become that config, without those that are None."""
    import transformers

    made = {}
    for key, held in options.items():
        if held is None:
            continue
        if isinstance(held, tuple) and len(held) == 2 and str(held[0]).endswith("Config"):
            held = getattr(transformers, held[0])(**resolved(held[1]))
        made[key] = held
    return made


def from_config(model: str, config: str, inputs: Inputs, **options: Any) -> Builder:
    """A builder for ``transformers.<model>`` with a small ``transformers.<config>``; an option None is not given."""

    def build() -> Example:
        import transformers

        settings = getattr(transformers, config)(**resolved({**SMALL, **options}))
        return Example(getattr(transformers, model)(settings), (), inputs())

    return build


def family(prefix: str, head: str, inputs: Inputs = text, **options: Any) -> Builder:
    """A builder where the names are ``<prefix><head>`` and ``<prefix>Config``."""
    return from_config(prefix + head, prefix + "Config", inputs, **options)


def lifted(builder: Builder, path: str) -> Builder:
    """The same model with ones as a bias: a last rectifier would give zeros for random weights, whatever they are."""

    def build() -> Example:
        example = builder()
        torch.nn.init.ones_(example.model.get_submodule(path).bias)
        return example

    return build


def positional(builder: Builder) -> Builder:
    """The same model called with positional arguments."""

    def build() -> Example:
        example = builder()
        return Example(example.model, tuple(example.kwargs.values()), {}, example.note)

    return build


def noted(builder: Builder, note: str) -> Builder:
    """The same model with a note for the sweep's table."""

    def build() -> Example:
        example = builder()
        example.note = note
        return example

    return build


CLASSIFIER, CAUSAL, MASKED = "ForSequenceClassification", "ForCausalLM", "ForMaskedLM"
CONDITIONAL, PICTURE = "ForConditionalGeneration", "ForImageClassification"
