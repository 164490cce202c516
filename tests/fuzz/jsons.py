"""Every JSON file that the package reads, damaged or exchanged for another one, and the commands that read it."""

import json
import random
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import lock as patches_lock
from qwen2_fp16_fix.patches.errors import Qwen2FP16FixError
from tests.fuzz import bases, proofs
from tests.fuzz.damage import change_file, change_text, change_tree, dumps
from tests.fuzz.worker import SHARE, Trial, cause_of

COUNT = 6000
LOCK = "qwen2_fp16_fix.lock.json"


class Reader(NamedTuple):
    """A file, where it lies, and what reads it."""

    name: str
    weight: int  # how often, among all
    base: Callable[[], Path]  # the file, or the checkpoint that holds it
    inside: str | None  # the file's name in the checkpoint
    read: Callable[[Trial, Path], object]  # the file, or the checkpoint
    written: bool = False  # the command writes the file, too: no device may be in its place


def certify(trial: Trial, folder: Path) -> None:
    proofs.check(trial, folder)


def doctor(trial: Trial, folder: Path) -> None:
    trial.run("doctor", folder, *trial.random.choice(((), ("--json",), ("--lang", "zh"))))


def export(trial: Trial, folder: Path) -> None:
    trial.run("export", folder, trial.folder / "out", *trial.random.choice(((), ("--code-only",), ("--strict",))))


def scan(trial: Trial, folder: Path) -> None:
    trial.run("scan", folder, "--tokens", "4", trial.random.choice(("--fixed", "--stock")))


def verify(trial: Trial, folder: Path) -> None:
    trial.run("verify", folder, "--tokens", "8")


def push(trial: Trial, folder: Path) -> None:
    trial.run("push", folder, "owner/name", "--dry-run", *trial.random.choice(((), ("--json",))))


def check(trial: Trial, file: Path) -> None:
    trial.run("check", file, *trial.random.choice(((), ("--json",))))


def check_folder(trial: Trial, folder: Path) -> None:
    """The lock of an export, or one that is healthy, against the folder."""
    file = folder / LOCK if trial.random.random() < 0.5 else bases.lock()
    trial.run("check", file, "--folder", folder)


def check_at_import(trial: Trial, file: Path) -> None:
    """The lock that the environment names: an error of ours, which `patches/` raises where it is imported."""
    patches_lock.check_lock.cache_clear()
    for what in (lambda: patches_lock.check_lock(str(file)), lambda: qwen2_fp16_fix.check(file)):
        try:
            what()
        except Qwen2FP16FixError as error:
            if "\n" in str(error) or len(str(error)) > 20_000:
                trial.fault("the lock of the environment: no sentence", str(error)[:300])
            if any("\ud800" <= letter <= "\udfff" for letter in str(error)):
                trial.fault("the lock of the environment: a sentence that cannot be printed")
        except Exception as error:
            trial.fault(f"the lock of the environment: {cause_of(traceback.format_exc())}", repr(error)[:3000])


def verification_of_export(trial: Trial, file: Path) -> None:
    trial.run("export", bases.healthy(), trial.folder / "out", "--code-only", "--verification", file)


def verification_of_scan(trial: Trial, file: Path) -> None:
    report = trial.folder / "report.html"
    trial.run("scan", bases.healthy(), "--tokens", "4", "--fixed", "--report", report, "--verification", file)


def resume(trial: Trial, file: Path) -> None:
    trial.run("verify", bases.healthy(), "--tokens", "16", "--resume", file)


def prompts(trial: Trial, file: Path) -> None:
    trial.run("scan", bases.healthy(), "--tokens", "4", "--fixed", "--prompts", file)


def lock_over(trial: Trial, file: Path) -> None:
    """A lock written over the file, which must be refused or replaced, and never be emptied."""
    trial.run("lock", "-o", file, *trial.random.choice(((), ("--force",))))


