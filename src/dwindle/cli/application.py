"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import dwindle
from dwindle.cli.export import export_command
from dwindle.cli.inspect import inspect_command
from dwindle.cli.measure import measure_command
from dwindle.cli.run import run_command
from dwindle.cli.search import search_command, worker_command
from dwindle.cli.sensitivity import sensitivity_command
from dwindle.config.errors import DwindleError

__all__ = ["app", "main"]

app = typer.Typer(
    name="dwindle",
    help="Makes trained PyTorch models smaller and faster for real, and proves that it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run_command)
app.command("inspect")(inspect_command)
app.command("measure")(measure_command)
app.command("sensitivity")(sensitivity_command)
app.command("search")(search_command)
app.command("worker")(worker_command)
app.command("export")(export_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dwindle {dwindle.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what libraries say.")] = False,
) -> None:
    """Make trained PyTorch models smaller and faster for real, and prove it."""


def main() -> None:
    """Entry point of the command: an error of dwindle becomes one message and exit code 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    else:
        # What torch and the exporters say to their own developers would drown what we say to the user.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except DwindleError as error:
        if debug:
            raise
        print(f"dwindle: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away (`dwindle ... | head`); Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
