"""How far a quantized transformer's simulation agrees with itself when the last bit of its layer norms changes.

    PYTHONPATH=tests python benchmarks/last_bit.py

Runtimes compute norms, softmax and GELU by other formulas, so this is what parity with a file can be at best. MiniLM in
int8 as ``benchmarks/int8.py`` has it, 640 sentences; the outputs of its layer norms get a relative error of each size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dwindle as dw
from int8 import figures
from int8_cases import CASES, in_torch


def main() -> None:
    """Measure and print."""
    import int8

    case = CASES["minilm"]()
    case.test = case.test[:40]
    model = dw.quantize(case.model, case.calibration[:8], backend="openvino", **case.options)
    expected = int8._judged(case, in_torch(model))
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for size in (1.2e-7, 1e-6):

        def disturb(module: nn.Module, args: object, output: Tensor, size: float = size) -> Tensor:
            return output * (1 + size * torch.randn_like(output))

        torch.manual_seed(0)
        handles = [module.register_forward_hook(disturb) for module in norms]
        found = figures(case, expected, int8._judged(case, in_torch(model)))
        for handle in handles:
            handle.remove()
        print(f"relative error {size:g} behind {len(norms)} layer norms: {found}")


if __name__ == "__main__":
    main()
