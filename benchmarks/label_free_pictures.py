"""Pictures without labels for ``label_free.py``, and what the float original says to them.

Crops of the photographs of :mod:`dwindle.zoo.photographs`, and scenes of :mod:`dwindle.zoo.cutouts`: things cut out of
other photographs, over them. Of the calibration part, every fourth photograph and every fourth thing only score; the
agreement part judges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import zoo

#: Every so many photographs and things one scores trials and is used for nothing else.
HOLD_OUT = 4


@dataclass(frozen=True)
class Sources:
    """Photographs and things, by their names.

    Attributes:
        part: ``"calibration"`` or ``"agreement"``.
        python_only: Leave off what Debian packages ship, which is most.
        photographs: That crops are cut from, and that lie behind things.
        things: That are pasted over them.
    """

    part: str
    python_only: bool
    photographs: list[str]
    things: list[str]

    @classmethod
    def of(cls, part: str, python_only: bool) -> Sources:
        """Return all of a part."""
        things = [] if python_only else zoo.cutout_names(part)  # type: ignore[arg-type]
        return cls(part, python_only, _photographs(part, python_only), things)

    def split(self) -> tuple[Sources, Sources]:
        """Return those to learn from, and those held out."""
        held = dataclasses.replace(
            self,
            photographs=self.photographs[HOLD_OUT - 1 :: HOLD_OUT],
            things=self.things[HOLD_OUT - 1 :: HOLD_OUT],
        )
        kept = dataclasses.replace(
            self,
            photographs=[name for name in self.photographs if name not in held.photographs],
            things=[name for name in self.things if name not in held.things],
        )
        return kept, held

    def crops(self, count: int, seed: int) -> Tensor:
        """Return so many crops of each photograph, which lie together.

        Args:
            count: Crops of a photograph.
            seed: Decides which.
        """
        part: Any = self.part
        whole = zoo.photographs(part, crops=count, seed=seed, debian=not self.python_only)
        mine = [name in self.photographs for name in _photographs(self.part, self.python_only)]
        return whole.unflatten(0, (-1, count))[torch.tensor(mine)].flatten(0, 1)

    def scenes(self, count: int, seed: int) -> Tensor:
        """Return so many scenes of each thing; none where there are no things.

        Args:
            count: Scenes of a thing.
            seed: Decides which.
        """
        if not self.things:
            return torch.empty(0, 3, 224, 224)
        return zoo.scenes(self.things, self.photographs, count * len(self.things), seed=seed)

    def pictures(self, crops: int, scenes: int, seed: int) -> Tensor:
        """Return crops of each photograph, and behind them scenes of each thing."""
        return in_order(torch.cat([self.crops(crops, seed), self.scenes(scenes, seed)]))


class Answers:
    """What the original says to some pictures, and how near others come.

    Args:
        original: The float model.
        pictures: Shape ``(pictures, 3, 224, 224)``.
    """

    def __init__(self, original: nn.Module, pictures: Tensor) -> None:
        self.batches = in_order(pictures).split(16)
        self.wanted = self._outputs(original)

    def __call__(self, model: Callable[..., Any]) -> dict[str, float]:
        """Return how often the first guess is the original's, is among its five, and the mean divergence in nats."""
        found, wanted = self._outputs(model), self.wanted
        first = wanted.argmax(-1)
        divergence = nn.functional.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return {
            "agreement": float((found.argmax(-1) == first).float().mean()),
            "in five": float((found.topk(5).indices == first[:, None]).any(1).float().mean()),
            "divergence": float(divergence),
        }

    def _outputs(self, model: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([torch.as_tensor(_first(model(batch))) for batch in self.batches]).float()


def in_order(pictures: Tensor) -> Tensor:
    """Return pictures with the channels last in memory: depthwise convolutions in torch take a third less time."""
    return pictures.contiguous(memory_format=torch.channels_last)


def _photographs(part: str, python_only: bool) -> list[str]:
    known = {**zoo.PHOTOGRAPHS, **({} if python_only else zoo.DEBIAN_PHOTOGRAPHS)}
    return [name for name, belongs in known.items() if belongs == part]


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple | list) else outputs
