"""What a scan found, in sentences of English or Chinese, and as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..patches.range_plan import FLOAT16_MAX
from ..translations import SCAN_TEXTS as TEXTS

LANGUAGES = tuple(TEXTS)


def site_name(site: str, lang: str = "en") -> str:
    """A site as it is called in a sentence."""
    return TEXTS[lang][f"site_{site}"]


def number(value: float | None, lang: str = "en") -> str:
    """A magnitude, with as many digits as say something."""
    if value is None:
        return TEXTS[lang]["not_finite"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bias_text(spike: dict[str, Any], form: str, lang: str = "en") -> str:
    """A spike's bias; one past float16's range is infinite in it, which JSON has as null."""
    return TEXTS[lang]["not_finite"] if spike["bias"] is None else format(spike["bias"], form)


def token_name(token_id: int, token: str | None) -> str:
    """A token as `text`, its spaces made visible, or by its id."""
    if token is None:
        return f"#{token_id}"
    shown = (token if token.isprintable() else repr(token)[1:-1]).replace(" ", "␣")
    return f"“{shown}”" if "`" in shown else f"`{shown}`"


def place_name(found: dict[str, Any], lang: str = "en") -> str:
    """A place: "layer 3, down_proj, channel 458, token 0 `<|im_start|>`"."""
    texts = TEXTS[lang]
    parts = [] if found["layer"] is None else [texts["layer"].format(layer=found["layer"])]
    parts.append(site_name(found["site"], lang))
    if found.get("head") is not None:
        parts.append(texts["head"].format(head=found["head"]))
    if "channel" in found:
        parts.append(texts["channel"].format(channel=found["channel"]))
        token = token_name(found["token_id"], found["token"])
        parts.append(texts["token"].format(position=found["position"], token=token))
    if found.get("key_position") is not None:
        key = token_name(found["key_token_id"], found["key_token"])
        parts.append(texts["key_token"].format(position=found["key_position"], token=key))
    return texts["comma"].join(parts)


def verdict(found: dict[str, Any], lang: str = "en") -> str:
    """The scan in one sentence, and in another that the checkpoint loads as something else, where it does."""
    foreign = found.get("foreign_code")
    return _outcome(found, lang) + ("" if foreign is None else TEXTS[lang]["verdict_foreign"].format(name=foreign))


def _outcome(found: dict[str, Any], lang: str) -> str:
    texts, first, fixed = TEXTS[lang], found["first_nonfinite"], found["settings"]["fixed"]
    what = texts["what_fixed" if fixed else "what_stock"].format(attention=found["settings"]["attention"])
    if first is not None:
        key = "verdict_broken" if first["exact"] else "verdict_lost"
        return texts[key].format(what=what, place=place_name(first, lang), number=number(first["largest"], lang))
    tight = tightest(found)
    return texts["verdict_finite"].format(
        what=what,
        prompts=len(found["prompts"]),
        tokens=sum(prompt["tokens"] for prompt in found["prompts"]),
        number=number(tight["largest"], lang),
        place=place_name(tight, lang),
        bits=f"{tight['headroom_bits']:.1f}",
    )


def tightest(found: dict[str, Any]) -> dict[str, Any]:
    """The site with the least headroom."""
    tight: dict[str, Any] = min(
        found["sites"], key=lambda site: -1e9 if site["headroom_bits"] is None else site["headroom_bits"]
    )
    return tight


def passing(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The sites whose largest passes what they are stored as, or is not finite."""
    return [site for site in found["sites"] if site["headroom_bits"] is None or site["headroom_bits"] < 0]


def consequences(found: dict[str, Any], lang: str = "en") -> list[str]:
    """What the scan means beyond its verdict: other sites past the limit, fused attention, quantisation, the proof."""
    texts, over = TEXTS[lang], passing(found)
    sentences = []
    if over:
        layers = len({site["layer"] for site in over})
        sentences.append(texts["past_limit"].format(sites=len(over), layers=layers, limit=f"{FLOAT16_MAX:,.0f}"))
        if all(site["site"] == "raw_scores" for site in over):
            sentences.append(texts["scores_only"])
    if found["first_nonfinite"] is not None and found["certificate"]["proven"]:
        sentences.append(texts["remedy"])
    if found["massive_activations"]:
        top = found["massive_activations"][0]
        sentences.append(
            texts["massive"].format(
                count=len(found["massive_activations"]),
                channel=top["channel"],
                number=number(top["magnitude"], lang),
                layer=top["layer"],
            )
        )
    sentences.append(_spikes(found, lang))
    keep = found["quantisation"]["keep_16_bit"]
    if worst := _worst_cache(found):
        loss = f"{worst['keys']['int8']:.0%}"
        sentences.append(texts["cache_keys"].format(loss=loss, layer=worst["layer"]))
    limit = f"{found['quantisation']['loss_limit']:.0%}"
    layers_named = texts["comma"].join(map(str, keep))
    sentences.append(texts["keep_layers" if keep else "keep_none"].format(layers=layers_named, limit=limit))
    return sentences


def _worst_cache(found: dict[str, Any]) -> dict[str, Any] | None:
    """The layer whose keys lose most in int8, if that is more than the limit."""
    seen = [layer for layer in found["quantisation"]["cache"] if layer["keys"] is not None]
    worst = max(seen, key=lambda layer: float(layer["keys"]["int8"]), default=None)
    return worst if worst is not None and worst["keys"]["int8"] > found["quantisation"]["loss_limit"] else None


def _spikes(found: dict[str, Any], lang: str) -> str:
    texts, spikes = TEXTS[lang], found["bias_spikes"]
    if not spikes:
        return texts["no_spikes"]
    top = spikes[0]
    names = {key: top[key] for key in ("layer", "projection", "head", "channel")}
    return texts["spikes"].format(count=found["bias_spikes_found"], number=bias_text(top, ",.0f", lang), **names)


def render(found: dict[str, Any], console: Console, lang: str = "en") -> None:
    """Prints the tightest site of each layer, what it means, and the verdict."""
    texts = TEXTS[lang]
    table = Table(*(texts[f"column_{name}"] for name in ("layer", "site", "largest", "bits", "bound", "where")))
    for site in tightest_by_layer(found):
        bits, past = site["headroom_bits"], site in passing(found)
        where = place_name({**site, "layer": None}, lang).partition(texts["comma"])[2]
        table.add_row(
            "" if site["layer"] is None else str(site["layer"]),
            site_name(site["site"], lang),
            number(site["largest"], lang),
            texts["not_finite"] if bits is None else f"{bits:+.1f}",
            "" if site["bound"] is None else f"{site['bound']:,.4g}",
            Text(where),  # no markup, whatever a token says
            style="red" if past else None,
        )
    console.print(table)
    for sentence in consequences(found, lang):
        console.print(sentence, highlight=False, markup=False)
    console.print(verdict(found, lang), highlight=False, markup=False)


def tightest_by_layer(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each layer, and for the ends, the site with the least headroom."""
    best: dict[tuple[int | None, str], dict[str, Any]] = {}
    for site in found["sites"]:
        key = (site["layer"], "" if site["layer"] is not None else site["site"])
        bits = -1e9 if site["headroom_bits"] is None else site["headroom_bits"]
        if key not in best or bits < (-1e9 if best[key]["headroom_bits"] is None else best[key]["headroom_bits"]):
            best[key] = site
    return list(best.values())
