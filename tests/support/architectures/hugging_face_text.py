"""Hugging Face text models: encoders, decoders, experts, scans, encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch

from support.architectures.example import Builder, Example
from support.architectures.hugging_face_builders import (
    CAUSAL,
    CLASSIFIER,
    CONDITIONAL,
    EXPERTS,
    GROUPED,
    MASKED,
    family,
    from_config,
    long_text,
    masked_text,
    positional,
    sequence_pair,
    text,
    text_with_entities,
    tokens,
)

ENCODERS: dict[str, Builder] = {
    "albert": family("Albert", CLASSIFIER, embedding_size=32),
    "bert": positional(family("Bert", CLASSIFIER)),
    "bert_masked_lm": family("Bert", MASKED, masked_text),
    "big_bird": family("BigBird", CLASSIFIER, long_text, attention_type="original_full"),
    "camembert": family("Camembert", "ForTokenClassification"),
    "canine": family(
        "Canine", "ForTokenClassification", long_text, num_hash_buckets=64, local_attention_window=8
    ),
    "convbert": family("ConvBert", CLASSIFIER, embedding_size=32, head_ratio=2, conv_kernel_size=3),
    "deberta": family("Deberta", CLASSIFIER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": family(
        "DebertaV2", CLASSIFIER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "distilbert": family("DistilBert", "ForQuestionAnswering", dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    "electra": family("Electra", CLASSIFIER, embedding_size=32),
    "ernie": family("Ernie", CLASSIFIER),
    "esm": family("Esm", CLASSIFIER, position_embedding_type="rotary", mask_token_id=99),
    "fnet": family("FNet", CLASSIFIER),
    "funnel": family(
        "Funnel",
        CLASSIFIER,
        d_model=64,
        n_head=4,
        d_head=16,
        d_inner=128,
        block_sizes=[1, 1],
        num_hidden_layers=None,
    ),
    "ibert": family("IBert", CLASSIFIER),
    "layoutlm": family("LayoutLM", CLASSIFIER),
    "longformer": family("Longformer", CLASSIFIER, long_text, attention_window=8),
    "luke": family("Luke", MASKED, text_with_entities, entity_vocab_size=20, entity_emb_size=32),
    "megatron_bert": family("MegatronBert", CLASSIFIER),
    "mobilebert": family(
        "MobileBert", CLASSIFIER, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32
    ),
    "modernbert": family("ModernBert", MASKED, global_attn_every_n_layers=2, local_attention=8),
    "mpnet": family("MPNet", CLASSIFIER),
    "nystromformer": family(
        "Nystromformer", CLASSIFIER, long_text, num_landmarks=8, segment_means_seq_len=32
    ),
    "rembert": family("RemBert", CLASSIFIER, input_embedding_size=32, output_embedding_size=32),
    "roberta": family("Roberta", CLASSIFIER),
    "roformer": family("RoFormer", CLASSIFIER),
    "squeezebert": family("SqueezeBert", CLASSIFIER, embedding_size=64),
    "xlm": family("XLM", "WithLMHeadModel", emb_dim=64, n_layers=2, n_heads=4, n_words=100),
    "xlm_roberta": family("XLMRoberta", CLASSIFIER),
    "xlnet": family(
        "XLNet", CLASSIFIER, d_model=64, n_layer=2, n_head=4, d_inner=128, max_position_embeddings=None
    ),
}

DECODERS: dict[str, Builder] = {
    "biogpt": family("BioGpt", CAUSAL),
    "bloom": family("Bloom", CAUSAL, n_layer=2, n_head=4),
    "codegen": family("CodeGen", CAUSAL, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
    "cohere": family("Cohere", CAUSAL, **GROUPED),
    "ctrl": family("CTRL", "LMHeadModel", n_embd=64, n_layer=2, n_head=4, dff=128, n_positions=64),
    "exaone4": family("Exaone4", CAUSAL, **GROUPED),
    "falcon": family("Falcon", CAUSAL, multi_query=True, new_decoder_architecture=False),
    "falcon_alibi": family("Falcon", CAUSAL, alibi=True, new_decoder_architecture=True, num_kv_heads=2),
    "gemma": family("Gemma", CAUSAL, head_dim=16, **GROUPED),
    "gemma2": family("Gemma2", CAUSAL, head_dim=16, **GROUPED),
    "gemma3": from_config("Gemma3ForCausalLM", "Gemma3TextConfig", text, head_dim=16, **GROUPED),
    "glm": family("Glm", CAUSAL, head_dim=16, **GROUPED),
    "gpt2": family("GPT2", "LMHeadModel", n_positions=64),
    "gpt_bigcode": family("GPTBigCode", CAUSAL, n_positions=64, multi_query=True),
    "gpt_neo": family(
        "GPTNeo", CAUSAL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_neox": family("GPTNeoX", CAUSAL),
    "gptj": family("GPTJ", CAUSAL, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
    "granite": family("Granite", CAUSAL, **GROUPED),
    "helium": family("Helium", CAUSAL, head_dim=16, **GROUPED),
    "llama": family("Llama", CAUSAL, **GROUPED),
    "mistral": family("Mistral", CAUSAL, masked_text, **GROUPED),
    "nemotron": family("Nemotron", CAUSAL, **GROUPED),
    "olmo": family("Olmo", CAUSAL, **GROUPED),
    "olmo2": family("Olmo2", CAUSAL, **GROUPED),
    "opt": family("OPT", CAUSAL, ffn_dim=128, word_embed_proj_dim=32),
    "persimmon": family("Persimmon", CAUSAL),
    "phi": family("Phi", CAUSAL),
    "phi3": family("Phi3", CAUSAL, **GROUPED),
    "qwen2": family("Qwen2", CAUSAL, **GROUPED),
    "qwen3": family("Qwen3", CAUSAL, head_dim=16, **GROUPED),
    "smollm3": family("SmolLM3", CAUSAL, **GROUPED),
    "stablelm": family("StableLm", CAUSAL, **GROUPED),
    "starcoder2": family("Starcoder2", CAUSAL, **GROUPED),
    "xglm": family("XGLM", CAUSAL, d_model=64, num_layers=2, attention_heads=4, ffn_dim=128),
}

EXPERT_MODELS: dict[str, Builder] = {
    "deepseek_v3": family(
        "DeepseekV3",
        CAUSAL,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "gpt_oss": family("GptOss", CAUSAL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "granitemoe": family("GraniteMoe", CAUSAL, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "jetmoe": family("JetMoe", CAUSAL, kv_channels=16, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "mixtral": family("Mixtral", CAUSAL, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "olmoe": family("Olmoe", CAUSAL, **EXPERTS),
    "phimoe": family("Phimoe", CAUSAL, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "qwen2_moe": family("Qwen2Moe", CAUSAL, shared_expert_intermediate_size=32, **EXPERTS),
    "qwen3_moe": family("Qwen3Moe", CAUSAL, head_dim=16, **EXPERTS),
    "switch_transformers": family(
        "SwitchTransformers",
        CONDITIONAL,
        sequence_pair,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        num_decoder_layers=2,
        decoder_start_token_id=0,
    ),
}

SCANS: dict[str, Builder] = {
    "bamba": family(
        "Bamba",
        CAUSAL,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=8,
        mamba_chunk_size=4,
        attn_layer_indices=[1],
        **GROUPED,
    ),
    "falcon_mamba": family("FalconMamba", CAUSAL, state_size=8),
    "jamba": family(
        "Jamba",
        CAUSAL,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
        **GROUPED,
    ),
    "mamba": family("Mamba", CAUSAL, state_size=8),
    "mamba2": family("Mamba2", CAUSAL, state_size=8, num_heads=4, head_dim=32, chunk_size=4, n_groups=1),
    "recurrent_gemma": family(
        "RecurrentGemma",
        CAUSAL,
        block_types=("recurrent", "attention"),
        lru_width=64,
        attention_window_size=16,
        **GROUPED,
    ),
    "rwkv": family("Rwkv", CAUSAL, attention_hidden_size=64, context_length=64),
}

ENCODER_DECODERS: dict[str, Builder] = {
    name: family(
        prefix,
        CONDITIONAL,
        sequence_pair,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        decoder_start_token_id=0,
        forced_eos_token_id=2,
        **options,
    )
    for name, prefix, options in (
        ("bart", "Bart", {}),
        ("blenderbot", "Blenderbot", {}),
        ("m2m_100", "M2M100", {}),
        ("mbart", "MBart", {}),
        ("pegasus", "Pegasus", {}),
        ("plbart", "PLBart", {}),
    )
}
ENCODER_DECODERS |= {
    "marian": from_config(
        "MarianMTModel",
        "MarianConfig",
        sequence_pair,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        decoder_start_token_id=0,
        decoder_vocab_size=100,
    ),
    **{
        name: family(
            prefix,
            CONDITIONAL,
            sequence_pair,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            **options,
        )
        for name, prefix, options in (
            ("t5", "T5", {}),
            ("t5_gated", "T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
            ("mt5", "MT5", {}),
            ("umt5", "UMT5", {}),
            ("longt5", "LongT5", {"local_radius": 4, "global_block_size": 4}),
        )
    },
    "prophetnet": family(
        "ProphetNet",
        CONDITIONAL,
        sequence_pair,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_hidden_layers=None,
        decoder_start_token_id=0,
    ),
}


def given_a_past() -> Example:
    """A decoder in the middle of generation: it gets the keys and values of five tokens and reads one more."""
    from transformers import DynamicCache

    class Past(DynamicCache):
        """A cache that is read and not added to, so that every call is the same."""

        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            held = self.layers[layer_idx]
            return torch.cat([held.keys, key_states], 2), torch.cat([held.values, value_states], 2)

    example = family("GPT2", "LMHeadModel", n_positions=64)()
    past = Past([(torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)) for _ in range(2)])
    example.kwargs = {"input_ids": tokens(1), "past_key_values": past, "use_cache": True}
    example.note = "the heads and their width come in with the cache, so they stay"
    return example


def returning_tuples() -> Example:
    """Plain tuples in place of dataclasses."""
    example = family("Bert", CLASSIFIER)()
    example.kwargs = {**example.kwargs, "return_dict": False}
    return example


def returning_everything() -> Example:
    """Hidden states, attention weights and a cache beside the logits."""
    example = family("GPT2", "LMHeadModel", n_positions=64, attn_implementation="eager")()
    example.kwargs = {
        **example.kwargs,
        "output_hidden_states": True,
        "output_attentions": True,
        "use_cache": True,
    }
    return example


CACHES: dict[str, Builder] = {
    "bert_tuple": returning_tuples,
    "gpt2_everything": returning_everything,
    "gpt2_past": given_a_past,
}
