"""Pushing an export, against a Hub in memory; each of its methods takes what the real client's does."""

import inspect
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from typer.testing import CliRunner

import qwen2_fp16_fix
from qwen2_fp16_fix.cli import commands, main
from qwen2_fp16_fix.demo import CHECKPOINT
from qwen2_fp16_fix.errors import CheckpointError, HubError, PublishError
from qwen2_fp16_fix.hub.push import LOCK, push
from qwen2_fp16_fix.patches.errors import NotQwen2Error

Files = dict[str, bytes]


class Hub:
    """Repositories as branches of files. `fails` maps a method to what it raises instead, once."""

    def __init__(self, **repos: Files) -> None:
        self.repos: dict[str, dict[str, Files]] = {f"me/{name}": {"main": dict(files)} for name, files in repos.items()}
        self.private: dict[str, bool] = {}
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, BaseException] = {}
        self.commits: dict[str, list[tuple[str, str]]] = {}
        self.folder = Path()

    def note(self, method: str, **arguments: Any) -> None:
        self.log.append((method, arguments))
        if method in self.fails:
            raise self.fails.pop(method)

    def repo_exists(self, repo_id: str) -> bool:
        self.note("repo_exists")
        return repo_id in self.repos

    def list_repo_refs(self, repo_id: str) -> Any:
        return SimpleNamespace(branches=[SimpleNamespace(name=name) for name in self.repos[repo_id]])

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        return list(self.repos[repo_id][revision or "main"])

    def list_repo_commits(self, repo_id: str, *, revision: str | None = None) -> list[Any]:
        newest_first = reversed(self.commits.get(repo_id, []))
        return [SimpleNamespace(title=title, message=message) for title, message in newest_first]

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        file = self.folder / "downloaded"
        file.write_bytes(self.repos[repo_id][revision or "main"][filename])
        return str(file)

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self.note("create_repo", private=private)
        assert exist_ok
        if repo_id not in self.repos:
            self.repos[repo_id] = {"main": {".gitattributes": b""}}
            self.private[repo_id] = bool(private)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        assert exist_ok
        self.repos[repo_id].setdefault(branch, dict(self.repos[repo_id]["main"]))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        revision: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        allow_patterns: list[str] | None = None,
        delete_patterns: list[str] | None = None,
    ) -> Any:
        self.note("upload_folder", message=commit_message, allow=allow_patterns)
        self.commits.setdefault(repo_id, []).append((commit_message or "", commit_description or ""))
        files = self.repos[repo_id][revision or "main"]
        for name in [n for n in files if any(fnmatch(n, pattern) for pattern in delete_patterns or ())]:
            del files[name]
        for path in Path(folder_path).rglob("*"):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns or ("*",)):
                files[name] = path.read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2_fp16_fix.export(CHECKPOINT, tmp_path_factory.mktemp("push") / "out")


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    found = Hub()
    found.folder = tmp_path
    return found


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [name for name in vars(Hub) if not name.startswith("_") and name != "note"])
def test_the_hub_in_memory_takes_what_the_real_client_does(name: str) -> None:
    """A fake that takes another argument would let a push pass that the real client refuses."""
    real = inspect.signature(getattr(HfApi, name)).parameters
    for parameter, own in inspect.signature(getattr(Hub, name)).parameters.items():
        assert parameter in real
        assert own.kind == real[parameter].kind or own.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_a_push_makes_a_private_repository(exported: Path, hub: Hub) -> None:
    found = push(exported, "me/new", api=hub)
    assert hub.repos["me/new"]["main"] == contents(exported) | {".gitattributes": b""}
    assert hub.private == {"me/new": True}
    assert found["commit"] == "https://hub/me/new/commit/1"
    assert {file["path"]: file["bytes"] for file in found["files"]} == {
        k: len(v) for k, v in contents(exported).items()
    }
    (message,) = [arguments["message"] for method, arguments in hub.log if method == "upload_folder"]
    assert message == found["message"]
    for version in (qwen2_fp16_fix.__version__, "4.37.0", qwen2_fp16_fix.status().supported):
        assert version in message
    push(exported, "me/open", private=False, api=hub)
    assert not hub.private["me/open"]


