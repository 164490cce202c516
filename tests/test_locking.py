"""A lock names whatever has drifted from it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2 import modeling_qwen2 as stock
from typer.testing import CliRunner

import qwen2_fp16_fix as q
from qwen2_fp16_fix import locking
from qwen2_fp16_fix.cli import commands, main
from qwen2_fp16_fix.patches import lock, upstream_code, version_map
from qwen2_fp16_fix.patches.lock_file import FORMAT
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from tests.stress import TINY, build, config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lock of what runs here."""
    return q.lock(tmp_path_factory.mktemp("lock") / "lock.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder, as far as a lock is concerned: the patch files and a configuration that names one."""
    exported = tmp_path / "exported"
    shutil.copytree(lock.HERE, exported, ignore=shutil.ignore_patterns("__pycache__"))
    reference = {"AutoModelForCausalLM": "modeling_qwen2_fp16.Qwen2ForCausalLM"}
    (exported / "config.json").write_text(json.dumps({"model_type": "qwen2", "auto_map": reference}))
    return exported


def changed(locked: Path, tmp_path: Path, **fields: Any) -> Path:
    """The lock with other contents."""
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**json.loads(locked.read_text()), **fields}))
    return path


def test_what_is_locked_here_checks_clean(locked: Path, folder: Path) -> None:
    assert q.check(locked).passed
    assert q.check(locked, folder).passed


def test_a_lock_holds_what_decides_the_numbers(locked: Path) -> None:
    found = json.loads(locked.read_text())
    assert {name: found[name] for name in ("format", "package", "numerics", "transformers", "torch")} == {
        "format": FORMAT,
        "package": q.__version__,
        "numerics": version_map.NUMERICS,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in lock.HERE.glob("*.py")}
    assert found["patches"] == files
    relied_on = {"apply_rotary_pos_emb", "eager_attention_forward", "create_causal_mask", "DynamicCache"}
    relied_on |= {"ALL_ATTENTION_FUNCTIONS[sdpa]", "ROPE_INIT_FUNCTIONS[yarn]", "ACT2FN[silu]"}
    own = {name for name, thing in vars(stock).items() if getattr(thing, "__module__", "") == stock.__name__}
    assert {name for name in own if name.startswith("Qwen2")} | relied_on <= set(found["upstream"])
    assert q.status().numerics == version_map.NUMERICS


def test_an_edited_an_added_and_a_missing_file_are_named(locked: Path, folder: Path) -> None:
    with (folder / "numerics.py").open("a") as file:
        file.write("\n")
    (folder / "v4_37.py").unlink()
    (folder / "key_centring.so").touch()  # would be imported in place of key_centring.py
    (folder / "blocks").mkdir()
    (folder / "blocks" / "__init__.py").touch()  # likewise
    assert q.check(locked, folder).differences == [
        "key_centring.so is not in the lock.",
        "numerics.py is not the file that was locked.",
        "v4_37.py is locked but missing.",
        "blocks/__init__.py is not in the lock.",
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "reference", ["other.Qwen2ForCausalLM", "someone/else--modeling_qwen2_fp16.Qwen2ForCausalLM", ["other.Slow", None]]
)
def test_a_configuration_that_runs_other_code_is_named(locked: Path, folder: Path, name: str, reference: Any) -> None:
    """Whole patch files are no use where the configuration has transformers import something else."""
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": reference}}))
    text = reference.rpartition("--")[2] if isinstance(reference, str) else "other.Slow"  # not whose: doctor prints it
    assert q.check(locked, folder).differences == [f"{name} names {text}, which is not in the lock."]


def test_a_class_that_another_tool_has_replaced_is_named(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not what stands there now derives from what was there."""

    class LigerRMSNorm(nn.Module):
        pass

    class FasterMLP(stock.Qwen2MLP):  # type: ignore[misc]
        pass

    monkeypatch.setattr(stock, "Qwen2RMSNorm", LigerRMSNorm)
    monkeypatch.setattr(stock, "Qwen2MLP", FasterMLP)
    monkeypatch.setattr(stock, "apply_rotary_pos_emb", lambda *args: args)
    found = q.check(locked).differences
    names = ("Qwen2MLP", "Qwen2RMSNorm", "apply_rotary_pos_emb")
    assert found[:3] == [f"{name} of transformers is not there." for name in names]
    assert len(found) == 6
    where = f"test_a_class_that_another_tool_has_replaced_is_named.<locals>.LigerRMSNorm of {__name__}"
    assert f"{stock.__name__}.Qwen2RMSNorm does not run the code in its source file, but {where}." in found


def test_our_own_classes_under_stock_names_are_no_drift(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qwen2-fp16-fix run` puts them there; what they stand in for is still what was locked."""
    monkeypatch.setattr(stock, "Qwen2ForCausalLM", q.Qwen2ForCausalLM)
    assert q.check(locked).passed


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("torch", "2.4.0+cu121", f"torch {torch.__version__} is installed, 2.4.0+cu121 is locked."),
        ("package", "9.9.9", f"qwen2-fp16-fix {q.__version__} is installed, 9.9.9 is locked."),
        ("numerics", 99, f"The numerics are version {version_map.NUMERICS}, 99 is locked."),
    ],
)
def test_another_version_is_named(locked: Path, tmp_path: Path, field: str, value: Any, sentence: str) -> None:
    assert q.check(changed(locked, tmp_path, **{field: value})).differences == [sentence]


