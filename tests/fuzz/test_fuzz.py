"""A small share of each kind of damaged input. `python -m tests.fuzz` runs them all."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz import bases, damage, kinds, proofs, worker
from tests.fuzz.worker import Trial

#: The numbers that are run here: fixed, so that a failure is reproducible, and few, so that this takes seconds.
SHARE = {"configs": range(9), "weights": range(8), "jsons": range(8), "models": range(2)}


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_share_of_each_kind_has_no_fault(kind: str) -> None:
    """No traceback, no hang, no peak of memory, and nothing called proven that is not finite."""
    kinds.prepare(kind, SHARE[kind])
    found = {each["number"]: each for each in worker.run(kind, SHARE[kind], kinds.attempt(kind))}
    assert sorted(found) == list(SHARE[kind])
    faults = [f"python -m tests.fuzz {kind} {number}: {fault}" for number in found for fault in found[number]["faults"]]
    assert not faults, "\n\n".join(faults)
    assert any(each["notes"] for each in found.values())


# That the fuzz itself sees what it is for


def faults_of(make: Callable[[Trial], None], numbers: range = range(1)) -> list[str]:
    """The faults of some inputs, each by its first line, in forks."""
    return [fault.splitlines()[0] for each in worker.run("test", numbers, make) for fault in each["faults"]]


def test_a_traceback_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.main, "app", lambda **_: [][1])
    assert faults_of(lambda trial: trial.run("certify", "x") and None)[0].startswith(
        "certify: exit code 70, IndexError"
    )


def test_what_hangs_is_a_fault_and_the_next_input_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes to, read by Python."""
    monkeypatch.setattr(worker, "SECONDS", 1)

    def wait(trial: Trial) -> None:
        if trial.number == 0:
            os.mkfifo(trial.folder / "pipe")
            (trial.folder / "pipe").read_text()
        trial.fault("ran")

    assert [fault.partition(",")[0] for fault in faults_of(wait, range(2))] == ["more than 1 s", "ran"]


def test_what_no_alarm_stops_is_killed_and_the_next_input_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in C that never comes back to Python, or a process that dies."""
    monkeypatch.setattr(worker, "SECONDS", 0.1)
    monkeypatch.setattr(worker, "GRACE", 0.4)

    def stop(trial: Trial) -> None:
        if trial.number == 0:
            worker.signal.pthread_sigmask(worker.signal.SIG_BLOCK, [worker.signal.SIGALRM])
            worker.time.sleep(60)
        if trial.number == 1:
            os._exit(3)
        trial.fault("ran")

    found = faults_of(stop, range(3))
    assert [fault[:9] for fault in found] == ["no answer", "no answer", "ran"]
    assert "(3)" in found[1]


def test_what_takes_all_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held, where the limit is above it; refused, where it is asked for at once."""
    monkeypatch.setattr(worker, "MEMORY", worker._status("VmRSS") + 2**27)
    held = (
        worker.MEMORY - 2**26
    )  # written to, beside the 100 MB and more of torch; a fork has not all that its parent has
    assert faults_of(lambda trial: b"x" * held and None) == ["more than 2 GB"]
    monkeypatch.setattr(worker.main, "app", lambda **_: bytearray(2**45))
    assert faults_of(lambda trial: trial.run("certify", "x") and None) == ["certify: more memory than the limit"]


@pytest.mark.parametrize(
    ("code", "err", "complaint"),
    [
        (2, "qwen2-fp16-fix: there is no x: name another.\n", None),
        (2, "stock float32 eager …\nqwen2-fp16-fix: there is no x.\n", None),
        (2, "[transformers] one\ntwo\nqwen2-fp16-fix: there is no x.\n", None),
        (2, "", "no sentence at the end"),
        (2, "qwen2-fp16-fix: there is\nno x.\n", "no sentence at the end"),
        (2, "warning\nqwen2-fp16-fix: there is no x.\n", "more than a sentence"),
        (2, "qwen2-fp16-fix: there is no " + "x" * 2000 + ".\n", "a sentence of more than"),
        (2, "qwen2-fp16-fix: there is no x", "no whole sentence"),
        (5, "", "exit code 5"),
        (0, "Traceback (most recent call last):\nKeyError: 1", "KeyError"),
        (0, "", None),
        (1, "", None),
    ],
)
def test_how_a_command_may_end(code: int, err: str, complaint: str | None) -> None:
    found = list(worker.complaints(code, err))
    assert (not found) if complaint is None else any(complaint in each for each in found)


def trial_of(folder: Path) -> Trial:
    return Trial("test", 0, folder)


def test_a_proof_of_what_is_not_finite_is_a_fault(tmp_path: Path) -> None:
    """A gain of the final norm that no exponent holds, and that certify does not prove."""
    folder = bases.placed(bases.healthy(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(6e4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    trial = trial_of(tmp_path)
    assert not proofs.check(trial, folder)
    assert not trial.faults
    model, _ = proofs.load(folder)
    found = list(proofs.disproofs(model, {"verdict": "", "assumes": []}, []))
    assert found == ["a prompt is not finite (eager, a CPU's arithmetic)"]


def test_a_proof_of_other_weights_is_a_fault(tmp_path: Path) -> None:
    """As from the wrong one of two files: transformers loads a bias that the certificate has not seen."""
    healthy = proofs.load(bases.healthy())[0]
    certificate = worker.call("certify", str(bases.healthy()), "--json")[1]
    assert not list(proofs.same_weights(json.loads(certificate), healthy))
    with torch.no_grad():
        healthy.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert "another bound of up for the loaded model" in proofs.same_weights(json.loads(certificate), healthy)


def test_the_adversary_finds_more_than_chance() -> None:
    """Steps of its gradient make a product larger than any of as many random inputs."""
    stock = proofs.load(bases.healthy())[0].float().requires_grad_(False)
    sizes: list[float] = []
    hook = stock.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: sizes.append(float(args[0].detach().abs().max()))
    )
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, 32) for _ in range(20)]
    for embeds in inputs:
        stock.model(inputs_embeds=embeds, use_cache=False)
    chance = max(sizes)
    climbed = proofs.ascend(stock, 0, "down_proj", inputs[0], 12)
    stock.model(inputs_embeds=climbed, use_cache=False)
    hook.remove()
    assert sizes[-1] > 1.5 * chance


def test_a_number_is_always_the_same_input(tmp_path: Path) -> None:
    """What a failure names must be what is run again, in any process."""
    for kind in kinds.KINDS:
        first, again, other = (Trial(kind, number, tmp_path).random.random() for number in (7, 7, 8))
        assert first == again != other
    assert random.Random("configs 7").random() == Trial("configs", 7, tmp_path).random.random()


def test_no_damage_fails_by_itself() -> None:
    """On documents that are empty, nested, or damaged before."""
    for number in range(300):
        chosen = random.Random(f"damage {number}")
        tree: Any = chosen.choice(({}, [], {"a": {"b": [1, {"c": None}]}}, [[[]]], 1, None))
        text = damage.dumps(damage.change_tree(tree, chosen)).encode("utf-8", "surrogatepass")
        damage.change_text(text, chosen)
