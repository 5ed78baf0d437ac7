"""Random small models of the supported operators, as plain data that builds them."""

from support.random_graphs.network import STEPS, RandomNetwork, Specification, build

__all__ = ["STEPS", "RandomNetwork", "Specification", "build"]
