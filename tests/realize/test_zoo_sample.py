"""A sample of the sweep (``benchmarks/zoo.py``): the fast models of each library, with nearly all of its checks."""

from __future__ import annotations

import pytest

from support.architectures import check

SAMPLE = """
torchvision/efficientnet_b0 torchvision/resnet18 torchvision/squeezenet1_1 torchvision/googlenet
torchvision/mobilenet_v3_small torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5 torchvision/regnet_x_400mf
torchvision/lraspp_mobilenet_v3_large torchvision/ssdlite320_mobilenet_v3_large.backbone torchvision/raft_small
torchvision/fasterrcnn_mobilenet_v3_large_320_fpn
timm/test_byobnet timm/test_convnext timm/test_efficientnet timm/test_mambaout timm/test_coatnet timm/test_nfnet
timm/test_resnet timm/test_vit timm/test_vit_relpos timm/mobilevit_xxs timm/efficientvit_b0 timm/ghostnet_050
timm/starnet_s050 timm/regnetx_002 timm/mobilenetv3_small_050 timm/cs3darknet_focus_s timm/edgenext_xx_small
timm/repghostnet_050 timm/dla46x_c timm/ese_vovnet19b_slim_dw
hf/bert hf/roberta hf/distilbert hf/albert hf/electra hf/deberta_v2 hf/xlnet hf/fnet hf/gpt2 hf/gpt_neox hf/opt hf/bloom
hf/llama hf/mistral hf/qwen3 hf/gemma2 hf/phi3 hf/falcon hf/mixtral hf/mamba hf/t5 hf/bart hf/vit hf/swin hf/convnextv2
hf/segformer hf/wav2vec2 hf/whisper hf/clip hf/patchtst
"""


@pytest.mark.parametrize("name", SAMPLE.split())
def test_pruned_proven_and_trained(name: str) -> None:
    row = check.check(name, onnx=False)
    assert not row.failures
    assert row.in_place
    assert row.left < 0.6
    assert row.proof_difference is not None
    assert row.trains
    assert row.prunable_share >= 0.9 or row.reasons


def test_the_sample_is_of_the_catalogue() -> None:
    names = SAMPLE.split()
    assert len(set(names)) == len(names) >= 60
    assert set(names) <= set(check.names())