def test_another_torch_is_named(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked_torch = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert q.check(locked).differences == [f"torch 2.99.0+cu999 is installed, {locked_torch} is locked."]


def test_an_error_after_many_changes_is_short(locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It printed 32 sentences on one line."""
    monkeypatch.setattr(lock.transformers, "__version__", "4.37.1")
    content = json.loads(locked.read_text())
    path = changed(locked, tmp_path, torch="1.0", upstream=dict.fromkeys(content["upstream"], "0" * 64), numerics=99)
    with pytest.raises(q.LockError) as caught:
        q.register(lock=path)
    said = str(caught.value)
    assert len(said) < 900
    assert f"And 1 more: `qwen2-fp16-fix check {path}` lists all." in said
    assert len(q.check(path).differences) == 4
    assert "these differ: ACT2CLS" in q.check(path).differences[3]
    monkeypatch.setattr(lock, "SHOWN", 4)
    with pytest.raises(q.LockError, match=r"these differ: [\w\[\], ]+… Install"):
        q.register(lock=path)


def test_another_release_without_changes_says_so(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.transformers, "__version__", "4.37.1")
    assert q.check(locked).differences[1].endswith("that matter here, none differs.")


def test_fingerprints_do_without_sources() -> None:
    """Some installations have bytecode alone; a digest there must still tell two codes apart."""

    def compiled(source: str) -> str:
        names: dict[str, Any] = {}
        exec(compile(source, "<no file>", "exec"), names)
        return upstream_code.source_digest(names["f"])

    first = "def f(x):\n    def g(): return x in {'a', 'b', 'c'}\n    return g"
    assert compiled(first).startswith("code ")
    assert compiled(first) == compiled("\n\n" + first)
    assert len({compiled(first), compiled(first.replace("'c'", "'d'")), compiled("class f: pass")}) == 3
    methods = "class f:\n    def forward(self, x): return x + 1"
    assert compiled(methods) != compiled(methods.replace("+", "-"))


def test_register_takes_a_lock(locked: Path, tmp_path: Path) -> None:
    with pytest.raises(q.LockError, match=r"numerics are version \d+, 99 is locked\..* make a new lock"):
        q.register(lock=changed(locked, tmp_path, numerics=99))
    assert not any(q.status().registered.values())
    q.register(lock=locked)
    assert all(q.status().registered.values())
    q.unregister()
    with q.registered(lock=locked):
        assert all(q.status().registered.values())


def test_a_lock_that_the_environment_names_is_checked(
    locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this was imported before the variable was set: a check that is asked for and left out is worst."""
    monkeypatch.setenv(lock.VARIABLE, str(changed(locked, tmp_path, torch="2.4.0")))
    stock_model = build(TINY, ())
    before = [type(module) for module in stock_model.modules()]
    for build_fixed in (lambda: q.Qwen2ForCausalLM(config(TINY)), lambda: q.fix(stock_model)):
        with pytest.raises(q.LockError, match=r"2\.4\.0 is locked"):
            build_fixed()
    assert [type(module) for module in stock_model.modules()] == before
    monkeypatch.setenv(lock.VARIABLE, str(locked))
    assert q.status(q.fix(stock_model)).model.fixed
    monkeypatch.setenv(lock.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(q.LockFileError, match=r"absent\.json cannot be read as a lock"):
        q.Qwen2ForCausalLM(config(TINY))


REMOTE = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, pipeline
whole, edited = sys.argv[1:]
options = dict(trust_remote_code=True, dtype=torch.float16, attn_implementation="eager")
model = AutoModelForCausalLM.from_pretrained(whole, **options)
with torch.no_grad():
    finite = bool(torch.isfinite(model(input_ids=torch.arange(24)[None]).logits).all())
def error(load):
    try:
        load()
    except Exception as caught:
        return [type(caught).__name__, str(caught)]
found = {
    "module": type(model).__module__,
    "finite": finite,
    "edited": error(lambda: AutoModelForCausalLM.from_pretrained(edited, **options)),
    "pipeline": error(lambda: pipeline("text-generation", edited, trust_remote_code=True)),
    "package": "qwen2_fp16_fix" in sys.modules,
}
del os.environ["QWEN2_FP16_FIX_LOCK"]
found["unasked"] = error(lambda: AutoModelForCausalLM.from_pretrained(edited, **options))
print(json.dumps(found))
"""


@pytest.mark.process
def test_remote_code_verifies_its_own_files(
    locked: Path, folder: Path, python: Callable[..., Any], tmp_path: Path
) -> None:
    """From transformers' cache of remote code, where an `__init__.py` is empty and nothing of the package is near."""
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    model = build(TINY, ("scores", "residual")).half()
    model.save_pretrained(folder)
    contents = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**contents, "auto_map": named}))
    edited = tmp_path / "edited"
    shutil.copytree(folder, edited)
    with (edited / "key_centring.py").open("a") as file:
        file.write("WINDOW = 512\n")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), lock.VARIABLE: str(locked), "PYTHONPATH": ""}
    done = python("-c", REMOTE, str(folder), str(edited), **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["module"].startswith("transformers_modules.")
    assert (found["finite"], found["package"], found["unasked"]) == (True, False, None)
    for way in ("edited", "pipeline"):
        name, sentence = found[way]
        assert name == "LockError"
        assert "locks: key_centring.py is not the file that was locked. Of the fix, only the files that" in sentence


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments))


