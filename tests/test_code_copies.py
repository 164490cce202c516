"""What a caller passes for a model: the model that a pipeline, a Trainer or lm-eval's HFLM holds, or one sentence."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import transformers
from torch import nn

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.tokenizer import read_text, tokenizer_in
from qwen2_fp16_fix.errors import CheckpointError, ScanError, VerificationError
from qwen2_fp16_fix.files.packaged import DEMO_CHECKPOINT
from qwen2_fp16_fix.patches.errors import NotQwen2Error
from qwen2_fp16_fix.scanning.prompts import read_prompts
from tests.stress import TINY, build


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)


class Sentences(nn.Sequential):
    """Stands for a SentenceTransformer: a module whose first part holds the model under another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        part = nn.Module()
        part.auto_model = model
        self.add_module("0", part)


class HFLM:
    """Stands for lm-eval's: no module, and `model` is a property."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self.tokenizer = model, tokenizer

    @property
    def model(self) -> nn.Module:
        return self._model


def pipeline(model: Any, tokenizer: Any, folder: Path) -> Any:
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


def trainer(model: Any, tokenizer: Any, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    return transformers.Trainer(model, arguments, processing_class=tokenizer)


HOLDERS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "pipeline": pipeline,
    "Trainer": trainer,
    "HFLM": lambda model, tokenizer, folder: HFLM(model, tokenizer),
    "SentenceTransformer": lambda model, tokenizer, folder: Sentences(model.model),
    "PeftModel": lambda model, tokenizer, folder: peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj"])
    ),
}


@pytest.mark.filterwarnings("ignore")  # of the libraries: the test is of what they hold
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_model_stands_for_it(holder: str, tokenizer: Any, tmp_path: Path) -> None:
    """`fix(pipe)` ended in a sentence about no Qwen2, and `status(pipe)` in an AttributeError."""
    model = build(TINY, ()).half()
    given = HOLDERS[holder](model, tokenizer, tmp_path)
    assert not qwen2_fp16_fix.is_fixed(given)
    assert qwen2_fp16_fix.fix(given) is given
    assert qwen2_fp16_fix.is_fixed(given)
    assert qwen2_fp16_fix.is_fixed(model)
    found = qwen2_fp16_fix.status(given).model
    assert found is not None
    assert found.fixed
    assert qwen2_fp16_fix.certify(given).layers
    if hasattr(given, "model") and not isinstance(given, nn.Module):
        assert tokenizer_in(given, model) is tokenizer
        assert qwen2_fp16_fix.scan(given, [[1, 2, 3]]).settings.fixed
    assert qwen2_fp16_fix.unfix(given) is given
    assert not qwen2_fp16_fix.is_fixed(model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "found no Qwen2 in this NoneType"),
        (5, "found no Qwen2 in this int"),
        (transformers.Qwen2ForCausalLM, "found no Qwen2 in the class Qwen2ForCausalLM"),
        (SimpleNamespace(model="Qwen/Qwen2-7B"), "found no Qwen2 in this SimpleNamespace"),
    ],
)
def test_what_holds_none_is_one_sentence_everywhere(given: Any, said: str) -> None:
    takes = [qwen2_fp16_fix.fix, qwen2_fp16_fix.unfix, qwen2_fp16_fix.certify, qwen2_fp16_fix.scan]
    takes += [qwen2_fp16_fix.verify, lambda given: qwen2_fp16_fix.adopt_cache(None, given)]
    takes += [qwen2_fp16_fix.status] if given is not None else []
    for take in takes:
        with pytest.raises(NotQwen2Error, match=said) as caught:
            take(given)
        assert "\n" not in str(caught.value)
    assert not qwen2_fp16_fix.is_fixed(given)
    for takes_a_path in (qwen2_fp16_fix.doctor, lambda given: qwen2_fp16_fix.export(given, "out")):
        if given is not None or takes_a_path is not qwen2_fp16_fix.doctor:
            with pytest.raises(CheckpointError, match="give the path of a checkpoint"):
                takes_a_path(given)


@pytest.mark.parametrize("take", [qwen2_fp16_fix.fix, qwen2_fp16_fix.status])
def test_a_name_is_to_be_loaded_first(take: Callable[[Any], Any]) -> None:
    for given in ("Qwen/Qwen2-7B", Path("checkpoint")):
        with pytest.raises(NotQwen2Error, match="the name of a checkpoint: load it with from_pretrained"):
            take(given)


def test_the_name_of_a_file_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scan(model, "prompts.txt")` scanned the eleven letters of the name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("first\nsecond\n")
    assert read_prompts("prompts.txt") == ["first", "second"]
    assert read_text("prompts.txt") == "first\nsecond\n"
    with pytest.raises(ScanError, match=r"there is no file promts\.txt"):
        read_prompts("promts.txt")
    with pytest.raises(VerificationError, match=r"there is no file texts/promts\.txt"):
        read_text("texts/promts.txt")
    for text in ("What is in prompts.txt", "e.g.", "a/b", "x" * 5000 + ".md", "one\nprompts.txt", "first"):
        assert read_prompts(text) == [text]


@pytest.mark.parametrize("given", [5, {"role": "user"}, [{"role": "user"}], [5], [["a"]]])
def test_other_prompts_are_one_sentence(given: Any) -> None:
    with pytest.raises(ScanError, match="text"):
        read_prompts(given)
    with pytest.raises(VerificationError, match="give a text, or the path of one"):
        read_text(given)
