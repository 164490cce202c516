"""Registering, loading and saving, on whichever release is installed."""

import json
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import qwen2_fp16_fix
from qwen2_fp16_fix import locking
from qwen2_fp16_fix.patches import errors, version_map
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import DROP_IN_OF, PARTS, RANGE, STOCK
from tests.conformance.models import DTYPE, PROMPT, RELEASE, expected_release, fixed_half, generate, logits, stress
from tests.stress import TINY, config

HEADS = {
    "AutoModel": "Qwen2Model",
    "AutoModelForCausalLM": "Qwen2ForCausalLM",
    "AutoModelForSequenceClassification": "Qwen2ForSequenceClassification",
    **{
        f"AutoModelFor{head}": f"Qwen2For{head}"
        for head, first in (("TokenClassification", "4.42"), ("QuestionAnswering", "4.46.1"))
        if RELEASE >= Version(first)
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint of a model that breaks stock."""
    path = tmp_path_factory.mktemp("checkpoint")
    stress(("scores", "residual")).half().save_pretrained(path)
    return path


def load(name: str, folder: Path) -> Any:
    return load_class(getattr(transformers, name), folder)


def load_class(loader: Any, folder: Path) -> Any:
    return loader.from_pretrained(folder, attn_implementation="eager", **{DTYPE: torch.float16}).eval()


def test_this_is_the_release_that_was_meant() -> None:
    """A dependency that replaces transformers would test one release under the name of another."""
    assert expected_release() in (None, transformers.__version__)
    assert version_map.range_for(transformers.__version__) == RANGE


def test_the_release_is_taken_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", qwen2_fp16_fix.UntestedTransformersWarning)
        qwen2_fp16_fix.register()
    assert qwen2_fp16_fix.status().problem is None
    assert qwen2_fp16_fix.status().tested


def test_every_auto_class_of_the_release_is_registered() -> None:
    qwen2_fp16_fix.register()
    assert set(HEADS) <= set(qwen2_fp16_fix.status().registered)
    assert all(qwen2_fp16_fix.status().registered.values())


def test_a_lock_made_here_checks_clean_until_something_differs(tmp_path: Path) -> None:
    """Every release has other classes and functions; those the fix lays its parts over are among what is locked."""
    path = qwen2_fp16_fix.lock(tmp_path / "lock.json")
    assert qwen2_fp16_fix.check(path).passed
    content = json.loads(path.read_text())
    assert {*PARTS, "Qwen2Model", "Qwen2ForCausalLM", "apply_rotary_pos_emb"} <= set(content["upstream"])
    content["upstream"]["Qwen2MLP"] = content["patches"]["numerics.py"] = "0" * 64
    path.write_text(json.dumps(content))
    assert qwen2_fp16_fix.check(path).differences == [
        "numerics.py is not the file that was locked.",
        "Qwen2MLP of transformers is not the code that was locked.",
    ]
    with pytest.raises(qwen2_fp16_fix.LockError):
        qwen2_fp16_fix.register(lock=path)
    assert not any(qwen2_fp16_fix.status().registered.values())


def test_a_lock_lists_every_file_that_a_forward_enters() -> None:
    """Held against a trace of what really runs: a change of a file that the list lacks would not be named."""
    entered = set()

    def note(frame: types.FrameType, event: str, argument: Any) -> None:
        entered.add(frame.f_code.co_filename)

    model = fixed_half(("scores",))
    sys.setprofile(note)
    try:
        logits(model)
        generate(model, do_sample=True, num_beams=2)
    finally:
        sys.setprofile(None)
    folder = Path(transformers.__file__).parent
    found = {Path(name).relative_to(folder).as_posix() for name in entered if Path(name).is_relative_to(folder)}
    assert {"cache_utils.py", "generation/utils.py", "models/qwen2/modeling_qwen2.py"} <= found
    assert found <= {*locking.make_lock()["upstream_files"]}


@pytest.mark.parametrize("name", HEADS)
def test_registering_makes_auto_classes_build_the_fix(name: str, folder: Path) -> None:
    """`register(exist_ok=True)` silently does nothing in 5.13.0 to 5.18.0."""
    ours = DROP_IN_OF[getattr(STOCK, HEADS[name])]
    qwen2_fp16_fix.register()
    qwen2_fp16_fix.register()
    loaded = load(name, folder)
    assert type(loaded) is ours
    assert type(getattr(transformers, name).from_config(config(TINY))) is ours
    found = qwen2_fp16_fix.status(loaded).model
    assert all(part.fixed == part.total for part in found.parts.values())
    assert found.fixed or (name == "AutoModelForQuestionAnswering" and "not in the checkpoint" in found.problem)
    qwen2_fp16_fix.unregister()
    assert type(load(name, folder)) is getattr(STOCK, HEADS[name])
    # A head that the checkpoint lacks is left uninitialised by 5.8, and the base of question answering, whose name
    # differs, by 4.48 to 4.52, in stock as well: what can be held against the fix is a base that was loaded.
    if name != "AutoModelForQuestionAnswering":
        with torch.no_grad():
            assert torch.isfinite(loaded.base_model(input_ids=PROMPT[:1]).last_hidden_state).all()


@pytest.mark.parametrize("name", HEADS.values())
def test_registering_reaches_classes_by_their_own_names(name: str, folder: Path) -> None:
    """TRL and wrappers name the class: it was stock, and `status` named no problem."""
    kind = getattr(transformers, name, None) or getattr(STOCK, name)
    before = [vars(STOCK.Qwen2Model).get(hook) for hook in ("__init__", "__init_subclass__")]
    with qwen2_fp16_fix.registered():
        loaded = load_class(kind, folder)
        assert type(loaded) is kind
        assert qwen2_fp16_fix.is_fixed(loaded)
        status = qwen2_fp16_fix.status(loaded).model
        assert status.fixed
        with qwen2_fp16_fix.stock_models():
            assert not qwen2_fp16_fix.is_fixed(kind(config(TINY)))
    assert [vars(STOCK.Qwen2Model).get(hook) for hook in ("__init__", "__init_subclass__")] == before
    assert not qwen2_fp16_fix.is_fixed(kind(config(TINY)))
    if name != "Qwen2ForQuestionAnswering":  # as above
        assert all(isinstance(row.mlp, int) and row.keys == "centred" for row in status.ranges)
        with torch.no_grad():
            found = loaded.base_model(input_ids=PROMPT[:1], output_hidden_states=True, output_attentions=True)
        assert torch.isfinite(found.last_hidden_state).all()
        assert (len(found.hidden_states), len(found.attentions)) == (TINY.layers + 1, TINY.layers)


class WithMore(STOCK.Qwen2Model):  # type: ignore[misc, name-defined]
    """As LLaVA's: its constructor goes on after transformers'."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projector = torch.nn.Linear(2, 2)


class OtherParts(WithMore):
    """As LLM2Vec's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = torch.nn.LayerNorm(config.hidden_size)


def test_subclasses_are_fixed_or_warned_of(folder: Path) -> None:
    with qwen2_fp16_fix.registered():
        loaded = load_class(WithMore, folder)
        assert qwen2_fp16_fix.is_fixed(loaded)
        with pytest.warns(qwen2_fp16_fix.NotFixedWarning, match="OtherParts"):
            other = OtherParts(config(TINY))
    assert not any(type(module).__module__.startswith("qwen2_fp16_fix") for module in other.modules())
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=PROMPT).last_hidden_state).all()


def test_drop_in_classes_are_pickled_as_themselves() -> None:
    """They say that they are of transformers' module, where a pickle would find the stock class."""
    for kind in DROP_IN_OF.values():
        again = pickle.loads(pickle.dumps(kind(config(TINY, pad_token_id=0))))
        assert type(again) is kind
        assert qwen2_fp16_fix.is_fixed(again)
        assert kind.__module__.startswith("transformers.")


def test_unregistering_leaves_no_trace() -> None:
    def tables() -> list[dict[Any, Any]]:
        return [dict(getattr(transformers, name)._model_mapping._extra_content) for name in HEADS]

    before = tables()
    with qwen2_fp16_fix.registered():
        assert tables() != before
    assert tables() == before


def test_a_registration_of_the_users_own_comes_back() -> None:
    class Mine(STOCK.Qwen2ForCausalLM):  # type: ignore[misc, name-defined]
        pass

    mapping = transformers.AutoModelForCausalLM._model_mapping
    mapping._extra_content[transformers.Qwen2Config] = Mine
    try:
        with qwen2_fp16_fix.registered():
            assert mapping[transformers.Qwen2Config] in DROP_IN_OF.values()
        assert mapping[transformers.Qwen2Config] is Mine
    finally:
        del mapping._extra_content[transformers.Qwen2Config]


@pytest.mark.parametrize("name", HEADS)
def test_fix_takes_every_class(name: str, folder: Path) -> None:
    model = load(name, folder)
    assert not qwen2_fp16_fix.status(model).model.fixed
    assert qwen2_fp16_fix.fix(model) is model
    assert qwen2_fp16_fix.status(model).model.fixed
    assert type(qwen2_fp16_fix.unfix(model)) is getattr(STOCK, HEADS[name])
    assert not qwen2_fp16_fix.status(model).model.fixed


def test_errors_get_through_pipeline() -> None:
    """`pipeline()` takes these four for a class that does not fit, and goes on with stock."""
    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.Qwen2FP16FixError)]
    assert len(ours) > 1
    assert not any(issubclass(e, (OSError, ValueError, TypeError, RuntimeError)) for e in ours)


