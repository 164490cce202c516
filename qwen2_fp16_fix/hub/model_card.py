"""The model card of an exported checkpoint: what it is, how to load and pin it, how far from fp32 it was measured."""

import json
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..errors import ExportError
from ..patches.version_map import SUPPORTED
from ..results import Result
from ..verification.saved import read_saved
from .export_config import STRICT, heads_of

TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}
#: How a licence that Qwen checkpoints come under begins, and what the Hub calls it.
LICENCES = (
    ("Apache License", {"license": "apache-2.0"}),
    ("Tongyi Qianwen RESEARCH LICENSE", {"license": "other", "license_name": "tongyi-qianwen-research"}),
    ("Tongyi Qianwen LICENSE", {"license": "other", "license_name": "tongyi-qianwen"}),
    ("Qwen RESEARCH LICENSE", {"license": "other", "license_name": "qwen-research"}),
    ("Qwen LICENSE", {"license": "other", "license_name": "qwen"}),
)
MEASURED = ("name", "dtype", "fixed", "finite", "perplexity", "kl_mean", "kl_max", "top1_agreement")

CARD = """
# {name} in float16, without NaN

{what}
with [qwen2-fp16-fix](https://pypi.org/project/qwen2-fp16-fix/) {version} as remote code. Qwen2's attention
scores and residual stream pass what float16 can hold (65504), and stock transformers then prints
`!!!!!!!!`. This code keeps them in range.

## What changed

Nothing in the weights: {weights}.

In the code, for float16: an fp32 residual stream, norms and rotation in fp32, fp32 scores in eager
attention, keys centred before they are rounded, and SwiGLU, `down_proj` and `o_proj` kept in range by
exact powers of two. fp32 is bit for bit transformers' own.

Supported: {supported}. Nothing but transformers, torch and `packaging` is needed.

## Load

```python
import torch
from transformers import {auto}

model = {auto}.from_pretrained(
    "OWNER/NAME",
    trust_remote_code=True,
    dtype=torch.float16,  # torch_dtype= before transformers 4.56
    attn_implementation="eager",  # or "sdpa"
    revision="COMMIT",{code_revision}
)
```

{without}

## Pin

Without a `revision`, what loads is what the branch holds that day. `revision` with a full commit hash pins
the weights, the configuration and the code of this repository.{pin}
transformers and torch decide the numbers as well: pin them in your requirements.

## Measured error

{measured}

## Licence

{licence}
The code of qwen2-fp16-fix is under Apache-2.0.
"""


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
    """The card as text, with front matter. folder: the original, with its card and licence; config: the exported."""
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
    """The front matter of the checkpoint's own card; where that names no licence, what its LICENSE file is."""
    found: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file():
        try:
            found = dict(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.__dict__)
        except Exception as error:  # the card is a foreign text, and yaml's errors have no common base with the Hub's
            first = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"{card} has a front matter that cannot be read ({first}): correct or remove it."
            ) from None
    if not found.get("license"):
        found |= _licence_of(folder)
    return found


def _licence_of(folder: Path) -> dict[str, str]:
    """What the Hub calls the licence whose text lies in the folder."""
    file = folder / "LICENSE"
    if not file.is_file():
        return {}
    start = file.read_text(encoding="utf-8", errors="replace")[:500].lower()
    known = next((data for begin, data in LICENCES if begin.lower() in start), {"license": "other"})
    return known if known["license"] != "other" else known | {"license_link": "LICENSE"}


def read_verification(given: Result | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """What `verify` returned, or a file with it. Raises ExportError for anything else."""
    name = "the verification" if isinstance(given, Result | Mapping) else str(given)
    try:
        found = read_saved(given, fields=("versions", "checkpoint", "settings", "verdict"), row=MEASURED)
        _measured(found)
    except OSError as error:
        raise ExportError(f"{name} cannot be read ({error.strerror}): give what `verify --json` printed.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ExportError(f"{name} is not JSON: give what `verify --json` printed.") from None
    except (TypeError, LookupError, ValueError, AttributeError):
        raise ExportError(f"{name} is not what `verify` returns: give what `verify --json` printed.") from None
    return found


def _measured(verification: Mapping[str, Any] | None) -> str:
    """The rows in 16 bit as a table, and the verdict."""
    if verification is None:
        return "Not measured: `qwen2-fp16-fix verify` on the folder does."
    versions, settings = verification["versions"], verification["settings"]
    name = PureWindowsPath(str(verification["checkpoint"])).name  # of any system's path, whose folders are private
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
        "**Without `trust_remote_code=True` transformers silently builds its own Qwen2 from these files, with\n"
        "the NaN.** An export with `--strict` fails instead."
    )


def _pin(code_repo: str | None, code_revision: str | None) -> str:
    if code_repo is None:
        return ""
    wanted = f" This export was made for `{code_revision}`." if code_revision else ""
    return f"\nThe code lies in [{code_repo}](https://huggingface.co/{code_repo}): `code_revision` pins it.{wanted}"


def _licence(licence: Mapping[str, Any], base_model: str | None) -> str:
    owner = f"of [{base_model}](https://huggingface.co/{base_model})" if base_model else "of the original"
    if not licence:
        return f"The weights are under the licence {owner}, which its files do not\nstate: look it up."
    name = licence.get("license_name") or licence["license"]
    link = f" ({licence['license_link']})" if licence.get("license_link") else ""
    return f"The weights are under the licence {owner}: {name}{link}."
