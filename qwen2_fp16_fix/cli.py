"""The command line. Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 unsupported."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import __version__
from .launch import UsageError
from .launch import run as run_program
from .patches.errors import CheckpointError, MetaTensorError, NotQwen2Error, Qwen2FP16FixError, VerificationError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Qwen2 and Qwen2.5 in float16 without NaN."""


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Show stock float16 printing !!!!!!!! and the fix printing the fp32 text, on a checkpoint inside this package."""
    from . import demo as room

    findings = room.measure(progress=Console(stderr=True))
    print(json.dumps(findings, indent=2)) if as_json else room.render(findings, Console())
    raise typer.Exit(0 if findings["as_promised"] else 1)


@app.command()
def certify(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, or a .safetensors file beside its config.json.")],
    as_json: AsJson = False,
) -> None:
    """Prove from the weights that no prompt can make a checkpoint overflow with the fix, or say what is in the way."""
    from . import certificate as room

    found = room.certify(path, progress=Console(stderr=True))
    print(json.dumps(found, indent=2)) if as_json else room.render(found, Console())
    raise typer.Exit(0 if found["proven"] else 1)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, with its tokenizer.")],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; else a passage that comes with this package.")
    ] = None,
    as_json: AsJson = False,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL allowed to fixed float16, in nats.")] = None,
    max_ppl_drift: Annotated[
        float | None, typer.Option(help="Largest relative change of perplexity allowed to fixed float16.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens read together; 1024, or what the model can.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; half a window.")] = None,
    tokens: Annotated[int, typer.Option(help="How many of the text's tokens to read.")] = 4096,
    resume: Annotated[
        Path | None, typer.Option(help="A JSON file of finished rows: written after each, read at the start.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
) -> None:
    """Run your checkpoint stock and fixed in three precisions and measure how far each row is from stock fp32."""
    from . import verification as room

    found = room.verify(
        path,
        text,
        window=window,
        stride=stride,
        tokens=tokens,
        device=device,
        max_kl=max_kl,
        max_ppl_drift=max_ppl_drift,
        resume=resume,
        progress=Console(stderr=True),
    )
    print(json.dumps(found, indent=2, allow_nan=False)) if as_json else room.render(found, Console())
    raise typer.Exit(0 if found["passed"] else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(context: typer.Context) -> None:
    """Run an unchanged program with the fix registered, child processes included: run -- python eval.py …"""
    raise typer.Exit(run_program(context.args))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what is installed, whether this release is supported, and whether the fix is switched on."""
    from .inspection import status as found_status

    found = found_status()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            if name != "registered":  # a process of its own has nothing registered
                print(f"{name:>12}  {'' if value is None else value}")
    raise typer.Exit(3 if found["problem"] else 0)


def main() -> None:
    """Runs the command line; an error this project raises becomes one sentence on stderr and its exit code."""
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except (CheckpointError, NotQwen2Error, MetaTensorError, VerificationError) as error:
        _fail(error, 2)
    except Qwen2FP16FixError as error:
        _fail(error, 3)


def _fail(error: Exception, code: int) -> None:
    stderr.print(f"qwen2-fp16-fix: {error}", markup=False)
    sys.exit(code)
