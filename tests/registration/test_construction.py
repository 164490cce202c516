"""`register` by whatever way a Qwen2 is built, beside the Auto classes; what it wraps, and that it leaves no trace."""

import copy
import functools
import gc
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2 import modeling_qwen2

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import modeling_qwen2_fp16 as patched
from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import STOCK
from qwen2_fp16_fix.registration import construction
from tests.registration.models import PROMPT, OwnForward
from tests.stress import TINY, build, config


def base_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, STOCK.Qwen2Model))


def check_fixed(model: nn.Module, source: Any, oracle: torch.Tensor) -> None:
    """By what it says and by what it computes: close to fp32 in float16 eager, its states and attentions recorded."""
    assert qwen2_fp16_fix.is_fixed(model)
    status = qwen2_fp16_fix.status(model).model
    assert (status.fixed, status.problem) == (True, None)
    base = base_of(model)
    missing, unexpected = base.load_state_dict(source.model.state_dict(), strict=False)  # whatever it was built with
    assert not unexpected
    assert all(name.startswith(("projector.", "vision.", "more.")) for name in missing)  # a subclass's own
    base.half().eval()
    base.set_attn_implementation("eager")
    with torch.no_grad():
        found = base(input_ids=PROMPT, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == TINY.layers + 1
    assert len(found.attentions) == TINY.layers
    assert torch.isfinite(found.last_hidden_state).all()
    error = (found.last_hidden_state.float() - oracle).norm() / oracle.norm()
    assert error < 5e-3  # 11 bits of mantissa in each of some ten roundings; stock is NaN here
    for row in qwen2_fp16_fix.status(model).model.ranges:
        assert isinstance(row.mlp, int)  # planned, by whichever way it was built and loaded
        assert row.keys == "centred"


class OwnConstructor(Qwen2Model):
    """As LLaVA's: more modules beside Qwen2's parts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projector = nn.Linear(2, 2)


class Beside:
    """A mixin whose constructor is the outermost."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.vision = nn.Linear(2, 2)


class Mixed(Beside, Qwen2Model):  # type: ignore[misc]
    pass


class Wrapper(nn.Module):
    """As VibeVoice's or MiniCPM-V's: names the class it holds."""

    def __init__(self, inner: type) -> None:
        super().__init__()
        self.llm = inner(config(TINY))


class SameName(Qwen2Config):
    pass


SameName.__name__ = SameName.__qualname__ = "Qwen2Config"


def by_trl(folder: Path) -> Any:
    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float16)


def derived_later() -> Any:
    class Later(Qwen2Model):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.more = nn.Linear(2, 2)

    return Later(config(TINY))


def in_a_thread(make: Callable[[], Any]) -> Any:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    return made[0]


