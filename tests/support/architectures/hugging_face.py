"""Hugging Face architectures from small configs: text, vision, audio, multimodal and time series, nothing downloaded.

Each row of the tables names the config, the model class with its head, and what differs from the common small sizes.
"""

from __future__ import annotations

from support.architectures import hugging_face_senses as senses
from support.architectures import hugging_face_text as language
from support.architectures import hugging_face_vision as vision
from support.architectures.example import Builder
from support.architectures.hugging_face_builders import noted

MODELS: dict[str, Builder] = {
    **language.ENCODERS,
    **language.DECODERS,
    **language.EXPERT_MODELS,
    **language.SCANS,
    **language.ENCODER_DECODERS,
    **language.CACHES,
    **vision.VISION,
    **senses.AUDIO_MODELS,
    **senses.MULTIMODAL,
    **senses.SERIES,
}

_NOTES = {
    "blip": "hidden states are among the outputs",
    "dinov3_vit": "no head: hidden states are the output",
    "flava": "no head: hidden states are the output",
    "fnet": "the embedding is mixed by a Fourier transform",
    "longformer": "heads are merged with the batch and cut into single indices, so heads and embedding stay",
    "rwkv": "its code changes tensors in place in evaluation mode: it trains in training mode only",
}
MODELS |= {name: noted(MODELS[name], note) for name, note in _NOTES.items()}
