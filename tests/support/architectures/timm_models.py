"""One small member of every model family that timm registers: the smallest of each of its module files.

Families whose smallest member is timm's own miniature for tests have a real member besides.
"""

from __future__ import annotations

from typing import Any

import torch

from support.architectures.example import Builder, Example

#: Family (module file of timm) -> its smallest members.
FAMILIES: dict[str, list[str]] = {
    "beit": ["beit_base_patch16_224"],
    "byoanet": ["halonet_h1"],
    "byobnet": ["test_byobnet", "mobileone_s1"],
    "cait": ["cait_xxs24_224"],
    "coat": ["coat_tiny"],
    "convit": ["convit_tiny"],
    "convmixer": ["convmixer_768_32"],
    "convnext": ["test_convnext", "convnext_zepto_rms"],
    "cpubone": ["cpubone_nano"],
    "crossvit": ["crossvit_tiny_240"],
    "csatv2": ["csatv2"],
    "cspnet": ["cs3darknet_focus_s"],
    "cspnext": ["cspnext_tiny"],
    "davit": ["davit_tiny"],
    "deepseek_vit": ["deepseek_vit_412m"],
    "deit": ["deit_tiny_patch16_224"],
    "densenet": ["densenet121"],
    "dla": ["dla46x_c"],
    "dpn": ["dpn48b"],
    "edgenext": ["edgenext_xx_small"],
    "efficientformer": ["efficientformer_l1"],
    "efficientformer_v2": ["efficientformerv2_s0"],
    "efficientnet": ["test_efficientnet", "mobilenetv2_035"],
    "efficientvim": ["efficientvim_m1"],
    "efficientvit_mit": ["efficientvit_b0"],
    "efficientvit_msra": ["efficientvit_m0"],
    "eva": ["vit_tiny_patch16_dinov3_qkvb"],
    "fasternet": ["fasternet_t0"],
    "fastvit": ["fastvit_t8"],
    "focalnet": ["focalnet_tiny_srf"],
    "gcvit": ["gcvit_xxtiny"],
    "gemma4_vit": ["gemma4_vit_167m"],
    "ghostnet": ["ghostnet_050"],
    "hardcorenas": ["hardcorenas_b"],
    "hgnet": ["hgnetv2_b0"],
    "hiera": ["hiera_tiny_224"],
    "hieradet_sam2": ["sam2_hiera_tiny"],
    "hrnet": ["hrnet_w18_small"],
    "iformer": ["iformer_t"],
    "inception_next": ["inception_next_atto"],
    "inception_resnet_v2": ["inception_resnet_v2"],
    "inception_v3": ["inception_v3"],
    "inception_v4": ["inception_v4"],
    "lcnetv2": ["lcnetv2_small"],
    "levit": ["levit_128s"],
    "lowformer": ["lowformer_b0"],
    "mambaout": ["test_mambaout", "mambaout_femto"],
    "maxxvit": ["test_coatnet", "maxvit_pico_rw_256"],
    "metaformer": ["poolformerv2_s12"],
    "mlp_mixer": ["gmlp_ti16_224"],
    "mobilenetv3": ["mobilenetv3_small_050"],
    "mobilenetv5": ["mobilenetv5_base"],
    "mobilevit": ["mobilevit_xxs"],
    "mvitv2": ["mvitv2_tiny"],
    "naflexvit": ["naflexvit_base_patch16_parfac_gap"],
    "nasnet": ["nasnetalarge"],
    "nest": ["nest_tiny"],
    "nextvit": ["nextvit_small"],
    "nfnet": ["test_nfnet", "nf_regnet_b0"],
    "pit": ["pit_ti_224"],
    "pnasnet": ["pnasnet5large"],
    "pvt_v2": ["pvt_v2_b0"],
    "qwen3_vit": ["qwen3_vit_88m"],
    "rdnet": ["rdnet_tiny"],
    "regnet": ["regnetx_002"],
    "repghost": ["repghostnet_050"],
    "repvit": ["repvit_m1"],
    "res2net": ["res2next50"],
    "resnest": ["resnest14d"],
    "resnet": ["test_resnet", "resnet10t"],
    "resnetv2": ["resnetv2_18"],
    "rexnet": ["rexnet_100"],
    "selecsls": ["selecsls42"],
    "senet": ["legacy_seresnet18"],
    "sequencer": ["sequencer2d_s"],
    "shvit": ["shvit_s1"],
    "sknet": ["skresnet18"],
    "starnet": ["starnet_s050"],
    "swiftformer": ["swiftformer_xs"],
    "swin_transformer": ["swin_tiny_patch4_window7_224"],
    "swin_transformer_v2": ["swinv2_tiny_window8_256"],
    "swin_transformer_v2_cr": ["swinv2_cr_tiny_224"],
    "tiny_vit": ["tiny_vit_5m_224"],
    "tnt": ["tnt_s_legacy_patch16_224"],
    "tresnet": ["tresnet_m"],
    "twins": ["twins_svt_small"],
    "vgg": ["vgg11"],
    "visformer": ["visformer_tiny"],
    "vision_transformer": ["test_vit", "vit_dwee_patch16_reg1_gap_256"],
    "vision_transformer_hybrid": ["vit_tiny_r_s16_p8_224"],
    "vision_transformer_relpos": ["test_vit_relpos", "vit_srelpos_small_patch16_224"],
    "vision_transformer_sam": ["samvit_base_patch16_224"],
    "vitamin": ["vitamin_small_224"],
    "volo": ["volo_d1_224"],
    "vovnet": ["ese_vovnet19b_slim_dw"],
    "xception": ["legacy_xception"],
    "xception_aligned": ["xception41p"],
    "xcit": ["xcit_nano_12_p8_224"],
}

#: Options that make a very large family member small enough, and image sizes that are fixed for no reason of weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 2, "img_size": 112},
    "gemma4_vit_167m": {"depth": 4},
    "qwen3_vit_88m": {"depth": 4},
}

#: Side of the images. Weights and couplings are those of larger images, the runs are shorter.
SIDE = 64
#: Models that need larger images.
SIDES = {
    "csatv2": 512,
    "halonet_h1": 256,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "nasnetalarge": 96,
    "pnasnet5large": 96,
}
#: Models whose image size is part of their construction and cannot be chosen.
FIXED = ("crossvit_tiny_240", "efficientformer_l1")


def create(name: str) -> Builder:
    """Images in, logits (or features) out."""

    def build() -> Example:
        import timm

        options = dict(OPTIONS.get(name, {}))
        settings = timm.get_pretrained_cfg(name)
        if name in FIXED:
            side = int(settings.input_size[-1])
        elif settings.fixed_input_size:
            side = options.setdefault("img_size", SIDE)
        else:
            side = options.get("img_size", SIDES.get(name, SIDE))
        return Example(timm.create_model(name, pretrained=False, **options), (torch.randn(2, 3, side, side),))

    return build


MODELS: dict[str, Builder] = {name: create(name) for names in FAMILIES.values() for name in names}