WAYS: dict[str, Callable[[Path], Any]] = {
    "AutoModelForCausalLM": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16),
    "AutoModel": lambda folder: AutoModel.from_pretrained(folder, dtype=torch.float16),
    "Auto from_config": lambda folder: AutoModelForCausalLM.from_config(config(TINY)),
    "name imported before": lambda folder: Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float16),
    "base imported before": lambda folder: Qwen2Model.from_pretrained(folder, dtype=torch.float16),
    "name looked up after": lambda folder: modeling_qwen2.Qwen2ForCausalLM.from_pretrained(folder),
    "architectures[0], as TRL": by_trl,
    "a head": lambda folder: transformers.Qwen2ForSequenceClassification(config(TINY, pad_token_id=0)),
    "a generic head": lambda folder: transformers.Qwen2ForTokenClassification(config(TINY)),
    "constructor": lambda folder: Qwen2ForCausalLM(config(TINY)),
    "_from_config": lambda folder: Qwen2ForCausalLM._from_config(config(TINY)),
    "wrapper of a head": lambda folder: Wrapper(Qwen2ForCausalLM),
    "wrapper of a base": lambda folder: Wrapper(Qwen2Model),
    "subclass": lambda folder: OwnForward.from_pretrained(folder),
    "subclass with a constructor": lambda folder: OwnConstructor(config(TINY)),
    "subclass with a mixin": lambda folder: Mixed(config(TINY)),
    "subclass made after": lambda folder: derived_later(),
    "drop-in class": lambda folder: qwen2_fp16_fix.Qwen2ForCausalLM(config(TINY)),
    "config of the same name": lambda folder: AutoModelForCausalLM.from_config(SameName(**config(TINY).to_dict())),
    "thread": lambda folder: in_a_thread(lambda: Qwen2Model(config(TINY))),
    "copy": lambda folder: copy.deepcopy(Qwen2ForCausalLM(config(TINY))),
    "pickle": lambda folder: pickle.loads(pickle.dumps(Qwen2ForCausalLM(config(TINY)))),
    "pickle of a drop-in": lambda folder: pickle.loads(pickle.dumps(AutoModelForCausalLM.from_config(config(TINY)))),
    "copy of a drop-in": lambda folder: copy.deepcopy(AutoModel.from_config(config(TINY))),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_fixed_while_registered_and_stock_afterwards(
    way: str, folder: Path, source: Any, oracle: torch.Tensor
) -> None:
    """TRL, wrappers and whatever named a class got a stock model, and nobody was told."""
    make = WAYS[way]
    with warnings.catch_warnings():
        warnings.simplefilter("error", qwen2_fp16_fix.NotFixedWarning)
        qwen2_fp16_fix.register()
        check_fixed(make(folder), source, oracle)
        with qwen2_fp16_fix.registered():
            pass
        check_fixed(make(folder), source, oracle)
        with qwen2_fp16_fix.stock_models():
            assert not qwen2_fp16_fix.is_fixed(make(folder)) or way == "thread"
    qwen2_fp16_fix.unregister()
    assert not qwen2_fp16_fix.is_fixed(make(folder)) or way == "drop-in class"


def test_a_model_on_the_meta_device_is_fixed() -> None:
    """Where from_pretrained builds it, and estimators."""
    with qwen2_fp16_fix.registered(), torch.device("meta"):
        assert qwen2_fp16_fix.is_fixed(Qwen2ForCausalLM(config(TINY)))


def test_pickles_of_stock_models_and_classes_stay_readable(source: Any) -> None:
    """Rebound names made `pickle.dumps` fail, and isinstance false for classes imported before."""
    with qwen2_fp16_fix.registered():
        assert modeling_qwen2.Qwen2ForCausalLM is Qwen2ForCausalLM is transformers.Qwen2ForCausalLM
        again = pickle.loads(pickle.dumps(source))
        assert type(again) is Qwen2ForCausalLM
        assert not qwen2_fp16_fix.is_fixed(again)
        assert pickle.loads(pickle.dumps(Qwen2ForCausalLM)) is Qwen2ForCausalLM
        assert isinstance(AutoModelForCausalLM.from_config(config(TINY)), Qwen2ForCausalLM)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_drop_in_comes_back_as_itself(protocol: int) -> None:
    """Its `__module__` is stock's, where a pickle would look for it."""
    model = qwen2_fp16_fix.Qwen2ForCausalLM(config(TINY))
    again = pickle.loads(pickle.dumps(model, protocol))
    assert type(again) is qwen2_fp16_fix.Qwen2ForCausalLM
    assert qwen2_fp16_fix.is_fixed(again)


def test_a_drop_in_class_is_fixed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base inside a head was built by the wrapped constructor, and then the head was fixed again."""
    checks: list[Any] = []
    monkeypatch.setattr(patched, "exchange_all", lambda root, *_, **__: checks.append(type(root)))
    with qwen2_fp16_fix.registered():
        AutoModelForCausalLM.from_config(config(TINY))
    assert checks == [qwen2_fp16_fix.Qwen2ForCausalLM]


class OwnLayer(modeling_qwen2.Qwen2DecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnParts(Qwen2Model):
    """As LLM2Vec's: other layers, put in after transformers' constructor."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(OwnLayer(config, index) for index in range(config.num_hidden_layers))


