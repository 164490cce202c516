"""Commands that prepare what others run, run it, and pin it."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExportError, PublishError
from ..launch import launcher
from .options import FLAG, AsJson, Force, Output, PathOrId, WeightsChoice
from .output import as_json_text, check_output
from .terminal import loading, printing, show


def export(
    path: PathOrId,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    weights: Annotated[
        WeightsChoice,
        typer.Option(metavar="link|copy", help="Hard links to the original's weights where possible, or copies."),
    ] = WeightsChoice.link,
    code_only: Annotated[bool, typer.Option("--code-only", metavar=FLAG, help="Leave the weights out.")] = False,
    code_repo: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The repository that holds the code, with or without @REVISION."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", metavar=FLAG, help="A model type of its own: loading without trust_remote_code fails."
        ),
    ] = False,
    verification: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Result of verify, as JSON, for the model card.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a folder for the Hub: the checkpoint with the fix as remote code, for use without this package."""
    with loading():
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
        print(as_json_text({"exported": str(made)}) if as_json else made)


def push(  # noqa: PLR0913, options of a command
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder written by `export`.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="A repository on the Hub; created if there is none.")
    ],
    public: Annotated[bool, typer.Option("--public", metavar=FLAG, help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="A branch. Default: main.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=FLAG, help="Check and list the files, without the network.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar=FLAG, help="Push even if the repository holds something else.")
    ] = False,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Upload an exported folder to the Hub, into a private repository unless told otherwise."""
    check_output(output, force)
    from ..hub import push as pushing

    try:
        found = pushing.push(folder, repo, private=not public, revision=revision, dry_run=dry_run, overwrite=overwrite)
    except KeyboardInterrupt:
        raise PublishError(f"interrupted: {repo} may have part of the weights; push again to go on.") from None
    show(found, pushing.as_table(found), as_json, output=output)


def run(context: typer.Context) -> None:
    """Run an unchanged program with the fix registered, its child processes included.

    `python` and `python3` are the Python that this package is installed in. To use another one, give its path.
    """
    raise typer.Exit(launcher.run(context.args))


def lock(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the lock to a file, not to stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", metavar=FLAG, help="Overwrite a file with other content.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Changes nothing: a lock is JSON.")] = False,
) -> None:
    """Record what decides the numbers here: versions, and hashes of the code of the fix and of transformers."""
    with loading():
        from .. import locking

    if output is not None:
        locking.lock(output, force)
    if output is None or as_json:
        with printing():
            print(locking.as_text(locking.make_lock()), end="")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A lock that `qwen2-fp16-fix lock` has made.")],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Check the files of an exported folder, not the installed ones."),
    ] = None,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Say what has changed since a lock was made, one sentence each: the fix, transformers and its Qwen2, torch."""
    check_output(output, force)
    with loading():
        from .. import locking

    found = locking.check(file, folder)
    show(found.to_dict(), found, as_json, output=output, whole_lines=True)
    raise typer.Exit(0 if found.passed else 1)
