"""A checkpoint by its Hub id, against a stand-in of the Hub: what is downloaded, and what each failure says."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints import hub_ids
from qwen2_fp16_fix.checkpoints.hub_ids import HubId, Wanted, find_checkpoint, parse_id
from qwen2_fp16_fix.errors import CheckpointError, HubError
from tests.checkpoints.hub_stand_in import TOKEN, Hub, commit_of, running
from tests.checkpoints.tiny import tiny_checkpoint
from tests.commands.in_process import run_command

MODEL, GATED = "some/model", "some/gated"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def hub(served: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub with two models, an empty cache, and a client that is online and not logged in."""
    served.repos.clear()
    served.asked.clear()
    served.down, served.drops, served.gated = None, 0, {GATED}
    served.add(MODEL, folder, **{"model.fp16.safetensors": b"", "pytorch_model.bin": b"", "onnx/x.json": b""})
    served.add(GATED, folder)
    go_online(monkeypatch, served.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return served


def go_online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # before 1.0
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    new_session()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    new_session()


def new_session() -> None:
    """Before 1.0 the client's sessions remember whether they are offline."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is a Hub id


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", HubId("Qwen/Qwen2.5-7B-Instruct", None)),
        ("Qwen/Qwen2-7B@v1", HubId("Qwen/Qwen2-7B", "v1")),
        ("Qwen/Qwen2-7B@refs/pr/1", HubId("Qwen/Qwen2-7B", "refs/pr/1")),
        *dict.fromkeys(
            [
                "./Qwen/Qwen2-7B",
                "/Qwen/Qwen2-7B",
                "~/Qwen2-7B",
                "../Qwen2-7B",
                "Qwen\\Qwen2-7B",
                "a/b/c",
                "Qwen/Qwen2-7B/",
                "Qwen/model.safetensors",
                "qwen2",
                "Qwen/Qwen2-7B@",
                "Qwen/a--b",
                "Qwen/Qwen2 7B",
                "Qwén/Qwen2",
                "here/Qwen2-7B",
                "https://huggingface.co/Qwen/Qwen2-7B",
                Path("Qwen/Qwen2-7B"),
            ]
        ).items(),
    ],
)
def test_a_name_that_looks_like_a_path_never_asks_the_hub(
    given: str | Path, found: HubId | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo in a path would be sent to the Hub, or give somebody else's model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse_id(given) == found
    if found is None:
        with pytest.raises(CheckpointError, match="there is no ") as caught:
            find_checkpoint(given)
        assert "\n" not in str(caught.value)
        assert not hub.asked


def test_the_sentence_about_a_path_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for given, said in (
        ("https://huggingface.co/Qwen/Qwen2-7B/tree/main", "give the name alone, Qwen/Qwen2-7B"),
        ("here/Qwen2-7B", "here is a folder.*`hf download here/Qwen2-7B` prints"),
        ("Qwen/Qwen2-7B@", "a commit after the @"),
        (Path("Qwen/Qwen2-7B"), "a Path is never looked up"),
        ("nowhere", "give a checkpoint folder, a .safetensors file, or OWNER/NAME"),
        (None, "this is a NoneType: give the path of a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(given)  # type: ignore[arg-type]


def test_a_folder_here_wins(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / MODEL)
    for given in (MODEL, f"~/{MODEL}", tmp_path / MODEL):
        assert find_checkpoint(given).samefile(tmp_path / MODEL)
    assert not hub.asked


# What is downloaded


def test_only_what_is_read_is_downloaded_and_only_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_checkpoint(MODEL)
    weights, tokenizer = {"model.safetensors"}, {"tokenizer.json", "tokenizer_config.json"}
    assert hub.downloaded == {"config.json", "generation_config.json"} | weights
    find_checkpoint(MODEL, Wanted(tokenizer=True))
    assert names(found) == hub.downloaded == {"config.json", "generation_config.json"} | weights | tokenizer
    capsys.readouterr()
    hub.asked.clear()
    assert find_checkpoint(MODEL, Wanted(tokenizer=True)) == found
    assert not hub.downloaded
    assert not capsys.readouterr().err  # a bar for nothing


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    files = hub.repos[MODEL]["main"]
    shard = files.pop("model.safetensors")
    files |= {"a.safetensors": shard, "b.safetensors": shard, "consolidated.safetensors": b""}
    index: dict[str, Any] = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "pytorch_model.bin"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert {"a.safetensors", "b.safetensors"} <= names(find_checkpoint(MODEL))
    assert not hub.downloaded & {"consolidated.safetensors", "pytorch_model.bin"}


def test_no_weights_of_another_model_are_downloaded(hub: Hub) -> None:
    """`certify meta-llama/…` would download 140 GB to say that it is not a Qwen2."""
    hub.repos[MODEL]["main"]["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error, match=r"^some/model holds a model of type 'llama'"):
        qwen2_fp16_fix.certify(MODEL)
    assert hub.downloaded == {"config.json", "generation_config.json"}


def test_a_revision_is_a_branch_a_tag_a_commit_or_a_pull_request(hub: Hub, folder: Path) -> None:
    for revision in ("v1", "refs/pr/1"):
        hub.add(MODEL, folder, revision)
        commit = commit_of(MODEL, revision)
        assert find_checkpoint(f"{MODEL}@{revision}").name == commit
        assert find_checkpoint(f"{MODEL}@{commit}").name == commit


def test_a_download_that_breaks_off_goes_on(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second before each of its five tries. Before 1.0 it leaves the next try to the user."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.drops = 1
    with suppress(HubError):
        find_checkpoint(MODEL)
    found = find_checkpoint(MODEL)
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# What fails


def missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    return "some/nothing"


def gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    return GATED


def no_revision(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    return f"{MODEL}@v9"


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    return MODEL


def down(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    hub.down = 503
    return MODEL


def dropped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.drops = 99
    return MODEL


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    go_offline(monkeypatch)
    return MODEL


def offline_with_a_part(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    find_checkpoint(MODEL, Wanted(weights=False))
    go_offline(monkeypatch)
    return f"{MODEL}@main"


def no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    go_online(monkeypatch, "http://127.0.0.1:1")
    return MODEL


def full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/cache/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return MODEL


FAILURES: dict[Callable[[Hub, pytest.MonkeyPatch], str], str] = {
    missing: "the Hub has no some/nothing that you may see: check the name, or log in",
    gated: "some/gated is gated: ask for access at http.*/some/gated, then log in with `hf auth login`",
    no_revision: "some/model has no revision v9",
    wrong_token: "answered 401 for some/model: it refuses your token; log in again",
    down: "answered 503 for some/model: try again later",
    dropped: r"the download of some/model failed \(\w+\): start it again, or run `hf download some/model`",
    offline: "and HF_HUB_OFFLINE allows no download: run `hf download some/model` where there is a network",
    offline_with_a_part: "not all of it, and HF_HUB_OFFLINE .* run `hf download some/model --revision main`",
    no_network: "and the Hub cannot be reached: run `hf download some/model`",
    full_disk: r"the Hub's cache cannot be written \(/cache/blob: No space left on device\): set HF_HOME",
}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_every_failure_is_one_sentence(
    failure: Callable[[Hub, pytest.MonkeyPatch], str], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client says has several lines, with addresses, and a traceback would repeat them."""
    given = failure(hub, monkeypatch)
    with pytest.raises(HubError, match=FAILURES[failure]) as caught:
        find_checkpoint(given)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("command", ["certify", "scan", "verify", "doctor", "export"])
def test_no_network_is_no_wrong_usage(
    command: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_online(monkeypatch, "http://127.0.0.1:1")
    out = [str(tmp_path / "out")] if command == "export" else []
    code, printed, said = run_command(monkeypatch, capsys, command, MODEL, *out)
    assert (code, printed) == (4, "")
    assert said.startswith(f"qwen2-fp16-fix: {MODEL} is not in the Hub's cache")


def test_an_index_cannot_name_files_elsewhere(hub: Hub) -> None:
    files = hub.repos[MODEL]["main"]
    for name in ("../../config.json", "/etc/passwd", "a*.safetensors", "sub/a.safetensors"):
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": name}}).encode()
        hub.repos[f"some/of{len(name)}"] = hub.repos[MODEL]
        find_checkpoint(f"some/of{len(name)}")
    assert not any("passwd" in path or "sub/" in path or "*" in path for path in hub.asked)


def test_what_the_repository_lacks_is_the_checkpoints_fault(hub: Hub) -> None:
    for name, wanted in (
        ("tokenizer.json", Wanted(tokenizer=True)),
        ("model.safetensors", Wanted()),
        ("config.json", Wanted()),
    ):
        del hub.repos[MODEL]["main"][name]
        hub.repos[f"{MODEL}-{len(name)}"] = hub.repos[MODEL]
        with pytest.raises(CheckpointError, match=f"some/model-{len(name)} has no {name}"):
            find_checkpoint(f"{MODEL}-{len(name)}", wanted)


@pytest.mark.parametrize("state", ["offline", "no network", "wrong token", "gated"])
def test_what_is_in_the_cache_needs_nothing_else(state: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_checkpoint(MODEL)
    hub.asked.clear()
    if state == "offline":
        go_offline(monkeypatch)
    elif state == "no network":
        go_online(monkeypatch, "http://127.0.0.1:1")
    elif state == "wrong token":
        monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    else:
        hub.gated.add(MODEL)
    assert find_checkpoint(MODEL) == folder
    assert not hub.downloaded


def test_a_token_opens_a_gated_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "model.safetensors" in names(find_checkpoint(GATED))


# The commands


def test_every_command_takes_an_id(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """What is found is what the folder gives, and an error names the model as the caller does."""
    of_folder, of_id = qwen2_fp16_fix.certify(folder), qwen2_fp16_fix.certify(MODEL)
    assert replace(of_id, seconds=0) == replace(of_folder, seconds=0)
    of_folder, of_id = (qwen2_fp16_fix.scan(given, "In the beginning") for given in (folder, MODEL))
    assert replace(of_id, seconds=0, checkpoint=str(folder)) == replace(of_folder, seconds=0)
    exported = qwen2_fp16_fix.export(MODEL, tmp_path / "out")
    assert f"base_model: {MODEL}" in (exported / "README.md").read_text()
    hub.repos[MODEL]["main"]["model.safetensors"] = b"no weights"
    hub.repos["some/broken"] = hub.repos.pop(MODEL)
    for command in (qwen2_fp16_fix.certify, qwen2_fp16_fix.scan, qwen2_fp16_fix.verify):
        with pytest.raises(CheckpointError, match=r"^model\.safetensors cannot be read"):
            command("some/broken")


def test_bars_are_as_they_were(hub: Hub) -> None:
    """Those of small files are left out; the caller's choice is not."""
    for choose, disabled in (
        (huggingface_hub.utils.disable_progress_bars, True),
        (huggingface_hub.utils.enable_progress_bars, False),
    ):
        choose()
        hub_ids.find_checkpoint(MODEL)
        assert huggingface_hub.utils.are_progress_bars_disabled() is disabled
