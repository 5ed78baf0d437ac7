"""Hugging Face models of audio, of several modalities, and of time series."""

from __future__ import annotations

from typing import Any

import torch

from support.architectures.example import Builder
from support.architectures.hugging_face_builders import (
    AUDIO,
    CAUSAL,
    CLASSIFIER,
    CONDITIONAL,
    IMAGE,
    SMALL,
    family,
    from_config,
    picture_among_words,
    picture_and_text,
    spectrum,
    text,
    tokens,
    wave,
)

AUDIO_MODELS: dict[str, Builder] = {
    "ast": family(
        "AST",
        "ForAudioClassification",
        spectrum("input_values", 32, 16),
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    "clap_audio": from_config(
        "ClapAudioModelWithProjection",
        "ClapAudioConfig",
        spectrum("input_features", 1, 64, 16),
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 4],
        num_mel_bins=16,
        spec_size=32,
        window_size=4,
        patch_size=2,
        patch_stride=[2, 2],
        projection_dim=16,
        num_hidden_layers=None,
        enable_fusion=False,
    ),
    "data2vec_audio": family(
        "Data2VecAudio", "ForSequenceClassification", wave(), **{**AUDIO, "conv_pos_kernel_size": 5}
    ),
    "encodec": family(
        "Encodec",
        "Model",
        spectrum("input_values", 1, 640),
        num_filters=8,
        hidden_size=32,
        codebook_size=16,
        num_lstm_layers=1,
        upsampling_ratios=[4, 2],
        codebook_dim=32,
        num_hidden_layers=None,
    ),
    "hubert": family("Hubert", "ForSequenceClassification", wave(), **AUDIO),
    "sew": family("SEW", "ForSequenceClassification", wave(), squeeze_factor=2, **AUDIO),
    "speech_to_text": family(
        "Speech2Text",
        CONDITIONAL,
        lambda: {"input_features": torch.randn(2, 32, 16), "decoder_input_ids": tokens(5)},
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        input_feat_per_channel=16,
        conv_channels=64,
        max_source_positions=64,
        max_target_positions=64,
        decoder_start_token_id=0,
        num_conv_layers=2,
        conv_kernel_sizes=(5, 5),
    ),
    "unispeech": family("UniSpeech", "ForSequenceClassification", wave(), **AUDIO),
    "unispeech_sat": family("UniSpeechSat", "ForSequenceClassification", wave(), **AUDIO),
    "univnet": family(
        "UnivNet",
        "Model",
        lambda: {"input_features": torch.randn(2, 8, 16), "noise_sequence": torch.randn(2, 8, 16)},
        model_in_channels=16,
        model_hidden_channels=16,
        num_mel_bins=16,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[4],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_hidden_channels=16,
        kernel_predictor_num_blocks=1,
    ),
    "wav2vec2": family("Wav2Vec2", "ForSequenceClassification", wave(), **AUDIO),
    "wav2vec2_bert": family(
        "Wav2Vec2Bert",
        "ForSequenceClassification",
        spectrum("input_features", 20, 16),
        feature_projection_input_dim=16,
        position_embeddings_type="relative_key",
        apply_spec_augment=False,
    ),
    "wav2vec2_ctc": family(
        "Wav2Vec2", "ForCTC", wave(), do_stable_layer_norm=True, feat_extract_norm="layer", **AUDIO
    ),
    "wav2vec2_conformer": family(
        "Wav2Vec2Conformer", "ForSequenceClassification", wave(), position_embeddings_type="relative", **AUDIO
    ),
    "wavlm": family("WavLM", "ForSequenceClassification", wave(), **AUDIO),
    "whisper": family(
        "Whisper",
        CONDITIONAL,
        lambda: {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": tokens(5)},
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        decoder_start_token_id=0,
    ),
}

TEXT_PART: dict[str, Any] = {**SMALL}
VISION_PART: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}

