"""The handbook and the READMEs: what they show runs, what it names is there, and every page can be reached."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from PIL import Image
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import benchmarks.__main__
import qwen2_fp16_fix
from benchmarks import report
from benchmarks.cells import full_grid
from benchmarks.device import tables
from qwen2_fp16_fix.cli import commands
from qwen2_fp16_fix.scanning import sentences
from qwen2_fp16_fix.verification import rows, verify

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DEMO = ROOT / "qwen2_fp16_fix" / "demo_checkpoint"
READMES = ("README.md", "README.zh-CN.md")
ON_THE_HUB = "Qwen/Qwen2.5-7B-Instruct"
CHINESE = sorted((DOCS / "zh").glob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$", re.M | re.S
)
TYPED = {
    "qwen2-fp16-fix": typer.main.get_command(commands.app),
    ".venv/bin/python -m benchmarks": typer.main.get_command(benchmarks.__main__.app),
}
UNCHECKED = {"pip", "pip-compile"}  # programs of others, in blocks that are not run
# What a command is given besides, so that it asks no Hub and takes seconds.
BESIDES = {"push": ["--dry-run"], "verify": ["--tokens", "64", "--window", "48"]}
ONLY_LOOK = {"certify", "demo", "doctor", "verify"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    code: str
    reason: str | None  # why it is not run


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    for found in FENCE.finditer(read(page)):
        yield Block(page.relative_to(ROOT).as_posix(), found["language"], found["code"], found["reason"])


def code_only(code: str) -> str:
    return re.sub(r"\s*#.*", "", code)


PAGES = [*sorted(DOCS.glob("*.md")), *CHINESE]
SHOWN = [*(ROOT / name for name in READMES), *PAGES]
BLOCKS = [block for page in SHOWN for block in blocks_of(page)]
RUN = {block.language + code_only(block.code): block for block in reversed(BLOCKS) if block.reason is None}  # once each
SHELL = [block for block in RUN.values() if block.language == "sh"]
PYTHON = [block for block in RUN.values() if block.language == "python"]


def commands_of(code: str) -> list[list[str]]:
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def fill(text: str, **values: object) -> str:
    """Puts paths where a page says PATH, OUT and the like, or names a model on the Hub."""
    text = text.replace(ON_THE_HUB, str(values.get("PATH", ON_THE_HUB)))
    for name, value in values.items():
        text = re.sub(rf"(?<![\w/]){name.replace('__', '/')}(?!\w)", str(value), text)
    return text


def name_of(block: Block) -> str:
    return f"{block.page}: {block.code.strip().splitlines()[0][:40]}"


def test_no_block_escapes() -> None:
    """A fence in a language no test knows would rot unseen, and so would one that the pattern does not match."""
    assert {block.language for block in BLOCKS} <= {"sh", "python", "dockerfile", "{eval-rst}", ""}
    assert 2 * len(BLOCKS) == sum(len(re.findall(r"^ *```", read(page), re.M)) for page in SHOWN)
    assert not re.search(r"<!-- not run: .*-->\n(?!```)", "".join(map(read, SHOWN)))


def test_the_readmes_code_needs_what_pip_brings() -> None:
    """A newcomer has no accelerate: `device_map="auto"` ended in a ValueError there, and not in these tests."""
    blocks = [block for block in BLOCKS if block.page.startswith("README") and block.language == "python"]
    assert len(blocks) == 2
    assert not [block.page for block in blocks if "device_map" in block.code]


@pytest.fixture(scope="module")
def looked_at() -> list[list[str]]:
    """Commands that have passed and, because they only look, need not pass twice. tests/test_demo.py runs the first."""
    return [["qwen2-fp16-fix", "demo"]]


@pytest.mark.xdist_group("commands")  # one worker runs them, so that none runs twice
@pytest.mark.parametrize("block", SHELL, ids=name_of)
def test_commands_do_what_the_page_says(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python: Callable[..., Any],
    looked_at: list[list[str]],
) -> None:
    """Every command of this project ends as it should on the demo checkpoint, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "NEW_TOKENS", 4)  # of each text that `verify` generates
    few = [rows.ORACLE, *(rows.Row("float16", attention, fixed=True) for attention in ("eager", "sdpa"))]
    monkeypatch.setattr(verify, "planned_rows", lambda device: few)  # tests/verification runs the others
    for words in commands_of(fill(block.code, PATH=DEMO, OUT=tmp_path / "out")):
        assert words[0] == "qwen2-fp16-fix", f"mark the block or teach this test to run {words[0]}"
        if words[1] == "run":  # it takes the place of its process
            done = python("-m", "qwen2_fp16_fix", *words[1:])
            assert done.returncode == 0, done.stderr
            assert done.stdout == "True\n"
        elif words not in looked_at:
            result = CliRunner().invoke(commands.app, words[1:] + BESIDES.get(words[1], []))
            expected = 1 if words[1] == "scan" and "--fixed" not in words else 0  # the demo's stock float16 breaks
            assert result.exit_code == expected, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
            if words[1] in ONLY_LOOK:
                looked_at.append(words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for a repository on the Hub."""
    return Path(qwen2_fp16_fix.export(DEMO, tmp_path_factory.mktemp("hub") / "exported"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with tokens for padding and the end, which every real tokenizer has. Neither is `!`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads(read(DEMO / "tokenizer_config.json"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": '"', "eos_token": '"'}))
    return folder


# Of other libraries: each has some, and no device here has memory to pin.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory")
@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_runs_as_it_stands(
    block: Block,
    exported: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Complete with its imports, on the demo checkpoint; what it asserts holds, and it prints no exclamation marks."""
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(fill(block.code, PATH=checkpoint, OWNER__NAME=exported), block.page, "exec"), variables)
    assert "!!!!" not in capsys.readouterr().out
    if "model" in variables:
        found = qwen2_fp16_fix.status(variables["model"]).model
        assert found.fixed, found