def test_the_commands_print_a_lock_and_its_differences(locked: Path, tmp_path: Path) -> None:
    printed = run("lock")
    assert (printed.exit_code, printed.stdout) == (0, locked.read_text())
    assert run("lock", "-o", str(tmp_path / "here.json")).exit_code == 0
    assert (tmp_path / "here.json").read_text() == locked.read_text()
    clean = run("check", str(locked))
    assert (clean.exit_code, clean.stdout) == (0, f"Nothing differs from {locked}.\n")
    drifted = changed(locked, tmp_path, torch="2.4.0", numerics=99)
    found = run("check", str(drifted))
    assert (found.exit_code, len(found.stdout.splitlines())) == (1, 2)
    as_json = run("check", str(drifted), "--json")
    assert as_json.exit_code == 1
    data = json.loads(as_json.stdout)
    assert (data["differences"], data["passed"]) == (found.stdout.splitlines(), False)


def test_a_folder_is_checked_by_the_command(locked: Path, folder: Path) -> None:
    whole = run("check", str(locked), "--folder", str(folder))
    said = f"Nothing differs from {locked}; of the fix, only the files in {folder} were compared."
    assert (whole.exit_code, whole.stdout.replace("\n", "")) == (0, said)
    (folder / "swap.py").write_text("")
    found = run("check", str(locked), "--folder", str(folder))
    assert (found.exit_code, found.stdout) == (1, "swap.py is not the file that was locked.\n")
    with pytest.raises(q.LockFileError, match="is not a folder"):
        q.check(locked, folder / "absent")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', "\x00\xff", None], ids=lambda text: repr(text)
)
def test_a_file_that_is_no_lock_is_wrong_usage(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence and exit code 2, as for any wrong usage; None is a file that is not there."""
    path = tmp_path / "lock.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(q.LockFileError) as caught:
        q.check(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("sys.argv", ["qwen2-fp16-fix", "check", str(path)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2


def test_a_lock_without_upstream_is_no_lock(locked: Path, tmp_path: Path) -> None:
    """It would check clean against any transformers source."""
    with pytest.raises(q.LockFileError, match="whose upstream is not a digest for each name"):
        q.check(changed(locked, tmp_path, upstream={}))


def test_drift_ends_a_command_with_a_finding(
    locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(lock.VARIABLE, str(changed(locked, tmp_path, torch="2.4.0")))
    monkeypatch.setattr("sys.argv", ["qwen2-fp16-fix", "demo"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    assert "2.4.0 is locked." in capsys.readouterr().err


def test_a_file_that_is_there_is_not_lost(locked: Path, tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text("precious")
    with pytest.raises(q.LockFileError, match="already exists"):
        q.lock(path)
    assert path.read_text() == "precious"
    q.lock(path, force=True)
    assert path.read_text() == locked.read_text()
    before = path.stat()
    q.lock(path)  # says the same: nothing to do
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with pytest.raises(q.LockFileError, match="cannot be written"):
        q.lock(tmp_path / "absent" / "lock.json")


def test_a_full_disk_leaves_the_old_lock(locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock.json"
    path.write_text("old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(q.LockFileError, match="No space left"):
        q.lock(path, force=True)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("lock.json", "old")]


def test_a_lock_in_an_impossible_place_is_one_sentence(tmp_path: Path) -> None:
    """What was begun could not be removed either, and that was the traceback shown."""
    (tmp_path / "file").touch()
    with pytest.raises(q.LockFileError, match="cannot be written"):
        q.lock(tmp_path / "file" / "lock.json")
    assert q.lock(tmp_path / ("锁" * 84)).is_file()  # 252 bytes of the 255 that a name may have


def test_an_unsupported_release_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking.transformers, "__version__", "4.36.0")
    with pytest.raises(q.UnsupportedTransformersError):
        locking.make_lock()


def test_the_stock_classes_are_those_that_are_locked(locked: Path) -> None:
    """What the fix lays its parts over is what it looked at when it was imported."""
    upstream = json.loads(locked.read_text())["upstream"]
    assert upstream_code.source_digest(STOCK.Qwen2Attention) == upstream["Qwen2Attention"]
