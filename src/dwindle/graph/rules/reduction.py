"""Reductions and pooling."""

from __future__ import annotations

from dwindle.graph.nodes import Node
from dwindle.graph.rules.registry import Scope, drop, freeze_everything, normalize_dims, rule
from dwindle.graph.rules.shape import spatial

_EXACT = {"sum", "nansum", "count_nonzero"}


@rule(
    "sum",
    "nansum",
    "mean",
    "nanmean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "prod",
    "norm",
    "linalg_vector_norm",
    "linalg_norm",
    "all",
    "any",
    "median",
    "count_nonzero",
    "aminmax",
)
def reduce(node: Node, scope: Scope) -> None:
    """The reduced dimensions are combined and vanish."""
    values = list(node.inputs())
    data = values[0]
    if len(values) > 1 and node.name in ("max", "min"):
        from dwindle.graph.rules.elementwise import elementwise

        elementwise(node, scope)
        return
    dims = normalize_dims(node.argument("dim"), len(data.axes))
    keepdim = bool(node.argument("keepdim"))
    scope.mix([data.axes[dim] for dim in dims], exact_on_zeros=node.name in _EXACT)
    for output in node.outputs:
        output.axes = drop(data.axes, dims, keepdim) if len(output.shape) or not keepdim else []
        if len(output.axes) != len(output.shape):
            output.axes = [
                scope.leaf(size, "a reduction that could not be followed") for size in output.shape
            ]
    if node.name in ("max", "min", "median") and len(node.outputs) > 1:
        scope.freeze([data.axes[dim] for dim in dims], "its positions are used as numbers")


@rule(
    "argmax",
    "argmin",
    "topk",
    "sort",
    "argsort",
    "cumsum",
    "cumprod",
    "cummax",
    "logcumsumexp",
    "kthvalue",
    "unique_consecutive",
    "nonzero",
    "flip",
    "roll",
    "diff",
    "triu",
    "tril",
)
def order_matters(node: Node, scope: Scope) -> None:
    """The position of an index has a meaning: the axis is frozen."""
    data = next(node.inputs())
    reason = f"{node.name} uses the order of its indices"
    dims = node.argument("dims", node.argument("dim"))
    if node.name in ("triu", "tril"):
        dims = [-2, -1]
    elif dims is None and node.name in ("topk", "sort", "argsort"):
        dims = [-1]
    chosen = normalize_dims(dims, len(data.axes)) if node.name != "nonzero" else range(len(data.axes))
    scope.freeze([data.axes[dim] for dim in chosen], reason)
    for output in node.outputs:
        if len(output.shape) == len(data.shape):
            output.axes = [
                axis if axis.size == size else scope.leaf(size, reason)
                for axis, size in zip(data.axes, output.shape, strict=True)
            ]
        elif len(output.shape) == len(data.shape) - len(list(chosen)):
            output.axes = drop(data.axes, chosen, keepdim=False)
        else:
            scope.freeze(data.axes, reason)
            output.axes = [scope.leaf(size, reason) for size in output.shape]


def _pool_rank(name: str) -> int:
    return int(next(char for char in name.rstrip("_") if char.isdigit() and f"{char}d" in name))


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d_with_indices",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "fractional_max_pool2d",
)
def pool(node: Node, scope: Scope) -> None:
    """Space shrinks, channels stay; so does a dimension whose window is one index wide."""
    rank = _pool_rank(node.name)
    data = next(node.inputs())
    untouched = _one_wide(node, rank) if not node.name.lstrip("_").startswith("adaptive") else []
    if untouched:
        channels = len(data.axes) - rank - 1
        scope.freeze(
            [a for d, a in enumerate(data.axes) if d > channels and d - len(data.axes) not in untouched],
            "spatial",
        )
        node.outputs[0].axes = [
            axis if size == axis.size else scope.leaf(size, "spatial")
            for axis, size in zip(data.axes, node.output.shape, strict=True)
        ]
        for output in node.outputs[1:]:
            output.axes = list(node.output.axes)
        return
    _window(node, scope, rank)


