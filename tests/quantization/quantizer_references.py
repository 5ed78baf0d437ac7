"""The published formulas in NumPy and float64, written down from the papers and not from the package."""

import numpy as np


def round_and_scale(x, scale, zero, lowest, highest):
    """Return values on levels, and positions before rounding."""
    place = x / scale + zero
    return (np.clip(np.round(x / scale) + zero, lowest, highest) - zero) * scale, place


def lsq(x, g, scale, lowest, highest, factor):
    """Esser et al. 2020, equations 1 to 3; ``lowest`` is -Q_N."""
    v = x / scale
    inside = (v > lowest) & (v < highest)
    slope = np.where(inside, np.round(v) - v, np.where(v <= lowest, lowest, highest))
    return np.where(inside, g, 0), (g * slope).sum() * factor


def lsq_plus(x, g, scale, offset, lowest, highest, factor):
    """Bhalgat et al. 2020, equations 5 to 8."""
    v = (x - offset) / scale
    inside = (v >= lowest) & (v <= highest)
    slope = np.where(inside, np.round(v) - v, np.where(v < lowest, lowest, highest))
    value = np.round(np.clip(v, lowest, highest)) * scale + offset
    return value, np.where(inside, g, 0), (g * slope).sum() * factor, np.where(inside, 0, g).sum() * factor


def pact(x, g, clip, steps):
    """Choi et al. 2018, equations 1 to 3."""
    clipped = 0.5 * (np.abs(x) - np.abs(x - clip) + clip)
    value = np.round(clipped * steps / clip) * clip / steps
    return value, np.where((x >= 0) & (x < clip), g, 0), g[x >= clip].sum()


def tqt(x, g, log2_t, bits, lowest, highest):
    """Jain et al. 2020, equations 3 to 8."""
    unsigned = lowest == 0
    scale = 2 ** np.ceil(log2_t) / 2 ** (bits if unsigned else bits - 1)
    rounded = np.round(x / scale)
    inside = (rounded >= lowest) & (rounded <= highest)
    slope = np.where(inside, rounded - x / scale, np.where(rounded < lowest, lowest, highest))
    value = np.clip(rounded, lowest, highest) * scale
    return value, np.where(inside, g, 0), (g * slope).sum() * scale * np.log(2)


def range_gradients(x, g, low, width, levels, share_below):
    """NNCF's gradients (Kozlov et al. 2020, section 3.1), and the rounding itself; levels counts steps."""
    step = width / levels
    zero = np.round(-low / step)
    value = (np.round((np.clip(x, low, low + width) - low) / step - zero)) * step
    above, below = x > low + width, x < low
    inside = ~(above | below)
    slope = np.where(inside, (value - x) / width, np.where(above, 1.0, share_below))
    return value, np.where(inside, g, 0), np.where(inside, 0, g).sum(), (g * slope).sum()


def tuned(low, width, levels):
    """NNCF's widening of an asymmetric range: zero inside, and on a level."""
    high, low = max(low + width, 0.0), min(low, 0.0)
    zero = np.round(-low * levels / (high - low))
    candidates = []
    if zero > 0:
        candidates.append((low, (zero - levels) / zero * low))
    if zero < levels:
        candidates.append((zero / (zero - levels) * high, high))
    return max(candidates, key=lambda edges: edges[1] - edges[0])


def dorefa_weight(w, steps):
    """Zhou et al. 2016, equation 9, with ``steps`` in place of 2^k - 1."""
    squeezed = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
    return 2 * np.round(steps * squeezed) / steps - 1


def dorefa_gradient(g, noise, bits):
    """Zhou et al. 2016, equation 12, held in the range of the quantizer."""
    steps = 2**bits - 1
    most = np.abs(g).reshape(len(g), -1).max(1).reshape((-1,) + (1,) * (g.ndim - 1))
    quantized = np.clip(np.round(steps * (g / (2 * most) + 0.5 + noise / steps)), 0, steps) / steps
    return 2 * most * (quantized - 0.5)
