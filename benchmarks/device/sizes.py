"""How much a proof looks at: on a GPU, and on a CPU, where it is a rehearsal of the same code."""

from dataclasses import dataclass

from tests import stress

#: Alone, together, and none: what a stress model may have.
KINDS: tuple[tuple[str, ...], ...] = ((), *((kind,) for kind in stress.KINDS), stress.KINDS)
WIDTHS = ("0.5b", "1.5b", "7b")


@dataclass(frozen=True)
class Sizes:
    """What each section runs over."""

    kinds: tuple[tuple[str, ...], ...] = KINDS
    tokens: int = 256  # of a stress model's prompt
    long_tokens: int = 4096  # of the prompt for keys in two parts
    flex_kinds: tuple[tuple[str, ...], ...] = (("scores",), stress.KINDS)  # it compiles for seconds a model
    plan_width: str = "7b"
    launch_widths: tuple[str, ...] = ("0.5b", "7b")
    widths: tuple[str, ...] = WIDTHS
    contexts: tuple[int, ...] = (64, 1024, 4096)
    prompts: tuple[int, ...] = (128, 512, 2048)
    decode_layers: int = 8
    prompt_layers: int = 4
    memory_tokens: int = 2048
    compiled_width: str = "0.5b"
    compiled_context: int = 1024
    score_shapes: tuple[str, ...] = ("0.5b", "7b", "72b")
    pairs: int = 15  # of host time
    shortest: float = 0.3  # seconds of pairs for a row, at least


GPU = Sizes()
#: Few layers and short prompts. flex would compile for a minute.
CPU = Sizes(
    long_tokens=512,
    flex_kinds=(),
    plan_width="0.5b",
    launch_widths=("0.5b",),
    widths=("0.5b",),
    contexts=(64, 1024),
    prompts=(128,),
    decode_layers=2,
    prompt_layers=2,
    memory_tokens=512,
    compiled_context=64,
    score_shapes=("0.5b",),
    shortest=0.1,
)
