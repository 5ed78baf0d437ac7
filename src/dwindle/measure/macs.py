"""Multiply-accumulates of one forward pass; the counter is :mod:`dwindle.graph.macs`, where every floor reaches it."""

from dwindle.graph.macs import MAC_FORMULAS, MacCount, count_macs, count_macs_by_module, counting_kernels

__all__ = ["MAC_FORMULAS", "MacCount", "count_macs", "count_macs_by_module", "counting_kernels"]
