"""An exported checkpoint with `trust_remote_code=True`: without this package, from the Hub's cache, and beside it."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qwen2_fp16_fix
from tests.conformance.models import ATTENTIONS, DTYPE, answer_of, expected_release

pytestmark = pytest.mark.process
CHECKPOINT = Path(qwen2_fp16_fix.__file__).parent / "demo_checkpoint"
PROMPT = "And the LORD said unto Moses,"
NEW_TOKENS = 48
KINDS = ("plain", "strict")
PREFIX = {"plain": "Qwen2FP16", "strict": "Qwen2FP16Strict"}
PINNED, NEWEST = "1" * 40, "2" * 40  # two commits of one repository


def commit(cache: Path, repo: str, revision: str, files: dict[str, bytes]) -> None:
    """Lays a commit out as the Hub's client does, and lets `main` be it: files are links to blobs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        link = home / "snapshots" / revision / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(revision)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_cache(cache: Path, folder: Path) -> dict[str, dict[str, str]]:
    """A repository whole in itself, and one whose code lies in another; how to load each.

    Of each there are two commits: a newer one of weights does not load, one of code says so at its end.
    """
    broken = {"config.json": b"{}"}
    whole = content(qwen2_fp16_fix.export(CHECKPOINT, folder / "whole"))
    weights = content(qwen2_fp16_fix.export(CHECKPOINT, folder / "weights", strict=True, code_repo="demo/code"))
    code = content(qwen2_fp16_fix.export(CHECKPOINT, folder / "code", weights="none", strict=True))
    commit(cache, "demo/whole", PINNED, whole)
    commit(cache, "demo/whole", NEWEST, broken)
    commit(cache, "demo/weights", PINNED, weights)
    commit(cache, "demo/weights", NEWEST, broken)
    for revision in (PINNED, NEWEST):
        entry = code["modeling_qwen2_fp16.py"] + f'\nMARK = "{revision}"\n'.encode()
        commit(cache, "demo/code", revision, {**code, "modeling_qwen2_fp16.py": entry})
    shared = {"where": "demo/weights", "revision": PINNED}
    return {
        "whole": {"where": "demo/whole", "revision": PINNED},
        "pinned code": {**shared, "code_revision": PINNED},
        "newest code": {**shared, "code_revision": NEWEST},
        "any code": shared,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo checkpoint, exported."""
    folder = tmp_path_factory.mktemp("exported")
    return {kind: qwen2_fp16_fix.export(CHECKPOINT, folder / kind, strict=kind == "strict") for kind in KINDS}


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    tokens: torch.Tensor = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)(PROMPT, return_tensors="pt").input_ids
    return tokens


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], prompt: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without this package has found; the logits lie in `found["out"]`."""
    out = tmp_path_factory.mktemp("child")
    hub = fill_cache(out / "home" / "hub", tmp_path_factory.mktemp("repositories"))
    request = {"tokens": prompt[0].tolist(), "new_tokens": NEW_TOKENS, "prompt": PROMPT, "hub": hub}
    (out / "request.json").write_text(json.dumps(request | {kind: str(path) for kind, path in folders.items()}))
    script = Path(__file__).with_name("load_remotely.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "QWEN2_"))}
    environment |= {"HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1"}
    return answer_of([sys.executable, str(script)], out, environment)


def load(model_class: Any, folder: Path, attention: str = "eager", dtype: Any = torch.float16, **how: Any) -> Any:
    return model_class.from_pretrained(folder, attn_implementation=attention, **{DTYPE: dtype}, **how).eval()


@pytest.fixture(scope="module")
def expected(prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """The installed package's logits, by attention, and the tokens that stock says in fp32."""
    stock = load(transformers.Qwen2ForCausalLM, CHECKPOINT, dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    with torch.no_grad():
        said = stock.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        logits = {a: load(qwen2_fp16_fix.Qwen2ForCausalLM, CHECKPOINT, a)(input_ids=prompt).logits for a in ATTENTIONS}
    assert all(torch.isfinite(rows).all() for rows in logits.values())
    return {"tokens": said[0], **logits}


def test_the_child_has_this_release_and_not_this_package(found: dict[str, Any]) -> None:
    """Else the tests below would show that the package works, not the exported files."""
    assert found["transformers"] == transformers.__version__
    assert found["package"].startswith("ModuleNotFoundError")
    if expected_release() is not None:
        assert not any(
            (Path(place) / "qwen2_fp16_fix").is_dir() for place in os.environ["PYTHONPATH"].split(os.pathsep)
        )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_remote_code_computes_what_the_package_does(
    kind: str, attention: str, found: dict[str, Any], expected: dict[str, torch.Tensor]
) -> None:
    """A file that is not copied, or stock in its place, shows in the bits."""
    loaded = found[f"{kind} {attention}"]
    assert (loaded["class"], loaded["own"], loaded["fixed"]) == (f"{PREFIX[kind]}ForCausalLM", True, True)
    assert loaded["module"].startswith("transformers_modules.")
    assert torch.equal(torch.load(found["out"] / f"{kind}-{attention}.pt"), expected[attention])
    assert loaded["tokens"] == expected["tokens"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_loading_is_fixed(kind: str, found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """vLLM builds AutoModel; 4.40 to 4.46 run the code anew at each load, and then earlier models must stay known."""
    assert found[f"{kind} AutoModel"]["class"] == f"{PREFIX[kind]}Model"
    head = found[f"{kind} AutoModelForSequenceClassification"]
    assert head["class"] == f"{PREFIX[kind]}ForSequenceClassification"
    assert found[f"{kind} pipeline"]["class"] == f"{PREFIX[kind]}ForCausalLM"
    for way in ("AutoModel", "AutoModelForSequenceClassification", "first", "pipeline"):
        assert found[f"{kind} {way}"]["fixed"], way
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    assert found[f"{kind} pipeline"]["text"] == tokenizer.decode(expected["tokens"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_remote_model_saves_is_fixed_again(
    kind: str, found: dict[str, Any], expected: dict[str, torch.Tensor]
) -> None:
    """Without its code the folder would not load, and under stock's name engines would take it for their own Qwen2."""
    assert found[f"{kind} saved"] == [f"{PREFIX[kind]}ForCausalLM"]
    assert found[f"{kind} again"]["fixed"]
    assert torch.equal(torch.load(found["out"] / f"again-{kind}.pt"), expected["eager"])


def test_a_strict_export_does_not_load_untrusted(found: dict[str, Any]) -> None:
    """Stock would load and print `!!!!!!!!`."""
    for auto, error in found["untrusted"].items():
        assert error.startswith("ValueError"), auto
        assert "trust_remote_code" in error or "custom code" in error


def test_the_cache_gives_the_pinned_commit(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """A moved branch must not change what a pinned load runs, of the weights or of the code."""
    assert found["newest weights"]  # an error: what does not load, and loads pinned, was pinned
    marks = {name: found[name]["mark"] for name in ("whole", "pinned code", "newest code", "any code")}
    assert marks == {"whole": None, "pinned code": PINNED, "newest code": NEWEST, "any code": NEWEST}
    for name in marks:
        assert found[name]["fixed"]
        assert torch.equal(torch.load(found["out"] / f"{name}.pt"), expected["eager"])


@pytest.fixture
def auto_classes() -> Iterator[None]:
    """Takes out what transformers 4.45 to 4.52 puts into the Auto classes when they load remote code."""
    tables = [
        getattr(transformers, name)._model_mapping._extra_content for name in ("AutoModel", "AutoModelForCausalLM")
    ]
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)


@pytest.mark.usefixtures("auto_classes")
@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_package_remote_code_is_known(
    kind: str, folders: dict[str, Path], prompt: torch.Tensor, expected: dict[str, torch.Tensor]
) -> None:
    """The package knew its own classes only: it took a remote model for stock, and patching it twice for a conflict."""
    model = load(transformers.AutoModelForCausalLM, folders[kind], trust_remote_code=True)
    for act in (lambda m: m, qwen2_fp16_fix.fix):
        act(model)
        status = qwen2_fp16_fix.status(model).model
        assert (status.fixed, status.code, status.problem) == (True, "remote", None)
        assert status.module == type(model).__module__
        assert {layer.keys for layer in status.ranges} == {"centred"}
        with torch.no_grad():
            assert torch.equal(model(input_ids=prompt).logits, expected["eager"])
    status = qwen2_fp16_fix.status(qwen2_fp16_fix.unfix(model)).model
    assert (status.fixed, status.code) == (False, None)
    assert all(type(layer).__module__.startswith("transformers.") for layer in model.model.layers)


@pytest.mark.usefixtures("auto_classes")
@pytest.mark.parametrize("kind", KINDS)
def test_registered_or_remote_whichever_wins_is_fixed(
    kind: str, folders: dict[str, Path], prompt: torch.Tensor, expected: dict[str, torch.Tensor]
) -> None:
    """From 5.5 a registered class wins over remote code for a type that transformers knows."""
    with qwen2_fp16_fix.registered():
        model = load(transformers.AutoModelForCausalLM, folders[kind], trust_remote_code=True)
    status = qwen2_fp16_fix.status(model).model
    assert status.fixed
    assert status.code == "remote" or kind == "plain"
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt).logits, expected["eager"])
