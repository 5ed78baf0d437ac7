"""The command ``dwindle``: thin commands that call what Python users call."""

from dwindle.cli.application import main

__all__ = ["main"]
