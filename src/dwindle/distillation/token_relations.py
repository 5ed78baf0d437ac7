"""Self-attention relations: how alike the tokens are in queries, keys or values."""

from __future__ import annotations

from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import widened
from dwindle.distillation.losses import divergence

__all__ = ["token_relations"]


def token_relations(student: Tensor, teacher: Tensor, heads: int = 1) -> Tensor:
    """Compare the relations of tokens among queries, keys or values, whatever their widths.

    ``mean over samples, heads and tokens of KL(softmax(A_T A_T^t / sqrt(d_T)) || softmax(A_S A_S^t / sqrt(d_S)))``,
    where ``A`` is one relation head: ``width / heads`` neighbouring values of each token. Wang et al., "MiniLMv2"
    (https://arxiv.org/abs/2012.15828; for values it is the value relation of MiniLM,
    https://arxiv.org/abs/2002.10957).

    Args:
        student: ``(batch, tokens, width)``, such as the output of a query, key or value projection.
        teacher: ``(batch, tokens, its own width)``; takes no gradient.
        heads: Relation heads, a divisor of both widths; it need not be the number of attention heads.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes do not fit, or the heads do not divide a width.
    """
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ConfigError(
            "apply_method 'token_relations' compares sequences (batch, tokens, width) with the same tokens, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return divergence(_relations(student, heads), _relations(teacher.detach(), heads))


def _relations(values: Tensor, heads: int) -> Tensor:
    """Return ``(batch, heads, tokens, tokens)`` scaled products."""
    batch, tokens, width = values.shape
    if heads < 1 or width % heads:
        raise ConfigError(f"option 'heads': {heads} relation heads do not divide the width {width}")
    split = widened(values).reshape(batch, tokens, heads, width // heads).transpose(1, 2)
    return split @ split.transpose(2, 3) * (width // heads) ** -0.5
