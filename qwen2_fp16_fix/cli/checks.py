"""Commands that look at a checkpoint, at this machine or at what is installed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, AttentionChoice, DeviceOption, Language
from .terminal import Notices, printing, show, stderr


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
    show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.as_promised else 1)


def certify(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, or a .safetensors file beside its config.json.")],
    as_json: AsJson = False,
) -> None:
    """Prove from the weights that no prompt can make a checkpoint overflow with the fix, or say what is in the way."""
    from ..certification import certify as certification

    found = certification.certify(path, progress=Notices())
    show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.proven else 1)


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
    show(found.to_dict(), found, as_json)
    raise typer.Exit(0 if found.passed else 1)


def doctor(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint folder, to be examined too.")] = None,
    as_json: AsJson = False,
    lang: Annotated[Language, typer.Option(help="Of the sentences.")] = Language.ENGLISH,
) -> None:
    """Say how to run Qwen2 on this machine, test the fix on it, and name what is in the way. Safe to paste anywhere."""
    from ..diagnosis import doctor as diagnosis

    found = diagnosis.doctor(path, language=lang.value, progress=Notices())
    show(found.to_dict(), found, as_json, whole_lines=True, escaped=False)
    raise typer.Exit(found.exit_code)


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


def status(as_json: AsJson = False) -> None:
    """Say what is installed, whether this release is supported, and whether the fix is switched on."""
    from .. import model_status

    found = model_status.status()
    show(found.to_dict(), found, as_json, whole_lines=True)
    raise typer.Exit(3 if found.problem else 0)