MULTIMODAL: dict[str, Builder] = {
    "align": family(
        "Align",
        "Model",
        lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 64, 64)},
        text_config=TEXT_PART,
        vision_config={
            "width_coefficient": 0.25,
            "hidden_dim": 640,
            "num_block_repeats": [1] * 7,
            "initializer_range": 0.3,
        },
        projection_dim=80,
    ),
    "blip": family(
        "Blip",
        "ForImageTextRetrieval",
        picture_and_text,
        text_config={**TEXT_PART, "encoder_hidden_size": 64},
        vision_config=VISION_PART,
        image_text_hidden_size=32,
    ),
    "bridgetower": family(
        "BridgeTower",
        "ForImageAndTextRetrieval",
        picture_and_text,
        text_config=TEXT_PART,
        vision_config={**VISION_PART},
    ),
    "chinese_clip": family(
        "ChineseCLIP", "Model", picture_and_text, text_config=TEXT_PART, vision_config=VISION_PART
    ),
    "clip": family(
        "CLIP", "Model", picture_and_text, text_config=TEXT_PART, vision_config=VISION_PART, projection_dim=32
    ),
    "clipseg": family(
        "CLIPSeg",
        "ForImageSegmentation",
        picture_and_text,
        text_config=TEXT_PART,
        vision_config=VISION_PART,
        extract_layers=[0, 1],
        reduce_dim=32,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        projection_dim=32,
    ),
    "flava": family(
        "Flava",
        "Model",
        picture_and_text,
        text_config=TEXT_PART,
        image_config=VISION_PART,
        multimodal_config=VISION_PART,
    ),
    "git": family("Git", CAUSAL, picture_and_text, vision_config=VISION_PART),
    "layoutlmv3": family(
        "LayoutLMv3",
        CLASSIFIER,
        text,
        coordinate_size=10,
        shape_size=12,
        max_2d_position_embeddings=32,
        input_size=32,
        patch_size=8,
    ),
    "llava": family(
        "Llava",
        CONDITIONAL,
        picture_among_words,
        text_config={**TEXT_PART, "model_type": "llama", "num_key_value_heads": 2},
        vision_config={**VISION_PART, "model_type": "clip_vision_model"},
        image_token_id=99,
        vision_feature_layer=-1,
    ),
    "lxmert": family(
        "Lxmert",
        "ForQuestionAnswering",
        lambda: {
            "input_ids": tokens(),
            "visual_feats": torch.randn(2, 4, 32),
            "visual_pos": torch.rand(2, 4, 4),
        },
        visual_feat_dim=32,
        l_layers=1,
        r_layers=1,
        x_layers=1,
        num_qa_labels=10,
        num_hidden_layers=None,
    ),
    "owlvit": family(
        "OwlViT",
        "ForObjectDetection",
        lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)},
        text_config=TEXT_PART,
        vision_config=VISION_PART,
        projection_dim=64,
    ),
    "siglip": family("Siglip", "Model", picture_and_text, text_config=TEXT_PART, vision_config=VISION_PART),
    "vilt": family("Vilt", "ForQuestionAnswering", picture_and_text, **IMAGE),
    "visual_bert": family(
        "VisualBert",
        "ForQuestionAnswering",
        lambda: {
            "input_ids": tokens(),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
            "visual_embeds": torch.randn(2, 4, 32),
        },
        visual_embedding_dim=32,
    ),
}

FORECAST: dict[str, Any] = {
    "prediction_length": 8,
    "context_length": 20,
    "lags_sequence": [1, 2, 3, 4],
    "num_time_features": 2,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def past_and_future() -> dict[str, torch.Tensor]:
    """A series of 24 steps and the 8 that follow."""
    return {
        "past_values": torch.randn(2, 24),
        "past_time_features": torch.randn(2, 24, 2),
        "past_observed_mask": torch.ones(2, 24),
        "future_values": torch.randn(2, 8),
        "future_time_features": torch.randn(2, 8, 2),
    }


def trajectory() -> dict[str, torch.Tensor]:
    """Four steps of an agent."""
    return {
        "states": torch.randn(2, 4, 6),
        "actions": torch.randn(2, 4, 3),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    }


SERIES: dict[str, Builder] = {
    "autoformer": family(
        "Autoformer", "Model", past_and_future, label_length=4, moving_average=5, **FORECAST
    ),
    "decision_transformer": family(
        "DecisionTransformer",
        "Model",
        trajectory,
        state_dim=6,
        act_dim=3,
        n_layer=2,
        n_head=4,
        n_positions=64,
        max_ep_len=32,
    ),
    "informer": family("Informer", "ForPrediction", past_and_future, **FORECAST),
    "patchtsmixer": family(
        "PatchTSMixer",
        "ForPrediction",
        spectrum("past_values", 32, 3),
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_input_channels=3,
        d_model=32,
        num_layers=2,
        prediction_length=8,
    ),
    "patchtst": family(
        "PatchTST",
        "ForPrediction",
        spectrum("past_values", 32, 3),
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=64,
        ffn_dim=128,
        prediction_length=8,
    ),
    "time_series_transformer": family("TimeSeriesTransformer", "ForPrediction", past_and_future, **FORECAST),
}
