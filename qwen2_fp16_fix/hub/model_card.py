"""The model card of an exported checkpoint, from the template `model_card.md`: how to load, pin and trust it."""

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..checkpoints.config import STRICT
from ..errors import ExportError, first_line
from ..files.reading import read_utf8
from ..patches.version_map import SUPPORTED
from .export_config import heads_of

TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}
#: The first words of each licence of Qwen checkpoints, and its name on the Hub.
LICENCES = (
    ("Apache License", {"license": "apache-2.0"}),
    ("Tongyi Qianwen RESEARCH LICENSE", {"license": "other", "license_name": "tongyi-qianwen-research"}),
    ("Tongyi Qianwen LICENSE", {"license": "other", "license_name": "tongyi-qianwen"}),
    ("Qwen RESEARCH LICENSE", {"license": "other", "license_name": "qwen-research"}),
    ("Qwen LICENSE", {"license": "other", "license_name": "qwen"}),
)
CARD = "\n" + (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")


def model_card(
    folder: Path,
    config: Mapping[str, Any],
    *,
    base_model: str | None,
    code_repo: str | None,
    code_revision: str | None,
    has_weights: bool,
    verification: Mapping[str, Any] | None,
) -> str:
    """The model card with its front matter.

    folder: the original, with its card and licence. config: the exported one.
    """
    source = source_metadata(folder)
    licence = {key: source[key] for key in ("license", "license_name", "license_link") if source.get(key)}
    pipeline, auto = TASKS[heads_of(config)[0]]
    data = ModelCardData(
        base_model=base_model,
        language=source.get("language"),
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["qwen2", "float16", "custom_code", "qwen2-fp16-fix"],
        **licence,
    )
    name = base_model or folder.name
    revision = code_revision or "COMMIT"
    text = CARD.format(
        name=name,
        what=f"This is {name}" if has_weights else f"This is the code for {name}, without weights,",
        version=__version__,
        weights="they are those of the original, byte for byte" if has_weights else "there are none here",
        supported=SUPPORTED,
        auto=auto,
        code_revision=f'\n    code_revision="{revision}",  # of {code_repo}, which holds the code' if code_repo else "",
        without=_without_remote_code(config["model_type"] == STRICT),
        pin=_pin(code_repo, code_revision),
        measured=_measured(verification),
        licence=_licence(licence, base_model),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def source_metadata(folder: Path) -> dict[str, Any]:
    """The front matter of the checkpoint's own card. If it names no licence, that of the LICENSE file is added."""
    found: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file():
        text = read_utf8(card, "another checkpoint", ExportError)
        try:
            found = dict(ModelCard(text, ignore_metadata_errors=True).data.__dict__)
        except Exception as error:  # errors of yaml and of the Hub's client have no common base
            raise ExportError(
                f"{card} has front matter that cannot be read ({first_line(error)}): correct it or remove it."
            ) from None
    if not found.get("license"):
        found |= _licence_of(folder)
    return found


def _licence_of(folder: Path) -> dict[str, str]:
    """The Hub's name for the licence whose text is in the folder."""
    file = folder / "LICENSE"
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as text:
        start = text.read(500).lower()
    known = next((data for begin, data in LICENCES if begin.lower() in start), {"license": "other"})
    return known if known["license"] != "other" else known | {"license_link": "LICENSE"}


def _measured(verification: Mapping[str, Any] | None) -> str:
    """The measured rows as a table, and the verdict."""
    if verification is None:
        return "Not measured. `qwen2-fp16-fix verify` on the folder measures it."
    versions, settings = verification["versions"], verification["settings"]
    name = PureWindowsPath(str(verification["checkpoint"])).name  # of a path of any system; its folders are private
    lines = [
        f"By `qwen2-fp16-fix verify` on `{name or '.'}`, against stock fp32 eager: {settings['tokens']} "
        f"tokens in windows of {settings['window']} on {settings['device']}, transformers {versions['transformers']}, "
        f"torch {versions['torch']}.",
        "",
        "| | perplexity | KL mean | KL max | top-1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {_cell(row, 'perplexity', '.4f')} | {_cell(row, 'kl_mean', '.1e')} | "
        f"{_cell(row, 'kl_max', '.1e')} | {_cell(row, 'top1_agreement', '.4f')} |"
        for row in verification["rows"]
    ]
    return "\n".join([*lines, "", verification["verdict"]])


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    return "NaN" if not row["finite"] else "-" if row[key] is None else format(row[key], form)


def _without_remote_code(strict: bool) -> str:
    if strict:
        return (
            f"The model type is `{STRICT}`: without `trust_remote_code=True` the Auto classes refuse to load,\n"
            "and so does every engine that has no code for that type."
        )
    return (
        "**Without `trust_remote_code=True` transformers silently builds its own Qwen2 from these files, and the\n"
        "NaN are back.** An export with `--strict` fails instead."
    )


def _pin(code_repo: str | None, code_revision: str | None) -> str:
    if code_repo is None:
        return ""
    wanted = f" This export was made for `{code_revision}`." if code_revision else ""
    return f"\nThe code is in [{code_repo}](https://huggingface.co/{code_repo}): `code_revision` pins it.{wanted}"


def _licence(licence: Mapping[str, Any], base_model: str | None) -> str:
    owner = f"of [{base_model}](https://huggingface.co/{base_model})" if base_model else "of the original"
    if not licence:
        return f"The weights are under the licence {owner}, which its files do not\nstate: look it up."
    name = licence.get("license_name") or licence["license"]
    link = f" ({licence['license_link']})" if licence.get("license_link") else ""
    return f"The weights are under the licence {owner}: {name}{link}."
