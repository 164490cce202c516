"""The commands: the options of each, and the one call that it makes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from .._version import __version__
from ..errors import ExportError, PublishError
from ..launch import launcher
from .options import AsJson, AttentionChoice, DeviceOption, Language, WeightsChoice
from .terminal import Notices, printing

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
stderr = Notices(soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        with printing():
            print(__version__)
        raise typer.Exit


def _show(
    data: dict[str, Any], table: RenderableType, as_json: bool, *, whole_lines: bool = False, escaped: bool = True
) -> None:
    """Prints what a command has found, as JSON or as a table.

    whole_lines: no line of the table is wrapped. escaped: letters beyond ASCII become escapes in JSON.
    """
    with printing() as page:
        if as_json:
            # JSON has no NaN and no infinity. Results have None instead; anything else raises here.
            print(json.dumps(data, indent=2, ensure_ascii=escaped, allow_nan=False))
        else:
            page.print(table, soft_wrap=whole_lines)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Qwen2 and Qwen2.5 in float16 without NaN."""


@app.command()
def demo(
    as_json: AsJson = False,
    save: Annotated[
        Path | None, typer.Option(help="Run nothing: put the checkpoint into this new folder, to scan or certify it.")
    ] = None,
) -> None:
    """Show stock float16 printing !!!!!!!! and the fix printing the fp32 text, on a checkpoint inside this package."""
    from .. import demo as demonstration

    if save is not None:
        demonstration.save(save)
        stderr.print(f"wrote {save}", markup=False)
        if as_json:
            with printing():
                print(json.dumps({"saved": str(save)}, indent=2))
        return
    found = demonstration.measure(progress=Notices())
    _show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.as_promised else 1)


@app.command()
def certify(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, or a .safetensors file beside its config.json.")],
    as_json: AsJson = False,
) -> None:
    """Prove from the weights that no prompt can make a checkpoint overflow with the fix, or say what is in the way."""
    from .. import certificate

    found = certificate.certify(path, progress=Notices())
    _show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.proven else 1)


@app.command()
def verify(  # noqa: PLR0913, options of a command
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
    device: DeviceOption = None,
) -> None:
    """Run your checkpoint stock and fixed in three precisions and measure how far each row is from stock fp32."""
    from ..verification import verify as verification

    found = verification.verify(
        path,
        text,
        window=window,
        stride=stride,
        tokens=tokens,
        device=device,
        max_kl=max_kl,
        max_ppl_drift=max_ppl_drift,
        resume=resume,
        progress=Notices(),
    )
    _show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.passed else 1)


@app.command()
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


@app.command()
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
    _show(found, pushing.as_table(found), as_json)


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint folder, to be examined too.")] = None,
    as_json: AsJson = False,
    lang: Annotated[Language, typer.Option(help="Of the sentences.")] = Language.ENGLISH,
) -> None:
    """Say how to run Qwen2 on this machine, test the fix on it, and name what is in the way. Safe to paste anywhere."""
    from ..diagnosis import doctor as diagnosis

    found = diagnosis.doctor(path, language=lang.value, progress=Notices())
    _show(found.to_dict(), found, as_json, whole_lines=True, escaped=False)
    raise typer.Exit(found.exit_code)


@app.command()
def scan(  # noqa: PLR0913, options of a command
    path: Annotated[
        Path, typer.Argument(help="A checkpoint folder, with its tokenizer; it may be larger than memory.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line, or a JSON list of prompts; else four short ones.")
    ] = None,
    fixed: Annotated[
        bool | None,
        typer.Option("--fixed/--stock", help="Which model to scan; stock, or both for a report or picture."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page to show, one HTML file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the data, as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    verification: Annotated[Path | None, typer.Option(help="What verify --json printed, for the report.")] = None,
    lang: Annotated[Language, typer.Option(help="Of what is printed and reported.")] = Language.ENGLISH,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    attention: Annotated[
        AttentionChoice, typer.Option(help="eager stores raw scores, sdpa does not.")
    ] = AttentionChoice.eager,
    tokens: Annotated[int, typer.Option(help="How many tokens of each prompt to read.")] = 2048,
    device: DeviceOption = None,
) -> None:
    """Measure on real prompts how close your checkpoint comes to float16's limit, and name what passes it first."""
    from ..report.files import ScanFiles, scan_to_files
    from ..scanning.sentences import rendered

    def show(scans: list[Any]) -> None:
        with printing() as page:
            for each in scans:
                page.print(rendered(each, lang.value))

    found = scan_to_files(
        path,
        ScanFiles(report, json_file, png, verification, lang.value),
        fixed=fixed,
        force=force,
        wrote=lambda written: stderr.print(f"wrote {written}", markup=False),
        show=show,
        prompts=prompts,
        attention=attention.value,
        tokens=tokens,
        device=device,
        progress=Notices(),
    )
    raise typer.Exit(0 if all(scan.finite for scan in found) else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(context: typer.Context) -> None:
    """Run an unchanged program with the fix registered, child processes included: run -- python eval.py …"""
    raise typer.Exit(launcher.run(context.args))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what is installed, whether this release is supported, and whether the fix is switched on."""
    from .. import model_status

    found = model_status.status()
    _show(found.to_dict(), found, as_json, whole_lines=True)
    raise typer.Exit(3 if found.problem else 0)


@app.command()
def lock(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; else it is printed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it says something else.")] = False,
) -> None:
    """Write down what decides the numbers here: versions, and hashes of the patches and of what they rely on."""
    from .. import locking

    if output is None:
        with printing():
            print(locking.as_text(locking.make_lock()), end="")
    else:
        locking.lock(output, force)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A lock that `qwen2-fp16-fix lock` has made.")],
    folder: Annotated[
        Path | None, typer.Option(help="Check the files of an exported folder, not the installed ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what has drifted from a lock, a sentence each: patch files, transformers and its Qwen2, torch."""
    from .. import locking

    found = locking.check(file, folder)
    _show(found.to_dict(), found, as_json, whole_lines=True)
    raise typer.Exit(0 if found.passed else 1)
