"""Commands that prepare what others run, run it, and pin it."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExportError, PublishError
from ..launch import launcher
from .options import AsJson, WeightsChoice
from .terminal import printing, show


def export(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or OWNER/NAME on the Hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    weights: Annotated[
        WeightsChoice, typer.Option(help="Hard links to the original's, where they can be had, or copies.")
    ] = WeightsChoice.link,
    code_only: Annotated[bool, typer.Option("--code-only", help="Leave the weights out.")] = False,
    code_repo: Annotated[
        str | None, typer.Option(help="OWNER/NAME or OWNER/NAME@REVISION, which holds the code; none is copied then.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A model type of its own: without trust_remote_code loading fails.")
    ] = False,
    verification: Annotated[Path | None, typer.Option(help="What `verify --json` printed, for the model card.")] = None,
) -> None:
    """Write a folder for the Hub: the checkpoint with the fix as remote code, for use without this package."""
    from ..hub import export as exporting

    try:
        made = exporting.export(
            path,
            out,
            weights="none" if code_only else weights.value,
            code_repo=code_repo,
            strict=strict,
            verification=verification,
        )
    except KeyboardInterrupt:
        raise ExportError(f"interrupted: {out} was not written, and what was begun is removed.") from None
    with printing():
        print(made)


def push(
    folder: Annotated[Path, typer.Argument(help="What `export` has written.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; main if left away.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list, and leave the network alone.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also into a repository that holds something else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an exported folder to the Hub, into a private repository unless told otherwise."""
    from ..hub import push as pushing

    try:
        found = pushing.push(folder, repo, private=not public, revision=revision, dry_run=dry_run, overwrite=overwrite)
    except KeyboardInterrupt:
        raise PublishError(f"interrupted: {repo} may have part of the weights; push again to go on.") from None
    show(found, pushing.as_table(found), as_json)


def run(context: typer.Context) -> None:
    """Run an unchanged program with the fix registered, child processes included: run -- python eval.py …"""
    raise typer.Exit(launcher.run(context.args))


def lock(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; else it is printed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it says something else.")] = False,
) -> None:
    """Write down what decides the numbers here: versions, and hashes of the code of the fix and of transformers."""
    from .. import locking

    if output is None:
        with printing():
            print(locking.as_text(locking.make_lock()), end="")
    else:
        locking.lock(output, force)


def check(
    file: Annotated[Path, typer.Argument(help="A lock that `qwen2-fp16-fix lock` has made.")],
    folder: Annotated[
        Path | None, typer.Option(help="Check the files of an exported folder, not the installed ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what has drifted from a lock, a sentence each: the code of the fix, transformers and its Qwen2, torch."""
    from .. import locking

    found = locking.check(file, folder)
    show(found.to_dict(), found, as_json, whole_lines=True)
    raise typer.Exit(0 if found.passed else 1)
