"""Hugging Face architectures from small configs: text, vision, audio, multimodal and time series, nothing downloaded.

Each row of the tables names the config, the model class with its head, and what differs from the common small sizes.
"""

from __future__ import annotations

from support.architectures import hugging_face_senses as senses
from support.architectures import hugging_face_text as language
from support.architectures import hugging_face_vision as vision
from support.architectures.example import Builder

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
