"""The result of a scan in sentences of English or Chinese, and as a table with sentences below it."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..patches.range_plan import FLOAT16_MAX
from ..translations import SCAN_TEXTS as TEXTS
from ..translations import number_text
from .result import BiasSpike, CacheLosses, FirstNonfinite, MeasuredSite, ScanResult, Where, headroom

LANGUAGES = tuple(TEXTS)


def site_name(site: str, lang: str = "en") -> str:
    """A site as it is called in a sentence."""
    return TEXTS[lang][f"site_{site}"]


def bias_text(spike: BiasSpike, form: str, lang: str = "en") -> str:
    """A spike's bias. One beyond float16's range is infinite there, and None in the result."""
    return TEXTS[lang]["not_finite"] if spike.bias is None else format(spike.bias, form)


def token_name(token_id: int | None, token: str | None) -> str:
    """A token as `text`, its spaces made visible, or by its id."""
    if token is None:
        return f"#{token_id}"
    shown = (token if token.isprintable() else repr(token)[1:-1]).replace(" ", "␣")
    return f"“{shown}”" if "`" in shown else f"`{shown}`"


def site_in_layer(found: MeasuredSite | FirstNonfinite, lang: str = "en") -> str:
    """A site with its layer: "layer 3, down_proj"."""
    texts = TEXTS[lang]
    layer = [] if found.layer is None else [texts["layer"].format(layer=found.layer)]
    return texts["comma"].join([*layer, site_name(found.site, lang)])


def where_text(where: Where | None, lang: str = "en") -> str:
    """Where in a site a number was: "channel 458, token 0 `<|im_start|>`"."""
    if where is None:
        return ""
    texts = TEXTS[lang]
    parts = [] if where.head is None else [texts["head"].format(head=where.head)]
    parts.append(texts["channel"].format(channel=where.channel))
    parts.append(texts["token"].format(position=where.position, token=token_name(where.token_id, where.token)))
    if where.key_position is not None:
        key = token_name(where.key_token_id, where.key_token)
        parts.append(texts["key_token"].format(position=where.key_position, token=key))
    return texts["comma"].join(parts)


def place_name(found: MeasuredSite | FirstNonfinite, lang: str = "en") -> str:
    """A place: "layer 3, down_proj, channel 458, token 0 `<|im_start|>`"."""
    return TEXTS[lang]["comma"].join(filter(None, (site_in_layer(found, lang), where_text(found.where, lang))))


def verdict(found: ScanResult, lang: str = "en") -> str:
    """The scan in one sentence. A second one says so if the checkpoint loads as something else."""
    foreign = found.foreign_code
    return _outcome(found, lang) + ("" if foreign is None else TEXTS[lang]["verdict_foreign"].format(name=foreign))


def _outcome(found: ScanResult, lang: str) -> str:
    texts, first = TEXTS[lang], found.first_nonfinite
    what = texts["what_fixed" if found.settings.fixed else "what_stock"].format(attention=found.settings.attention)
    if first is not None:
        key = "verdict_broken" if first.exact else "verdict_lost"
        return texts[key].format(what=what, place=place_name(first, lang), number=number_text(first.largest, lang))
    tight = found.tightest
    return texts["verdict_finite"].format(
        what=what,
        prompts=len(found.prompts),
        tokens=sum(prompt.tokens for prompt in found.prompts),
        number=number_text(tight.largest, lang),
        place=place_name(tight, lang),
        bits=f"{tight.headroom_bits:.1f}",
    )


def consequences(found: ScanResult, lang: str = "en") -> list[str]:
    """Sentences beyond the verdict: other sites past the limit, fused attention, quantisation, the proof."""
    return [*_past_limit(found, lang), *_outliers(found, lang), *_lost_by_int8(found, lang)]


def _past_limit(found: ScanResult, lang: str) -> list[str]:
    texts, over, sentences = TEXTS[lang], found.past_limit, []
    if over:
        layers = len({site.layer for site in over})
        sentences.append(texts["past_limit"].format(sites=len(over), layers=layers, limit=f"{FLOAT16_MAX:,.0f}"))
        if all(site.site == "raw_scores" for site in over):
            sentences.append(texts["scores_only"])
    if found.first_nonfinite is not None and found.certificate.proven:
        sentences.append(texts["remedy"])
    return sentences


def _outliers(found: ScanResult, lang: str) -> list[str]:
    texts, sentences = TEXTS[lang], []
    if found.massive_activations:
        top = found.massive_activations[0]
        sentences.append(
            texts["massive"].format(
                count=len(found.massive_activations),
                channel=top.where.channel,
                number=number_text(top.magnitude, lang),
                layer=top.layer,
            )
        )
    return [*sentences, spikes_text(found, lang)]


def spikes_text(found: ScanResult, lang: str = "en") -> str:
    """How many spikes the biases have, and where the largest is."""
    if not found.bias_spikes:
        return TEXTS[lang]["no_spikes"]
    top = found.bias_spikes[0]
    return TEXTS[lang]["spikes"].format(
        count=found.bias_spikes_found,
        number=bias_text(top, ",.0f", lang),
        layer=top.layer,
        projection=top.projection,
        head=top.head,
        channel=top.channel,
    )


def _lost_by_int8(found: ScanResult, lang: str) -> list[str]:
    texts, lost, sentences = TEXTS[lang], found.quantisation, []
    worst = _worst_cache(lost.cache)
    if worst is not None and worst.keys is not None and worst.keys.int8 > lost.loss_limit:
        sentences.append(texts["cache_keys"].format(loss=f"{worst.keys.int8:.0%}", layer=worst.layer))
    limit, layers = f"{lost.loss_limit:.0%}", texts["comma"].join(map(str, lost.keep_16_bit))
    sentences.append(texts["keep_layers" if lost.keep_16_bit else "keep_none"].format(layers=layers, limit=limit))
    return sentences


def _worst_cache(cache: tuple[CacheLosses, ...]) -> CacheLosses | None:
    """The layer whose keys lose most in int8."""
    return max(cache, key=lambda layer: -1.0 if layer.keys is None else layer.keys.int8, default=None)


def rendered(found: ScanResult, lang: str = "en") -> Group:
    """The tightest site of each layer as a table, sentences about it, and the verdict, for rich."""
    texts = TEXTS[lang]
    table = Table(*(texts[f"column_{name}"] for name in ("layer", "site", "largest", "bits", "bound", "where")))
    for site in tightest_by_layer(found):
        table.add_row(
            "" if site.layer is None else str(site.layer),
            site_name(site.site, lang),
            number_text(site.largest, lang),
            texts["not_finite"] if site.headroom_bits is None else f"{site.headroom_bits:+.1f}",
            "" if site.bound is None else number_text(site.bound, lang),
            Text(where_text(site.where, lang)),  # no markup, whatever a token says
            style="red" if site.past_limit else None,
        )
    return Group(table, *map(Text, consequences(found, lang)), Text(verdict(found, lang)))


def tightest_by_layer(found: ScanResult) -> list[MeasuredSite]:
    """For each layer, and for each of the ends, the site with the least headroom."""
    best: dict[tuple[int | None, str], MeasuredSite] = {}
    for site in found.sites:
        key = (site.layer, "" if site.layer is not None else site.site)
        if key not in best or headroom(site) < headroom(best[key]):
            best[key] = site
    return list(best.values())
