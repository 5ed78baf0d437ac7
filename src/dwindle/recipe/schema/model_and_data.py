"""What a recipe may say of its model and its data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dwindle.recipe.schema.part import Count, Part

__all__ = ["CalibrationPart", "DataPart", "ModelPart"]


class ModelPart(Part):
    """Which model: ``package.module:callable``, ``timm/NAME``, ``hf/PATH``, or a directory dwindle wrote.

    Attributes:
        name: The name.
        arguments: Keyword arguments of the callable.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)


class CalibrationPart(Part):
    """Where calibration inputs come from, when not from the training data.

    Attributes:
        name: ``package.module:callable``; gives inputs alone, or whatever the data may be.
        arguments: Its keyword arguments.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)


class DataPart(Part):
    """Which data: ``package.module:callable``, called once; see :mod:`dwindle.recipe.data_source`.

    Attributes:
        name: The callable.
        arguments: Its keyword arguments.
        batch_size: Samples a training batch, for data that come as tensors.
        evaluation_batch_size: Samples a batch when nothing is trained.
        augment: ``package.module:callable``, called with ``(images, generator)`` on each training batch.
        augment_arguments: Further keyword arguments of ``augment``.
        limit: Only the first so many training samples, for data that come as tensors.
        test_limit: Only the first so many test samples, for data that come as tensors.
        validation: Share of the training samples (of data that come as tensors) that are held out of the training,
            where the data bring no entry ``validation`` of their own.
        evaluation: What models are scored on: the ``test`` data, or the held out ``validation`` data, so that choices
            can be made without looking at the test data.
        calibration: Where calibration inputs come from, when not from the training data.
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    batch_size: Count = 128
    evaluation_batch_size: Count = 512
    augment: str | None = None
    augment_arguments: dict[str, Any] = Field(default_factory=dict)
    limit: Count | None = None
    test_limit: Count | None = None
    validation: float | None = Field(default=None, gt=0.0, lt=1.0)
    evaluation: Literal["test", "validation"] = "test"
    calibration: CalibrationPart | None = None
