"""What each compressor of a run will do to which target, so that two that cannot go together are refused at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.config import Target
from dwindle.config.errors import ConfigError

__all__ = ["Claim", "check_claims", "claims_of"]


@dataclass(frozen=True)
class Claim:
    """One compressor's hold on one target.

    Attributes:
        target: Where it acts.
        stage: What it puts there: ``mask`` (gates and scores that become masks, too), ``quantize`` or ``low_rank``.
        whole: Of masks: only whole output or input channels go, never single entries.
    """

    target: Target
    stage: str
    whole: bool = False


@dataclass(frozen=True)
class _Held:
    """A claim with its owner, and the steps between which the owner acts."""

    claim: Claim
    owner: str
    start: int
    stop: int | None

    def meets(self, other: _Held) -> bool:
        """Whether both act in some step."""
        return (self.stop is None or other.start < self.stop) and (
            other.stop is None or self.start < other.stop
        )


def claims_of(compressor: Any) -> Iterator[Claim]:
    """Yield what a compressor says it will act on; nothing from one without a ``claims()``."""
    found = getattr(compressor, "claims", None)
    if callable(found):
        yield from found()


def check_claims(compressors: Sequence[Any]) -> None:
    """Raise where two compressors of one run cannot go together.

    Args:
        compressors: In the order in which they are attached.

    Raises:
        ConfigError: Naming the target and both compressors, and what can be done.
    """
    held: dict[Target, list[_Held]] = {}
    for position, compressor in enumerate(compressors):
        start, stop = getattr(compressor, "window", (0, None))
        for claim in claims_of(compressor):
            own = _Held(claim, f"compressors[{position}] ({_name(compressor)})", start, stop)
            others = held.setdefault(claim.target, [])
            _refuse(own, others)
            others.append(own)


def _name(compressor: Any) -> str:
    return str(getattr(compressor, "name", None) or type(compressor).__name__)


def _refuse(new: _Held, others: Iterable[_Held]) -> None:
    for old in others:
        stages = {old.claim.stage, new.claim.stage}
        masked = next((own for own in (old, new) if own.claim.stage == "mask"), None)
        if len(stages) == 1:
            if new.claim.stage == "mask" and not old.meets(new):
                continue  # the second goes on from the masks that the first left
            raise ConfigError(
                f"{new.claim.target}: {old.owner} and {new.owner} both {_does(new)} it; give each its own targets"
                + (", or let one stop before the other starts (Staged)" if new.claim.stage == "mask" else "")
            )
        if stages == {"low_rank", "quantize"}:
            raise ConfigError(
                f"{new.claim.target}: {old.owner} and {new.owner} cannot go together: the weight that one rounds will "
                "vanish when the other's ranks become two smaller layers. Leave the layer out of one of them, or "
                "quantize after run.realize()"
            )
        if masked is not None and "low_rank" in stages and not masked.claim.whole:
            raise ConfigError(
                f"{new.claim.target}: {old.owner} and {new.owner} cannot go together: with single entries masked, a "
                "product of low rank has low rank no more. Mask whole channels, or other layers"
            )


def _does(held: _Held) -> str:
    return {"mask": "mask", "quantize": "round", "low_rank": "lower the rank of"}[held.claim.stage]
