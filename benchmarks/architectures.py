"""Prunes the architectures of the promise at full size: forward, training step, share left, proof.

    python benchmarks/architectures.py [--models resnet18 ...] [--output benchmarks/results/architectures.json]

One process a model. Torchvision and timm models run at 224 x 224, Hugging Face models from small configs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TORCHVISION = [
    "resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "efficientnet_b0", "vit_b_16", "swin_t",
    "convnext_tiny", "deeplabv3_mobilenet_v3_large",
]  # fmt: skip
TIMM = ["vit_tiny_patch16_224", "ghostnet_100", "mixer_s32_224", "coat_lite_tiny"]
HUGGING_FACE = ["bert", "gpt2", "llama", "t5", "hf_vit"]


def build(name: str) -> tuple:
    """Return (model, args, kwargs)."""
    import torch

    from support import torchvision_shim

    torchvision_shim.install()
    image = torch.randn(2, 3, 224, 224)
    if name in TORCHVISION:
        import torchvision

        options = {"weights_backbone": None} if "deeplab" in name else {}
        return torchvision.models.get_model(name, weights=None, **options), (image,), {}
    if name in TIMM:
        import timm

        return timm.create_model(name), (image,), {}
    return hugging_face(name)


def hugging_face(name: str) -> tuple:
    """Return a small model of each family."""
    import torch
    import transformers as hf

    ids = torch.randint(0, 99, (2, 12))
    if name == "bert":
        config = hf.BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return hf.BertForSequenceClassification(config), (), kwargs
    if name == "gpt2":
        config = hf.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        return hf.GPT2LMHeadModel(config), (), {"input_ids": ids}
    if name == "llama":
        config = hf.LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4,
        )  # fmt: skip
        return hf.LlamaForCausalLM(config), (), {"input_ids": ids}
    if name == "t5":
        config = hf.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        return hf.T5ForConditionalGeneration(config), (), {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), (), {"pixel_values": torch.randn(2, 3, 32, 32)}


def one(name: str) -> dict:
    """Prune one model and check it."""
    import torch

    import dwindle as dw

    torch.manual_seed(0)
    model, args, kwargs = build(name)
    started = time.perf_counter()
    result = dw.prune(model, args, example_kwargs=kwargs, ratio=0.5)
    seconds = time.perf_counter() - started
    model = result.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    output = model(*args, **kwargs)
    tensor = (
        output if isinstance(output, torch.Tensor) else output["out"] if "out" in output else output["logits"]
    )
    (tensor - 1).square().mean().backward()  # some heads start at zero
    optimizer.step()
    moved = sum(bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True))
    share = result.parameters_after / result.parameters_before
    verification = result.verification
    return {
        "model": name,
        "output": list(tensor.shape),
        "parameters_left": share,
        "max_difference": verification.max_difference,
        "dtype": verification.dtype,
        "batch_sizes": verification.batch_sizes,
        "mask_inside": len(verification.inside),
        "in_place": not result.plan.rewritten,
        "parameters_trained": f"{moved}/{len(before)}",
        "seconds": seconds,
        "passes": 0.2 <= share <= 0.5
        and verification.max_difference <= 1e-9
        and verification.dtype == "float64"
        and moved > 0,
    }


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[*TORCHVISION, *TIMM, *HUGGING_FACE])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one(options.child)))
        return
    rows = []
    print("| model | left | difference | batch sizes | mask inside | in place | trained | seconds | passes |")
    print("|---|" + "---:|" * 8)
    for name in options.models:
        done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True)
        try:
            row = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            row = {"model": name, "failure": done.stderr.strip().splitlines()[-1:], "passes": False}
        rows.append(row)
        if "failure" in row:
            print(f"| {name} | {row['failure']} ||||||| no |", flush=True)
            continue
        sizes = ", ".join(map(str, row["batch_sizes"]))
        print(
            f"| {name} | {row['parameters_left']:.3f} | {row['max_difference']:.1e} | {sizes} | {row['mask_inside']} "
            f"| {row['in_place']} | {row['parameters_trained']} | {row['seconds']:.1f} | {row['passes']} |",
            flush=True,
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["passes"] for row in rows) else 1)


if __name__ == "__main__":
    main()