def _one_wide(node: Node, rank: int) -> list[int]:
    """Dimensions, counted from the end, over which a pool's window does not reach."""

    def numbers(name: str, default: list[int]) -> list[int]:
        found = [int(item) for item in node.argument(name, default) or default]
        return found * rank if len(found) == 1 else found

    kernel = numbers("kernel_size", [2] * rank)
    stride, padding = numbers("stride", kernel), numbers("padding", [0] * rank)
    return [
        place - rank
        for place, (size, step, pad) in enumerate(zip(kernel, stride, padding, strict=True))
        if (size, step, pad) == (1, 1, 0)
    ]


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def resize(node: Node, scope: Scope) -> None:
    """Space grows, channels stay."""
    _window(node, scope, _pool_rank(node.name))


def _window(node: Node, scope: Scope, rank: int) -> None:
    data = next(node.inputs())
    channels = len(data.axes) - rank - 1
    if channels < 0:
        freeze_everything(node, scope, f"{node.name} over all dimensions")
        return
    spatial(node, data, channels, data.axes[channels], scope)
    for output in node.outputs[1:]:
        output.axes = list(node.output.axes)


@rule("max_unpool2d", "max_unpool3d")
def unpool(node: Node, scope: Scope) -> None:
    """Values go back to where they came from; channels stay."""
    data, places = list(node.inputs())[:2]
    rank = _pool_rank(node.name)
    channels = len(data.axes) - rank - 1
    if channels < 0:
        freeze_everything(node, scope, f"{node.name} over all dimensions")
        return
    for own, axis in zip(places.axes, data.axes, strict=True):
        scope.unify(own, axis)
    spatial(node, data, channels, data.axes[channels], scope)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(node: Node, scope: Scope) -> None:
    """Samples space; the grid is frozen."""
    data, grid = list(node.inputs())[:2]
    scope.freeze(grid.axes, "sampling grid")
    spatial(node, data, 1, data.axes[1], scope)


@rule("constant_pad_nd", "pad")
def pad(node: Node, scope: Scope) -> None:
    """Padded dimensions are new and frozen; the others stay."""
    data = next(node.inputs())
    axes = list(data.axes)
    amounts = [int(number) for number in node.args[1]]
    for place in range(len(amounts) // 2):
        dim = len(axes) - 1 - place
        if amounts[2 * place] or amounts[2 * place + 1]:
            scope.freeze([axes[dim]], "padded")
            axes[dim] = scope.leaf(node.output.shape[dim], "padded")
    node.output.axes = axes


@rule("im2col")
def im2col(node: Node, scope: Scope) -> None:
    """(N, C, H, W) -> (N, C x kernel, L)."""
    from dwindle.graph.axes import product

    data = next(node.inputs())
    kernel = node.output.shape[-2] // data.shape[-3]
    scope.freeze(data.axes[-2:], "spatial")
    channels = product([data.axes[-3], scope.leaf(kernel, "kernel")])
    node.output.axes = [*data.axes[:-3], channels, scope.leaf(node.output.shape[-1], "spatial")]


@rule("col2im")
def col2im(node: Node, scope: Scope) -> None:
    """(N, C x kernel, L) -> (N, C, H, W)."""
    from dwindle.graph.axes import product

    data = next(node.inputs())
    channels = scope.leaf(node.output.shape[-3])
    kernel = scope.leaf(data.shape[-2] // node.output.shape[-3], "kernel")
    scope.unify(data.axes[-2], product([channels, kernel]))
    scope.freeze(data.axes[-1:], "spatial")
    node.output.axes = [
        *data.axes[:-2],
        channels,
        *(scope.leaf(size, "spatial") for size in node.output.shape[-2:]),
    ]


@rule("unfold")
def unfold(node: Node, scope: Scope) -> None:
    """Sliding windows over one dimension, which move to a new last dimension."""
    data = next(node.inputs())
    dim = int(node.args[1]) % len(data.axes)
    scope.freeze([data.axes[dim]], "cut into windows")
    axes = list(data.axes)
    axes[dim] = scope.leaf(node.output.shape[dim], "windows")
    node.output.axes = [*axes, scope.leaf(node.output.shape[-1], "windows")]
