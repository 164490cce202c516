"""Commands that look at a checkpoint, at this machine or at what is installed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    FLAG,
    AsJson,
    AttentionChoice,
    Details,
    DeviceOption,
    Force,
    Lang,
    Language,
    Output,
    PathOrId,
)
from .output import as_json_text, check_output
from .terminal import Notices, loading, printing, show, stderr


def demo(
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
    lang: Lang = Language.ENGLISH,
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Run nothing: put the checkpoint into a new folder.")
    ] = None,
) -> None:
    """Show stock float16 printing !!!!!!!! and the fix printing the fp32 text, on a checkpoint inside this package."""
    check_output(output, force)
    with loading():
        from .. import demo as demonstration

    if save is not None:
        demonstration.save(save)
        stderr.print(f"wrote {save}", markup=False)
        if as_json:
            with printing():
                print(as_json_text({"saved": str(save)}))
        return
    found = demonstration.measure(language=lang.value, progress=Notices())
    show(found.to_dict(), found, as_json, output=output)
    raise typer.Exit(0 if found.as_promised else 1)


def certify(
    path: PathOrId,
    details: Details = False,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
    lang: Lang = Language.ENGLISH,
) -> None:
    """Prove from the weights that no prompt can make a checkpoint overflow with the fix, or say why not."""
    check_output(output, force)
    with loading():
        from ..certification import certify as certification

    found = certification.certify(path, language=lang.value, progress=Notices())
    show(found.to_dict(), found.details() if details else found, as_json, output=output)
    raise typer.Exit(0 if found.proven else 1)


def verify(  # noqa: PLR0913, options of a command
    path: PathOrId,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read. Default: a passage of this package.")
    ] = None,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
    lang: Lang = Language.ENGLISH,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Largest mean KL allowed for fixed float16.")
    ] = None,
    max_ppl_drift: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Largest relative change of perplexity allowed for it.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens read together. Default: 1024, or the model's maximum.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens from window to window. Default: half a window.")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the text to read.")] = 4096,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished rows in a JSON file, and continue from it.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Run your checkpoint stock and fixed in three precisions and measure how far each row is from stock fp32."""
    check_output(output, force)
    with loading():
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
        language=lang.value,
        progress=Notices(),
    )
    show(found.to_dict(), found, as_json, output=output)
    raise typer.Exit(0 if found.passed else 1)


def doctor(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH_OR_ID", help="A checkpoint to examine as well: a folder, or OWNER/NAME."),
    ] = None,
    details: Details = False,
    redact: Annotated[
        bool, typer.Option("--redact", metavar=FLAG, help="Write PATH in place of your path, to publish the report.")
    ] = False,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
    lang: Lang = Language.ENGLISH,
) -> None:
    """Say whether a checkpoint breaks in stock float16, how to run it here, and whether the fix works here."""
    check_output(output, force)
    with loading():
        from ..diagnosis import doctor as diagnosis

    found = diagnosis.doctor(path, language=lang.value, redacted=redact, progress=Notices())
    page = found.details() if details else found
    show(found.to_dict(), page, as_json, output=output, whole_lines=True, escaped=False)
    if found.exit_code == 2:  # a checkpoint that every other command refuses in one sentence
        stderr.print(f"qwen2-fp16-fix: {found.verdict}", markup=False)
    raise typer.Exit(found.exit_code)


def scan(  # noqa: PLR0913, options of a command
    path: PathOrId,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt a line, or a JSON list of prompts. Default: four short ones."),
    ] = None,
    fixed: Annotated[
        bool | None,
        typer.Option("--fixed/--stock", metavar=FLAG, help="Which model. Default: stock; both for a report."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report, one HTML page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
    as_json: AsJson = False,
    output: Output = None,
    force: Force = False,
    lang: Lang = Language.ENGLISH,
    verification: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Result of verify, as JSON, for the report.")
    ] = None,
    attention: Annotated[
        AttentionChoice, typer.Option(metavar="eager|sdpa", help="eager stores raw scores, sdpa does not.")
    ] = AttentionChoice.eager,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt to read.")] = 2048,
    device: DeviceOption = None,
) -> None:
    """Measure on real prompts how close your checkpoint comes to float16's limit, and name what exceeds it first."""
    with loading():
        from ..report.files import ScanFiles, as_data, scan_to_files
        from ..scanning.sentences import rendered

    def display(scans: list[Any]) -> None:
        with printing() as page:
            if as_json:
                print(as_json_text(as_data(scans)))
            else:
                for each in scans:
                    page.print(rendered(each, lang.value))

    found = scan_to_files(
        path,
        ScanFiles(report, output, png, verification, lang.value),
        fixed=fixed,
        force=force,
        wrote=lambda written: stderr.print(f"wrote {written}", markup=False),
        show=display,
        prompts=prompts,
        attention=attention.value,
        tokens=tokens,
        device=device,
        language=lang.value,
        progress=Notices(),
    )
    raise typer.Exit(0 if all(scan.finite for scan in found) else 1)


def status(as_json: AsJson = False, output: Output = None, force: Force = False) -> None:
    """Say what is installed, whether this release is supported, and whether the fix is switched on."""
    check_output(output, force)
    with loading():
        from .. import model_status

    found = model_status.status()
    show(found.to_dict(), found, as_json, output=output, whole_lines=True)
    raise typer.Exit(3 if found.problem else 0)