def test_loading_registered_equals_fixing_after_loading(folder: Path) -> None:
    with qwen2_fp16_fix.registered():
        registered = load("AutoModelForCausalLM", folder)
    assert torch.equal(logits(registered), logits(qwen2_fp16_fix.fix(load("AutoModelForCausalLM", folder))))


@pytest.mark.parametrize("name", HEADS)
def test_what_a_fixed_model_saves_is_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    """Other engines read `architectures`; a name of ours would make them reject or misread the checkpoint."""
    stock_class = getattr(STOCK, HEADS[name])
    model = DROP_IN_OF[stock_class](config(TINY)).half()
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert type(loaded) is stock_class
    assert loaded.config.architectures == [HEADS[name]]
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_what_is_fixed_in_place_saves_as_stock(tmp_path: Path) -> None:
    model = fixed_half(("scores", "residual"))
    model.save_pretrained(tmp_path)
    loaded = load("AutoModelForCausalLM", tmp_path)
    assert type(loaded) is STOCK.Qwen2ForCausalLM
    assert loaded.config.architectures == ["Qwen2ForCausalLM"]
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_fix_touches_no_weight() -> None:
    stock, fixed = stress(("scores",)).half().state_dict(), fixed_half(("scores",)).state_dict()
    assert list(stock) == list(fixed)
    assert all(torch.equal(stock[key], fixed[key]) for key in stock)
