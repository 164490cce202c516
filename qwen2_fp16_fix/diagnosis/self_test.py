"""Reproduces the overflow on a device with a tiny stock model, and shows the fix repairing it, or failing to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..doctor_texts import Remark, remark
from ..verification.divergence import Divergence

#: Nats, mean over tokens. Roundings of a whole fix cost 1.6e-7 here; keys that are not centred 2e-2, bfloat16 3e-5.
KL_LIMIT = 2e-6
ATTENTIONS = ("eager", "sdpa")


def self_test(place: str) -> tuple[dict[str, Any], Remark]:
    """Runs stock and fixed float16 on the device of that name in torch, against stock fp32 eager on the CPU.

    Returns `device`, `rows` (`name`, `fixed`, `finite`, `kl`) and `passed`, fit for JSON, and a sentence. It passes if
    stock is finite neither in eager nor in sdpa, and fixed is in both, and within KL_LIMIT.
    """
    rows: list[dict[str, Any]] = []
    try:
        from ..checkpoints.loading import quiet

        with quiet():
            oracle = _oracle()
            rows += [_row(place, fixed, attention, oracle) for fixed in (False, True) for attention in ATTENTIONS]
        passed, finding = judge(place, rows)
    except Exception as error:  # whatever a device, a driver or a backend raises: a diagnosis must not end in it
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        passed, finding = False, remark("self_test.not_run", device=place, reason=reason)
    return {"device": place, "rows": rows, "passed": passed}, finding


def judge(place: str, rows: Sequence[dict[str, Any]]) -> tuple[bool, Remark]:
    """Whether these rows show the bug and its repair, and the sentence that says so."""
    for row in rows:
        if not row["fixed"] and row["finite"]:
            return False, remark("self_test.not_reproduced", device=place, row=row["name"])
        if row["fixed"] and not row["finite"]:
            return False, remark("self_test.not_finite", device=place, row=row["name"])
        if row["fixed"] and not row["kl"] <= KL_LIMIT:
            kl, limit = f"{row['kl']:.1e}", f"{KL_LIMIT:.0e}"
            return False, remark("self_test.not_close", device=place, row=row["name"], kl=kl, limit=limit)
    largest = max(row["kl"] for row in rows if row["fixed"])
    return True, remark("self_test.passed", device=place, kl=f"{largest:.1e}", limit=f"{KL_LIMIT:.0e}")


@torch.no_grad()
def _oracle() -> Tensor:
    """Logits (TOKENS, vocabulary) of stock fp32 eager on the CPU, whatever autocast says."""
    from .self_test_model import prompt, stock_model

    with torch.autocast("cpu", enabled=False):
        logits: Tensor = stock_model("eager")(input_ids=prompt()).logits[0]
    return logits.float()


@torch.no_grad()
def _row(place: str, fixed: bool, attention: str, oracle: Tensor) -> dict[str, Any]:
    from ..in_place import fix
    from .self_test_model import prompt, stock_model

    model = stock_model(attention).half().to(place)
    if fixed:
        fix(model)
    logits = model(input_ids=prompt().to(place)).logits[0].float().cpu()
    finite = bool(torch.isfinite(logits).all())
    return {
        "name": f"{'fixed' if fixed else 'stock'} float16 {attention}",
        "fixed": fixed,
        "finite": finite,
        "kl": _kl(logits, oracle) if finite else None,
    }


def _kl(logits: Tensor, oracle: Tensor) -> float:
    divergence = Divergence()
    divergence.add(logits, oracle, oracle.argmax(-1))
    found = float(divergence.summary()["kl_mean"])
    return found if math.isfinite(found) else math.inf
