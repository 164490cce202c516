"""The package as a package: its public names and its documents."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import qwen2_fp16_fix
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.patches import version_map
from tools import package_page

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROMISED = {
    "register", "unregister", "registered", "stock_models", "fix", "unfix", "adopt_cache", "status", "is_fixed",
    "certify", "verify", "scan", "doctor", "export", "push", "lock", "check",
    "Qwen2Model", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification", "Qwen2ForQuestionAnswering",
    "Qwen2FP16FixError", "UnsupportedTransformersError", "NotQwen2Error", "PatchConflictError", "MetaTensorError",
    "ForeignCacheError", "HalfPrecisionScoresError", "RegistrationError", "ShardedRangeError", "SymbolicTraceError",
    "BrokenInstallationError",
    "CheckpointError", "VerificationError", "ExportError", "PublishError", "HubError", "LockError", "LockFileError",
    "ScanError",
    "UntestedTransformersWarning", "StalePlanWarning", "PatchConflictWarning", "NotFixedWarning",
    "__version__",
}  # fmt: skip


def test_public_names_are_there_and_documented() -> None:
    """`__all__` is the interface: each name resolves, says what it does, and no other public name slips in."""
    assert sorted(qwen2_fp16_fix.__all__) == sorted(PROMISED)
    for name in qwen2_fp16_fix.__all__:
        thing = getattr(qwen2_fp16_fix, name)
        assert name == "__version__" or thing.__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        qwen2_fp16_fix.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", sorted(name for name in PROMISED if name.islower() and name != "__version__"))
def test_docstrings_say_what_each_parameter_is(name: str) -> None:
    """In Google style, from which editors and the API page make a table. Some stood in no docstring once."""
    function = getattr(qwen2_fp16_fix, name)
    entries = (inspect.getdoc(function) or "").partition("Args:")[2].partition("Returns:")[0]
    documented = re.findall(r"^    (\w+): ", entries, re.M)
    assert set(documented) >= set(inspect.signature(function).parameters)


def test_public_names_are_the_types_a_checker_sees() -> None:
    """The names are found lazily at run time and by import statements under TYPE_CHECKING: the two must agree."""
    source = read("qwen2_fp16_fix/__init__.py")
    block = source[source.index("if TYPE_CHECKING:") : source.index("__all__")]
    imported = set(re.findall(r"^ {8}(\w+),$", block, re.M))
    imported |= {name for line in re.findall(r"import ([\w, ]+)$", block, re.M) for name in line.split(", ")}
    assert imported == set(qwen2_fp16_fix.__all__) - {"__version__"}
    assert (ROOT / "qwen2_fp16_fix" / "py.typed").is_file()


@pytest.mark.process
def test_importing_the_package_imports_neither_torch_nor_transformers(python: Callable[..., Any]) -> None:
    done = python("-c", "import qwen2_fp16_fix, sys; print({'torch', 'transformers'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_versions_agree() -> None:
    version = qwen2_fp16_fix.__version__
    newest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    assert newest is not None
    assert version == newest[1]
    assert f"qwen2-fp16-fix=={version}" in read("docs/pinning.md")


@pytest.mark.parametrize("readme", READMES)
def test_readmes_fit_a_screen_and_name_every_way_and_every_command(readme: str) -> None:
    text = read(readme)
    assert len(text.splitlines()) <= 120
    offered = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
    for command, implementation in offered.items():
        assert f"qwen2-fp16-fix {command}" in text
        assert implementation.help
    for name in ("register()", "unregister()", "registered()", "fix(model)", "unfix(model)", "status(model)"):
        assert name in text
    for other in ("make demo", "make test", "make docs", "qwen2_fp16_fix.auto", "QWEN2_FP16_FIX=0"):
        assert other in text
    assert version_map.NEWEST_TESTED in text


def test_the_pages_figures_are_the_demos() -> None:
    """The table is measured, not remembered: the checkpoint's own record has the stock rows."""
    import json

    record = json.loads(read("qwen2_fp16_fix/demo_checkpoint/TRAINING.json"))
    stock = record["stock_perplexity"]["demo"]
    for page in ("docs/fixed.md", "docs/zh/fixed.md"):
        text = read(page)
        for row in ("float32 eager", "bfloat16 eager", "bfloat16 sdpa"):
            assert f"{stock[row]:.3f}" in text
        assert f"{record['peaks']['scores']:,.0f}" in text
        assert f"{record['peaks']['residual']:,.0f}" in text


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_no_link_of_the_package_page_is_dead() -> None:
    """On an index nothing lies beside the README. Without an address of ours a link there is plain text."""
    readme = read("README.md")
    unset, whole = (package_page.page(readme, address, "1.2.3") for address in ("", "https://host/owner/name"))
    assert [link for link in links(unset) if not link.startswith("https://")] == []
    assert all(link.startswith("https://") for link in links(whole))
    assert len(links(whole)) == len(links(readme))
    assert "(https://host/owner/name/raw/v1.2.3/docs/demo-scan.png)" in whole
    assert re.search(r"\[docs?/|\]\(|!\[", unset) is None
    (address,) = re.findall(r'^repository = "(.*?)"', read("pyproject.toml"), re.M)
    assert (f'repository-code: "{address}"' in read("CITATION.cff")) is bool(address)
    assert {"Homepage", "Documentation", "Issues", "Changelog"} == set(
        package_page.addresses("https://host/owner/name")
    )


def test_the_tests_run_on_the_newest_tested_release() -> None:
    assert f'"transformers=={version_map.NEWEST_TESTED}"' in (ROOT / "pyproject.toml").read_text()


def test_make_test_asks_for_a_browser_first_and_installs_nothing() -> None:
    """It waited for apt's lock as root, after minutes of lint; what installs something unasked is CI's own script."""
    makefile = read("Makefile")
    assert re.search(r"^test: chromium lint$", makefile, re.M)
    looked_for = re.search(r"^BROWSERS := (.*)$", makefile, re.M)
    assert looked_for is not None
    asked = ", ".join(f'"{name}"' for name in looked_for[1].split())
    assert f"BROWSERS = ({asked})" in read("tests/report/test_page_in_a_browser.py")
    assert not re.search(r"^\s*@?(sudo )?apt-get|&& apt-get", makefile, re.M)
