"""The ``griffin`` command. Sub-commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from griffin_vllm import __version__
from griffin_vllm.errors import GriffinError


class _OneLineErrors(TyperGroup):
    """Bad input ends in one red line on stderr and exit status 2, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GriffinError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GRIFFIN speculative decoding for vLLM: serve, train and measure draft heads.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"griffin-vllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """GRIFFIN speculative decoding for vLLM: serve, train and measure draft heads."""


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint folder goes.")],
) -> None:
    """Write SmolLM2-135M-Instruct, a small real chat model, as a checkpoint folder (bf16)."""
    from griffin_vllm.demo import write_demo_model

    written = write_demo_model(folder)
    typer.echo(f"{folder}: {'written' if written else 'is already there'}")
