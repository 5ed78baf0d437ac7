"""Which calls compute the gates of squeeze and excitation: averages in, a factor for each channel out."""

from __future__ import annotations

from dwindle.quantization.calls import CallKey
from dwindle.quantization.operators import Backend
from dwindle.quantization.overrides import Overrides
from dwindle.quantization.recording import Operation, Recording


def gating_calls(recording: Recording, backend: Backend, overrides: Overrides) -> set[CallKey]:
    """Return the calls between an average and the gate made of it: hardly any work, on very few values.

    Args:
        recording: The operations of the model.
        backend: What counts as an average and as a gate.
        overrides: What the config_list says; a layer that it names is left out.
    """
    producers, consumers = recording.producers(), recording.consumers()

    def multiplies(gate: Operation) -> bool:
        readers = [reader for value in gate.outputs for reader, _ in consumers.get(value.index, ())]
        return any("mul" in reader.key.operation for reader in readers)

    found: set[CallKey] = set()
    for operation in recording.operations:
        if operation.key.operation not in backend.gates or not multiplies(operation):
            continue
        chain: list[CallKey] = []
        value = operation.active_inputs[0][1] if operation.active_inputs else None
        while value is not None:
            producer = producers.get(value.index)
            if producer is None or len(producer.active_inputs) != 1:
                break
            if producer.key.operation in backend.pools:
                found.update(chain)
                break
            if not overrides.names(producer.key.module):
                chain.append(producer.key)
            value = producer.active_inputs[0][1]
    return found