READERS = (
    Reader("config of a checkpoint: certify", 8, bases.healthy, "config.json", certify),
    Reader("config of a checkpoint: doctor", 4, bases.healthy, "config.json", doctor),
    Reader("config of a checkpoint: export", 5, bases.healthy, "config.json", export),
    Reader("config of a checkpoint: scan", 3, bases.healthy, "config.json", scan),
    Reader("config of a checkpoint: verify", 1, bases.healthy, "config.json", verify),
    Reader("config of an export: push", 6, bases.exported, "config.json", push),
    Reader("config of an export: certify", 4, bases.exported, "config.json", certify),
    Reader("config of an export: doctor", 3, bases.exported, "config.json", doctor),
    Reader("config of an export: check", 4, bases.exported, "config.json", check_folder),
    Reader("lock of an export: push", 5, bases.exported, LOCK, push),
    Reader("lock of an export: check", 5, bases.exported, LOCK, check_folder),
    Reader("lock of an export: doctor", 3, bases.exported, LOCK, doctor),
    Reader("tokenizer of an export: check", 2, bases.exported, "tokenizer_config.json", check_folder),
    Reader("index: certify", 8, bases.sharded, bases.INDEX, certify),
    Reader("index: doctor", 3, bases.sharded, bases.INDEX, doctor),
    Reader("index: export", 4, bases.sharded, bases.INDEX, export),
    Reader("index: scan", 2, bases.sharded, bases.INDEX, scan),
    Reader("tokenizer_config: export", 5, bases.healthy, "tokenizer_config.json", export),
    Reader("tokenizer_config: scan", 3, bases.healthy, "tokenizer_config.json", scan),
    Reader("tokenizer: scan", 3, bases.healthy, "tokenizer.json", scan),
    Reader("tokenizer: verify", 1, bases.healthy, "tokenizer.json", verify),
    Reader("generation_config: export", 2, bases.healthy, "generation_config.json", export),
    Reader("generation_config: scan", 2, bases.healthy, "generation_config.json", scan),
    Reader("generation_config: verify", 1, bases.healthy, "generation_config.json", verify),
    Reader("lock: check", 8, bases.lock, None, check),
    Reader("lock: at import", 6, bases.lock, None, check_at_import),
    Reader("lock: written over", 2, bases.lock, None, lock_over, True),
    Reader("verification: export", 8, bases.verification, None, verification_of_export),
    Reader("verification: scan", 2, bases.verification, None, verification_of_scan),
    Reader("resume: verify", 6, bases.resume, None, resume, True),
    Reader("prompts: scan", 4, bases.prompts, None, prompts),
)
#: Documents that a reader is given in place of its own: all that the package writes, and a checkpoint's.
STRANGERS: tuple[Callable[[], Path], ...] = (
    bases.lock,
    bases.verification,
    bases.resume,
    bases.scan,
    bases.certificate,
)
STRANGERS += (bases.prompts, lambda: bases.healthy() / "config.json", lambda: bases.exported() / "config.json")
STRANGERS += (lambda: bases.sharded() / bases.INDEX, lambda: bases.healthy() / "tokenizer.json")


def prepare(numbers: Sequence[int]) -> None:
    """Makes the documents that these inputs damage. Some take a run of `verify`; the rest is made where it is read."""
    for make in dict.fromkeys(reader_of(Trial("jsons", number, Path()).random).base for number in numbers):
        make()
    for make in STRANGERS if len(numbers) > SHARE else ():
        make()


def reader_of(chosen: random.Random) -> Reader:
    """The reader of an input, by its first random number."""
    return chosen.choices(READERS, [each.weight for each in READERS])[0]


def change_document(file: Path, chosen: random.Random) -> None:
    """Writes another tree of the same JSON over the file."""
    file.write_text(dumps(change_tree(json.loads(file.read_text(encoding="utf-8")), chosen)), encoding="utf-8")


def damage(trial: Trial, file: Path, written: bool) -> str:
    """Puts something else into the file, or in its place, and says what."""
    chosen = trial.random
    how = chosen.random()
    if how < 0.55:
        change_document(file, chosen)
        return "another tree"
    if how < 0.85:
        file.write_bytes(change_text(file.read_bytes(), chosen))
        return "another text"
    if how < 0.95:
        shutil.copyfile(chosen.choice(STRANGERS)(), file)
        if chosen.random() < 0.3:
            change_document(file, chosen)
        return "another document"
    return change_file(file, chosen, devices=not written)


def attempt(trial: Trial) -> None:
    """Damages one file, and runs what reads it."""
    reader = reader_of(trial.random)
    base = reader.base()
    target = bases.placed(base, trial.folder, "checkpoint" if reader.inside else f"{base.stem}.json")
    file = target / reader.inside if reader.inside else target
    trial.commands.append(f"{reader.name}, {damage(trial, file, reader.written)}")
    reader.read(trial, target)