def test_the_message_names_the_numerics_of_the_lock(exported: Path, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "locked"))
    content = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(content | {"numerics": 7}))
    assert "numerics 7" in push(folder, "me/new", api=hub)["message"]
    assert push(folder, "me/new", api=hub, message="My own")["message"] == "My own"


def test_a_dry_run_lists_and_touches_nothing(exported: Path, hub: Hub) -> None:
    found = push(exported, "me/new", dry_run=True, api=hub)
    assert {file["path"] for file in found["files"]} == set(contents(exported))
    assert found["commit"] is None
    assert not hub.log
    assert not hub.repos


def test_what_tools_leave_in_the_folder_is_not_pushed(exported: Path, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "used"))
    for name in (".cache/huggingface/upload", ".DS_Store", "__pycache__/errors.cpython-312.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    push(folder, "me/new", api=hub)
    assert set(hub.repos["me/new"]["main"]) == {*contents(exported), ".gitattributes"}


def test_another_repository_is_refused_unless_told(exported: Path, hub: Hub) -> None:
    theirs = {"config.json": b'{"model_type": "qwen2"}', "model.safetensors": b"theirs", "pytorch_model.bin": b"theirs"}
    for name, files in {"model": theirs, "card": {"README.md": b"# mine"}, "broken": {"config.json": b"{"}}.items():
        hub.repos[f"me/{name}"] = {"main": dict(files)}
        with pytest.raises(PublishError, match="holds something else") as raised:
            push(exported, f"me/{name}", api=hub)
        assert "--overwrite" in str(raised.value)
        assert hub.repos[f"me/{name}"]["main"] == files
    assert not [method for method, _ in hub.log if method != "repo_exists"]
    found = push(exported, "me/model", overwrite=True, api=hub)
    assert hub.repos["me/model"]["main"] == contents(exported)
    assert found["deleted"] == ["pytorch_model.bin"]


@pytest.mark.parametrize("mark", ["nothing", "lock", "config"])
def test_an_empty_repository_or_an_older_export_is_taken(mark: str, exported: Path, hub: Hub) -> None:
    """Shards, code and a lock of the older one would go on being loaded beside what is new."""
    old = {"README.md": b"old", "model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old"}
    old |= {"v4_36.py": b"old", "notes/paper.pdf": b"kept"}
    before: dict[str, Files] = {
        "nothing": {".gitattributes": b""},
        "lock": {**old, LOCK: b"{}"},
        "config": {**old, "config.json": contents(exported)["config.json"]},
    }
    hub.repos["me/old"] = {"main": before[mark]}
    found = push(exported, "me/old", api=hub)
    kept = {} if mark == "nothing" else {"notes/paper.pdf": b"kept"}
    now = hub.repos["me/old"]["main"]
    assert {name: data for name, data in now.items() if name != ".gitattributes"} == contents(exported) | kept
    gone = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "v4_36.py"}
    assert set(found["deleted"]) == {"nothing": set(), "lock": gone, "config": gone}[mark]


def test_a_push_to_a_branch_makes_it(exported: Path, hub: Hub) -> None:
    push(exported, "me/new", api=hub)
    before = dict(hub.repos["me/new"]["main"])
    push(exported, "me/new", revision="v1", api=hub)
    assert hub.repos["me/new"]["v1"] == before
    hub.repos["me/foreign"] = {"main": {"theirs": b""}}
    with pytest.raises(PublishError, match="something else"):
        push(exported, "me/foreign", revision="v1", api=hub)


