"""How long the analysis takes as a model grows, and what a 1-billion-parameter Llama costs without its weights.

    python benchmarks/analysis_speed.py [--output benchmarks/results/analysis_speed.json]

Llama shapes on the meta device, one process a depth: capture, axes and a complete plan at ratio 0.5, no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DEPTHS = (2, 4, 8, 16, 32, 64)
BILLION = 16


def llama(layers: int) -> dict[str, float]:
    """Build, capture, analyse and plan; seconds and GiB of this process."""
    import torch
    import transformers

    import dwindle as dw

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        ids = torch.zeros(2, 64, dtype=torch.int64)
    started = time.perf_counter()
    result = dw.prune(model, (), example_kwargs={"input_ids": ids}, ratio=0.5)
    return {
        "layers": layers,
        "parameters": result.parameters_before,
        "parameters_after": result.parameters_after,
        "nodes": sum(len(trace.nodes) for trace in result.analysis.traces),
        "prunable_share": result.analysis.prunable_share(),
        "seconds": time.perf_counter() - started,
        **{f"seconds.{step}": seconds for step, seconds in result.seconds.items()},
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gib_of_imports": before / 2**20,
    }


def main() -> None:
    """Measure every depth in a process of its own, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", nargs="*", type=int, default=DEPTHS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(llama(options.child)))
        return
    rows = []
    print("| layers | parameters | nodes | capture | axes | all seconds | GiB | ms a node |")
    print("|---:|" + "---:|" * 7)
    for depth in options.depths:
        command = [sys.executable, __file__, "--child", str(depth)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {depth} | {row['parameters'] / 1e9:.2f} G | {row['nodes']:.0f} | {row['seconds.capture']:.2f} "
            f"| {row['seconds.analyse']:.2f} | {row['seconds']:.2f} | {row['gib']:.2f} "
            f"| {1000 * (row['seconds.capture'] + row['seconds.analyse']) / row['nodes']:.2f} |",
            flush=True,
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
