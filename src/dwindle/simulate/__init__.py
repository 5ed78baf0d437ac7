"""Simulators on a model's parameters, inputs and outputs: attach, change, read, switch off, take off."""

from dwindle.simulate.attaching import (
    detach,
    disabled,
    plain_state_dict,
    register_simulator,
    simulated_targets,
    simulator_of,
)
from dwindle.simulate.functional import OperationTarget, operations, register_operation_simulator
from dwindle.simulate.gathering import gathered
from dwindle.simulate.learned import Gate, ScoredMask, straight_through
from dwindle.simulate.masks import attach_mask, attach_masks, get_masks, masks_as_nested, set_mask
from dwindle.simulate.sharding import (
    has_shards,
    is_shard,
    refuse_shards,
    reshard,
    spread_like,
    whole,
    write_whole,
)
from dwindle.simulate.simulators import RESERVED, STAGES, MaskSimulator

__all__ = [
    "RESERVED",
    "STAGES",
    "Gate",
    "MaskSimulator",
    "OperationTarget",
    "ScoredMask",
    "attach_mask",
    "attach_masks",
    "detach",
    "disabled",
    "gathered",
    "get_masks",
    "has_shards",
    "is_shard",
    "masks_as_nested",
    "operations",
    "plain_state_dict",
    "refuse_shards",
    "register_operation_simulator",
    "register_simulator",
    "reshard",
    "set_mask",
    "simulated_targets",
    "simulator_of",
    "spread_like",
    "straight_through",
    "whole",
    "write_whole",
]