def test_large_weights_go_first_and_an_interrupted_push_goes_on(
    exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes weights loadable comes last: before that, the repository does not look whole."""
    monkeypatch.setattr("qwen2_fp16_fix.hub.push.LARGE", 1)
    uploads = 0

    def interrupt(method: str, **arguments: Any) -> None:
        nonlocal uploads
        hub.log.append((method, arguments))
        uploads += method == "upload_folder"
        if uploads == 2 and method == "upload_folder":
            raise ConnectionError("reset")

    monkeypatch.setattr(hub, "note", interrupt)
    with pytest.raises(HubError, match="push again to continue"):
        push(exported, "me/new", api=hub)
    assert set(hub.repos["me/new"]["main"]) == {".gitattributes", "model.safetensors"}
    hub.commits["me/new"].append(("Add weights", ""))  # for all a push knows, these are another's
    with pytest.raises(PublishError, match="something else"):
        push(exported, "me/new", api=hub)
    hub.commits["me/new"].pop()
    push(exported, "me/new", message="Mine", api=hub)
    assert hub.repos["me/new"]["main"] == contents(exported) | {".gitattributes": b""}


def no_export(folder: Path) -> None:
    shutil.copy(CHECKPOINT / "config.json", folder)


def no_code(folder: Path) -> None:
    (folder / "numerics.py").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")


def broken_lock(folder: Path) -> None:
    (folder / LOCK).write_text("{")


def other_lock(folder: Path) -> None:
    (folder / LOCK).write_text("[]")


def not_qwen2(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (no_export, PublishError, "is not an export"),
        (no_code, PublishError, r"lacks numerics\.py"),
        (no_weights, CheckpointError, "damaged or half written"),
        (broken_lock, PublishError, "this version cannot read: export the checkpoint again"),
        (other_lock, PublishError, "this version cannot read: export the checkpoint again"),
        (not_qwen2, NotQwen2Error, "llama"),
    ],
)
def test_a_folder_that_is_no_whole_export_is_refused(
    spoil: Any, error: type[Exception], says: str, exported: Path, hub: Hub, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    spoil(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=says):
            push(folder, "me/new", dry_run=dry_run, api=hub)
    with pytest.raises(CheckpointError, match="there is no folder"):
        push(tmp_path / "nothing", "me/new", api=hub)
    with pytest.raises(PublishError, match="not a repository"):
        push(exported, "new", api=hub)
    assert not hub.log


SECRET = "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"


def answered(status: int) -> HfHubHTTPError:
    """As the client raises it, with all that it may say."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error.\nBearer {SECRET}\n(Request ID: x)", response=response)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (answered(401), "log in with `hf auth login`, or set HF_TOKEN"),
        (LocalTokenNotFoundError(SECRET), "log in with `hf auth login`, or set HF_TOKEN"),
        (answered(403), "may not write to me/new"),
        (answered(404), "has no me/new"),
        (answered(409), "has changed meanwhile"),
        (answered(500), "answered 500"),
        (HfHubHTTPError.__bases__[0](SECRET), "could not be reached"),
        (ConnectionError(SECRET), "could not be reached"),
        (TimeoutError(SECRET), "could not be reached"),
    ],
)
@pytest.mark.parametrize("method", ["repo_exists", "create_repo", "upload_folder"])
def test_what_the_hub_answers_becomes_one_sentence_without_the_token(
    failure: Exception, says: str, method: str, exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fails[method] = failure
    with pytest.raises(HubError, match=says) as raised:
        push(exported, "me/new", api=hub)
    assert "\n" not in str(raised.value)
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__  # a traceback would print what the client said
    assert SECRET not in json.dumps(push(exported, "me/new", api=hub))


def test_the_real_client_offline_is_one_sentence(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset it to push"):
        push(exported, "me/new")


# The command


def test_the_command_lists_what_it_would_push(exported: Path) -> None:
    done = CliRunner().invoke(commands.app, ["push", str(exported), "me/new", "--dry-run"])
    assert done.exit_code == 0
    assert all(name in done.output for name in contents(exported))
    assert "private" in done.output
    done = CliRunner().invoke(commands.app, ["push", str(exported), "me/new", "--dry-run", "--public", "--json"])
    assert json.loads(done.output)["private"] is False


def test_the_command_pushes(exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_fp16_fix.hub.push.HfApi", lambda: hub)
    done = CliRunner().invoke(commands.app, ["push", str(exported), "me/new", "--revision", "v1"])
    assert done.exit_code == 0
    assert "https://hub/me/new/commit/1" in done.output.replace("\n", "")
    assert set(hub.repos["me/new"]["v1"]) == {*contents(exported), ".gitattributes"}


def test_errors_and_interruptions_are_one_sentence_with_an_exit_code(
    exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qwen2_fp16_fix.hub.push.HfApi", lambda: hub)
    for failure, code in ((answered(403), 4), (KeyboardInterrupt(), 2)):
        hub.fails["create_repo"] = failure
        monkeypatch.setattr(sys, "argv", ["qwen2-fp16-fix", "push", str(exported), "me/new"])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == code
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
