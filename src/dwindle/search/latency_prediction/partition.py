"""Which operators of a file are run together as a segment.

Every convolution and matrix product begins a segment; what follows it (bias, norm, activation, residual
addition, the quantizer of its result) belongs to it, until the next one. Dequantizers belong to those that
read them, so that a segment of an int8 file computes in integers as it does in the whole file. Runtimes
recognize that only from a quantizer with its dequantizer, so one stands at the border too; its time is not
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dwindle.search.latency_prediction.template import TemplateNode

__all__ = ["ANCHORS", "BORDER", "CONVOLUTIONS", "Part", "is_dequantizer", "partition"]

CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv")
_PRODUCTS = ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "Einsum", "MatMulNBits")
_RECURRENT = ("LSTM", "GRU", "RNN")
#: Operators that begin a segment.
ANCHORS = (*CONVOLUTIONS, *_PRODUCTS, *_RECURRENT)
#: What names of operators begin with that stand at the border of a segment, in place of another one's.
BORDER = "border_"


@dataclass(eq=False, slots=True)
class Part:
    """Operators that are run together.

    Attributes:
        nodes: In an order in which they can run.
        reads: Tensors of the file that come from outside.
    """

    nodes: list[TemplateNode] = field(default_factory=list)
    reads: dict[str, None] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)


def is_dequantizer(node: TemplateNode) -> bool:
    """Whether an operator belongs to those that read it."""
    return node.name == "DequantizeLinear"


def partition(nodes: Sequence[TemplateNode]) -> list[Part]:
    """Return the parts of a file, in order; together they hold every operator (dequantizers maybe several times)."""
    made: dict[str, tuple[TemplateNode, int]] = {}
    parts = [Part()]
    for node in nodes:
        home = _latest(node, made)
        if node.name in ANCHORS:
            home = len(parts)
            parts.append(Part())
        made.update((name, (node, home)) for name in node.outputs)
        if not is_dequantizer(node):
            _add(node, home, parts[home], made)
    return parts


def _latest(node: TemplateNode, made: Mapping[str, tuple[TemplateNode, int]]) -> int:
    return max((made[name][1] for name in node.tensors if name in made), default=0)


def _add(node: TemplateNode, home: int, part: Part, made: Mapping[str, tuple[TemplateNode, int]]) -> None:
    """Add an operator to a part, with the dequantizers that it reads."""
    renamed = {}
    for name in node.tensors:
        maker = made.get(name)
        if maker is not None and is_dequantizer(maker[0]):
            renamed[name] = _pulled(maker[0], home, part, made)
        elif maker is None or maker[1] != home:
            part.reads[name] = None
    changed = any(old != new for old, new in renamed.items())
    part.nodes.append(node.reading(renamed) if changed else node)


def _pulled(node: TemplateNode, home: int, part: Part, made: Mapping[str, tuple[TemplateNode, int]]) -> str:
    """Add a dequantizer to a part (once), with a quantizer at the border; return the name of its result there."""
    result = node.outputs[0]
    if result in part.known:
        return part.known[result]
    data = node.tensors[0] if node.tensors else None
    maker = made.get(data) if data is not None else None
    if data is None or (maker is not None and maker[1] == home):
        part.nodes.append(node)
        part.known[result] = result
        return result
    part.reads[data] = None
    if maker is None or maker[0].name != "QuantizeLinear":
        part.nodes.append(node)
        part.known[result] = result
        return result
    quantizer = maker[0].reading({}, BORDER)
    part.nodes.append(quantizer)
    part.nodes.append(node.reading({data: quantizer.outputs[0]}, BORDER))
    part.known[result] = part.nodes[-1].outputs[0]
    return part.known[result]
