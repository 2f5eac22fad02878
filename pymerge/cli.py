"""The command line: the commands, and what an error becomes."""

from __future__ import annotations

from typing import Annotated

import typer

from pymerge._version import __version__
from pymerge.commands.adapters import combine_lora, extract_lora
from pymerge.commands.demo import demo
from pymerge.commands.doctor import doctor
from pymerge.commands.explain import explain
from pymerge.commands.inspect import inspect
from pymerge.commands.materialize import materialize
from pymerge.commands.merge import merge
from pymerge.commands.methods import methods
from pymerge.commands.multi import multi
from pymerge.commands.options import Debug
from pymerge.commands.plan import plan
from pymerge.commands.push import push
from pymerge.commands.raw import raw
from pymerge.commands.report import report
from pymerge.commands.run import RUN_SETTINGS, run
from pymerge.commands.running import run_app
from pymerge.commands.verify import verify

app = typer.Typer(
    name="pymerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge the weights of fine-tuned models: streamed, resumable, deterministic to the bit.",
    epilog="Exit codes: 0 done, 2 your input is wrong, 3 storage failed, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pymerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", envvar="PYMERGE_DEBUG"),
    ] = False,
) -> None:
    """Options that come before the command."""
    Debug.shown = Debug.shown or debug


app.command()(merge)
app.command()(multi)
app.command()(plan)
app.command()(explain)
app.command(context_settings=RUN_SETTINGS)(run)
app.command()(raw)
app.command()(verify)
app.command()(report)
app.command()(push)
app.command()(materialize)
app.command("extract-lora")(extract_lora)
app.command("combine-lora")(combine_lora)
app.command()(inspect)
app.command()(methods)
app.command()(doctor)
app.command()(demo)


def main() -> None:
    """Entry point of the command ``pymerge``."""
    run_app(app)


if __name__ == "__main__":
    main()
