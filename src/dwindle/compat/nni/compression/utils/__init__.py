"""``nni.compression.utils`` of NNI 3.0."""

from dwindle.compat.nni.dependency import auto_set_denpendency_group_ids, auto_set_dependency_group_ids

__all__ = ["auto_set_denpendency_group_ids", "auto_set_dependency_group_ids"]