def test_what_troubleshooting_warns_of_happens() -> None:
    """Each of these entries is found by its message, which therefore is what a user gets."""
    headings = re.findall(r"^## (.+)$", read(DOCS / "troubleshooting.md"), re.M)
    with qwen2_fp16_fix.registered():
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float16)
    ids, layers = torch.arange(1, 33)[None], model.model.layers
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        assert not states[-2].half().isfinite().all()  # of a layer in the middle, and in a buffer of the model's dtype
        with pytest.raises(RuntimeError) as caught:
            torch.nn.Linear(model.config.hidden_size, 2).half()(states[-2])
        assert any(heading in str(caught.value) for heading in headings)
        hook = layers[-1].register_forward_hook(lambda layer, inputs, output: output.half())
        model(ids)
        with pytest.warns(qwen2_fp16_fix.StalePlanWarning) as warned:
            model(ids)
        hook.remove()
    assert any(heading.lower() in str(warned[0].message).lower() for heading in headings)
    with pytest.raises(qwen2_fp16_fix.NotQwen2Error) as refused:
        qwen2_fp16_fix.fix(torch.nn.Linear(2, 2))
    assert any(heading in str(refused.value) for heading in headings)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason], ids=name_of)
def test_blocks_that_are_not_run_parse(block: Block) -> None:
    """A renamed option, command or target must turn red here too, where running would take a network or minutes."""
    if block.language == "python":
        ast.parse(block.code)
        return
    for words in commands_of(block.code):
        program = " ".join(words[:3]) if words[0].endswith("python") else words[0]
        if program == "make":
            phony = re.search(r"^\.PHONY: (.*)$", read(ROOT / "Makefile"), re.M)
            assert phony is not None
            assert words[1] in phony[1].split()
        elif program in TYPED:
            assert_parses(TYPED[program], words[len(program.split()) :])
        else:
            assert program in UNCHECKED


def assert_parses(command: Any, arguments: list[str]) -> None:
    """Raises UsageError for an option that is not there, KeyError for a command."""
    context = command.make_context("", list(arguments))
    if rest := [*context._protected_args, *context.args]:
        command.commands[rest[0]].make_context(rest[0], rest[1:], parent=context)