class PastTheBase(Qwen2Model):
    """As LLM2Vec's, too: it never calls Qwen2Model's constructor."""

    def __init__(self, config: Any) -> None:
        modeling_qwen2.Qwen2PreTrainedModel.__init__(self, config)
        whole = Qwen2Model(config)
        self.embed_tokens, self.norm, self.rotary_emb = whole.embed_tokens, whole.norm, whole.rotary_emb
        self.layers = nn.ModuleList(OwnLayer(config, index) for index in range(config.num_hidden_layers))


@pytest.mark.parametrize("kind", [OwnParts, PastTheBase])
def test_a_subclass_with_parts_of_its_own_is_warned_of_and_not_half_fixed(kind: Any) -> None:
    with qwen2_fp16_fix.registered(), pytest.warns(qwen2_fp16_fix.NotFixedWarning, match=kind.__name__) as said:
        model = kind(config(TINY))
    assert len(said) == 1
    assert not qwen2_fp16_fix.is_fixed(model)
    parts = [module for module in model.modules() if type(module).__module__.startswith("qwen2_fp16_fix")]
    assert len(parts) == (2 if kind is PastTheBase else 0)  # norm and rotation, out of the whole one that it has built


def test_a_subclass_that_is_made_while_registered_is_not_half_fixed_either() -> None:
    """Looked at when transformers' constructor ends, its parts would still be Qwen2's."""
    with qwen2_fp16_fix.registered():
        later = type("Later", (OwnParts,), {"__init__": lambda self, config: OwnParts.__init__(self, config)})

        class Afterwards(Qwen2Model):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.norm = nn.LayerNorm(config.hidden_size)

        for kind in (later, Afterwards):
            with pytest.warns(qwen2_fp16_fix.NotFixedWarning, match=kind.__name__) as said:
                model = kind(config(TINY))
            assert len(said) == 1
            assert not any(type(module).__module__.startswith("qwen2_fp16_fix") for module in model.modules())


def test_a_subclass_with_its_own_parts_is_quiet_where_stock_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", qwen2_fp16_fix.NotFixedWarning)
        with qwen2_fp16_fix.registered(), qwen2_fp16_fix.stock_models():
            OwnParts(config(TINY))


def test_another_tools_parts_in_stock_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for by name raises: silently stock, it would print `!!!!`."""

    class FastMLP(modeling_qwen2.Qwen2MLP):
        def forward(self, x: Any) -> Any:
            return x

    with qwen2_fp16_fix.registered():
        monkeypatch.setattr(modeling_qwen2, "Qwen2MLP", FastMLP)
        with pytest.raises(qwen2_fp16_fix.PatchConflictError, match="FastMLP"):
            Qwen2Model(config(TINY))


def test_a_wrapper_that_came_later_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed wraps every constructor for a while, and may put its own back after we are gone."""
    kind = STOCK.Qwen2Model
    original = kind.__init__
    qwen2_fp16_fix.register()
    ours = kind.__init__

    @functools.wraps(ours)
    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", theirs)
    assert qwen2_fp16_fix.is_fixed(kind(config(TINY)))
    qwen2_fp16_fix.unregister()
    assert kind.__init__ is theirs
    assert not qwen2_fp16_fix.is_fixed(kind(config(TINY)))
    monkeypatch.undo()
    kind.__init__ = original  # type: ignore[misc]


def test_what_is_wrapped_still_counts_as_transformers_own(tmp_path: Path) -> None:
    """The structure check, the lock and doctor take a class that another tool has replaced for a conflict."""
    before = qwen2_fp16_fix.lock(tmp_path / "before.json")
    with qwen2_fp16_fix.registered():
        patched.check_structure(STOCK, patched.PARTS, transformers.__version__)
        assert qwen2_fp16_fix.check(before).passed
        assert Qwen2Model.__init__.__module__ == modeling_qwen2.__name__


