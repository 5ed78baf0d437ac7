"""``nni.compression.quantization``: the quantizers of NNI 3.0."""

from dwindle.compat.nni.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)

__all__ = [
    "BNNQuantizer",
    "DoReFaQuantizer",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "PtqQuantizer",
    "QATQuantizer",
]
