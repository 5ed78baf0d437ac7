"""Names of axes that are the same in every process, and from counts by name to counts of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import AxisInfo
from dwindle.graph.counts import Counts

__all__ = ["axis_names", "counts_by_name"]


def axis_names(infos: Sequence[AxisInfo]) -> list[str]:
    """Return a name for each axis: a weight that it is the output of, where no other axis has the same place.

    Args:
        infos: The axes.

    Returns:
        Names such as ``"layer1.0.conv1.weight[0]"``, in the same order.
    """
    places: dict[tuple[str, int], int] = {}
    for info in infos:
        for place in info.parameter_dims:
            places[place] = places.get(place, 0) + 1
    names: list[str] = []
    for info in infos:
        own = [place for place in info.parameter_dims if places[place] == 1] or info.parameter_dims
        name, dim = next((p for p in own if p[1] == 0 and p[0].endswith("weight")), own[0])
        text = f"{name}[{dim}]"
        names.append(text if text not in names else f"{text}#{info.id}")
    return names


def counts_by_name(infos: Sequence[AxisInfo], named: Mapping[str, int]) -> Counts:
    """Return how many indices of each axis stay.

    Args:
        infos: All axes that may shrink.
        named: Counts by the axes' names; any parameter and dimension of an axis names it too. Axes that are not named
            stay whole.

    Raises:
        ConfigError: A name is not that of such an axis, two names of one axis disagree, or a count is not possible.
    """
    by_name = dict(zip(axis_names(infos), infos, strict=True))
    for info in infos:
        for name, dim in info.parameter_dims:
            by_name.setdefault(f"{name}[{dim}]", info)
    counts: Counts = {info.axis: info.size for info in infos}
    said: dict[int, str] = {}
    for name, count in named.items():
        if name not in by_name:
            raise ConfigError(
                f"counts: {name!r} is not an axis of this model that may shrink (dwindle inspect lists them)"
                f"{did_you_mean(name, list(by_name))}"
            )
        info = by_name[name]
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= info.size:
            raise ConfigError(
                f"counts: {name} = {count!r} is not a whole number from 1 to its size {info.size}"
            )
        if counts[info.axis] != count and id(info) in said:
            raise ConfigError(f"counts: {name} and {said[id(info)]} are one axis, with different counts")
        said[id(info)] = name
        counts[info.axis] = count
    return counts