def test_overlapping_blocks_are_counted() -> None:
    """The end of one took away what the other still needed."""
    first, second = qwen2_fp16_fix.registered(), qwen2_fp16_fix.registered()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert qwen2_fp16_fix.is_fixed(AutoModelForCausalLM.from_config(config(TINY)))
    qwen2_fp16_fix.unregister()  # ends register(), not a block
    assert qwen2_fp16_fix.is_fixed(Qwen2ForCausalLM(config(TINY)))
    assert all(qwen2_fp16_fix.status().registered.values())
    second.__exit__(None, None, None)
    assert not construction.is_watching()
    assert not any(qwen2_fp16_fix.status().registered.values())


def test_register_outlives_blocks() -> None:
    with qwen2_fp16_fix.registered():
        qwen2_fp16_fix.register()
    assert qwen2_fp16_fix.is_fixed(Qwen2ForCausalLM(config(TINY)))


def test_registered_blocks_in_threads_build_fixed_models() -> None:
    """Each thread builds fixed models in its blocks, whatever the others do meanwhile."""
    tiny = config(TINY, num_hidden_layers=2)
    fixed: list[bool] = []

    def work() -> None:
        for _ in range(6):
            with qwen2_fp16_fix.registered():
                fixed.append(qwen2_fp16_fix.is_fixed(Qwen2Model(tiny)))
                fixed.append(qwen2_fp16_fix.is_fixed(AutoModel.from_config(tiny)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fixed == [True] * 48
    assert not construction.is_watching()


def test_stock_models_is_for_one_thread() -> None:
    """A scan in one thread must not switch the fix off for a server in another."""
    with qwen2_fp16_fix.registered(), qwen2_fp16_fix.stock_models():
        assert qwen2_fp16_fix.is_fixed(in_a_thread(lambda: Qwen2Model(config(TINY))))
        assert not qwen2_fp16_fix.is_fixed(Qwen2Model(config(TINY)))


@pytest.mark.parametrize(
    "thing", [None, 3, "path", nn.Linear(1, 1), Qwen2Model, object()], ids=lambda thing: type(thing).__name__
)
def test_is_fixed_takes_anything(thing: Any) -> None:
    assert qwen2_fp16_fix.is_fixed(thing) is False


def test_is_fixed_is_false_of_stock_and_of_a_part_put_back(source: Any) -> None:
    model = copy.deepcopy(source)
    assert qwen2_fp16_fix.is_fixed(model) is False
    assert qwen2_fp16_fix.is_fixed(qwen2_fp16_fix.fix(model)) is True
    model.model.layers[0].mlp.__class__ = STOCK.Qwen2MLP
    assert qwen2_fp16_fix.is_fixed(model) is False


def test_nothing_of_ours_is_kept_alive() -> None:
    """A class that was derived while registered can go."""
    with qwen2_fp16_fix.registered():
        derived_later()
    gc.collect()
    assert not [kind for kind in Qwen2Model.__subclasses__() if kind.__name__ == "Later"]


class OwnStack(STOCK.Qwen2PreTrainedModel):  # type: ignore[misc, name-defined]
    """Holds Qwen2's layers, norm and rotation as a Qwen2Model does, and is none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(STOCK.Qwen2DecoderLayer(config, index) for index in range(2))
        self.norm = STOCK.Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = STOCK.Qwen2RotaryEmbedding(config)
        self.post_init()


def test_a_stack_of_qwen2s_parts_is_fixed() -> None:
    """Nobody was told of it: the class is no Qwen2Model, and no checkpoint's own."""
    with qwen2_fp16_fix.registered():
        assert qwen2_fp16_fix.is_fixed(OwnStack(config(TINY)))
    assert not qwen2_fp16_fix.is_fixed(OwnStack(config(TINY)))


def test_what_a_command_builds_is_what_it_says(tmp_path: Path) -> None:
    """`verify` inside `stock_models` would have measured stock under the name of fixed."""
    from qwen2_fp16_fix import demo

    build(TINY, ()).save_pretrained(tmp_path)
    with qwen2_fp16_fix.stock_models():
        assert qwen2_fp16_fix.is_fixed(demo.load(tmp_path, True, torch.float16, "eager"))
    with qwen2_fp16_fix.registered():
        assert not qwen2_fp16_fix.is_fixed(demo.load(tmp_path, False, torch.float16, "eager"))