TRANSLATIONS = [(DOCS / page.name, page) for page in CHINESE] + [(ROOT / READMES[0], ROOT / READMES[1])]


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS, ids=lambda page: page.name)
def test_a_chinese_page_has_what_the_english_one_has(english: Path, chinese: Path) -> None:
    """The same code and sections, errors and sources: a symptom that one language lacks its readers do not find."""

    def things(page: Path) -> tuple[list[str], int, list[str], list[str]]:
        text = read(page)
        sources = sorted(re.findall(r"https?://[^)]+", text))
        errors = sorted(set(re.findall(r"`(\w+(?:Error|Warning))`", text)))
        headings = len(re.findall(r"^##+ ", text, re.M))
        code = [code_only(block.code).replace(" --lang zh", "") for block in blocks_of(page) if block.language]
        return code, headings, sources, errors

    assert things(english) == things(chinese)


def test_errors_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`(\w+(?:Error|Warning))`", read(page)):
            assert name in qwen2_fp16_fix.__all__, (page.name, name)


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^\.\. auto\w+:: qwen2_fp16_fix\.(\w+)$", read(DOCS / "api.md"), re.M)
    assert sorted(listed) == sorted(set(qwen2_fp16_fix.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation() -> None:
    """Read without Sphinx, which only `make docs` needs."""
    settings = {
        line.targets[0].id: line.value
        for line in ast.parse(read(DOCS / "conf.py")).body
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
    }
    for order, folder in (("ENGLISH", DOCS), ("CHINESE_ORDER", DOCS / "zh")):
        pages = ast.literal_eval(settings[order]).values()
        named = [name.replace("self", "index") for names in pages for name in names]
        assert sorted(named) == sorted(page.stem for page in folder.glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and myst both make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    """In a checkout as on the site, which has docs/ alone."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(FENCE, "", read(page))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert target.is_relative_to(DOCS) or page.name in READMES, link
        assert not anchor or anchor in anchors(target), link


def test_the_page_shows_the_figures_that_are_kept() -> None:
    """Nobody types a measurement: `python -m benchmarks document FILE.json` puts them there."""
    page = read(DOCS / "performance.md")
    kept = [json.loads(read(path)) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    proofs = [found for found in kept if "proof" in found]
    assert any(report.markdown(found) in page for found in kept if found not in proofs)
    assert not proofs or any(tables.markdown(found) in page for found in proofs)


KEPT = json.loads(read(ROOT / "benchmarks" / "results" / "x86_64-cpu-2-threads.json"))


def fixed_ratios(phase: str, tokens: Iterable[int], batches: Iterable[int] = (1,)) -> list[float]:
    """Of fixed float16 against stock, not compiled, by width, attention and batch in the order of the grid."""
    wanted = set(product((phase,), tokens, batches, ("fixed fp16",), (False,)))
    fields = ("phase", "tokens", "batch", "variant", "compiled")
    return [cell["median"] for cell in KEPT["cells"] if tuple(cell[field] for field in fields) in wanted]


def span(ratios: list[float], to: str = "to") -> str:
    return f"{min(ratios):.2f} {to} {max(ratios):.2f}"


def test_the_page_sums_up_the_figures_that_are_kept() -> None:
    """It said "the longer the context, the less", which a row denies, and nothing of the cells that were left out."""
    page = " ".join(read(DOCS / "performance.md").split())
    assert f"{len(KEPT['cells'])} cells of the {len(list(full_grid()))} that" in page
    shorter, longer = (fixed_ratios("decode", (context,), (1, 8)) for context in (1024, 4096))
    assert span(shorter) in page
    assert span(longer) in page
    assert sum(after >= before for before, after in zip(shorter, longer, strict=True)) == 1
    assert "less again in every row but one" in page


def test_the_page_says_in_short_what_the_figures_say() -> None:
    page = read(DOCS / "performance.md")
    assert span(fixed_ratios("prefill", (128, 512, 2048))) in page
    for context in (64, 1024):
        assert span(fixed_ratios("decode", (context,))) in page


def test_the_picture_shows_the_demo_as_it_is_now() -> None:
    """Its description is the verdicts it was drawn with. To draw it anew, run the commands of the page."""
    verdicts = [sentences.verdict(qwen2_fp16_fix.scan(DEMO, fixed=fixed), "en") for fixed in (False, True)]
    with Image.open(DOCS / "demo-scan.png") as picture:
        assert picture.info["Description"].splitlines() == [f"✗ {verdicts[0]}", f"✓ {verdicts[1]}"]
