"""data.html: what the sources of a data folder hold, and what became of the rows that are not in them. One file, no network, no
scripts."""

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from data_prep.manifest import Manifest, Statistics
from launcher.plan.page import short

FIRST_BIN, LAST_BIN = 4, 21  # 16 tokens, 4M tokens: what lies beyond is counted into these
LONG = (13, 14)  # 2^13, 2^14 tokens
WIDTH, HEIGHT, FOOT = 760, 190, 24
MOST_BARS = 12


def render_data_page(manifests: Mapping[str, Manifest], *, place: str) -> str:
    """The page as text."""
    return Template(_asset("data_page.html")).substitute(
        title="Prepared data",
        subtitle=escape(place),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        css=_asset("page.css"),
        cards=_cards(list(manifests.values())),
        sources=_sources_table(manifests),
        details="".join(_details(name, manifest) for name, manifest in manifests.items() if manifest.statistics),
    )


def _asset(name: str) -> str:
    return (files("launcher.report") / name).read_text(encoding="utf-8")


def _cards(manifests: Sequence[Manifest]) -> str:
    tokens = sum(manifest.train.tokens for manifest in manifests)
    documents = sum(manifest.train.documents for manifest in manifests)
    text = sum(manifest.text_bytes for manifest in manifests)
    every = tokens + sum(manifest.held_out.tokens for manifest in manifests)
    lost = sum(_lost(manifest) for manifest in manifests)
    cards = [
        ("Tokens to train on", short(tokens), f"{sum(manifest.held_out.tokens for manifest in manifests):,} held out"),
        ("Documents", short(documents), f"{tokens / max(1, documents):,.0f} tokens each, on average"),
        ("Text", f"{short(text)}B", f"{text / max(1, every):.2f} bytes a token"),
        ("Rows left out", short(lost), "dropped by steps, malformed or empty"),
    ]
    return "".join(_card(*card) for card in cards)


def _card(label: str, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    inner = "".join(f'<div class="{kind}">{words}</div>' for kind, words in parts)
    return f'<div class="card">{inner}</div>'


def _lost(manifest: Manifest) -> int:
    dropped = manifest.statistics.dropped.values() if manifest.statistics else ()
    return manifest.rejected_rows + manifest.empty_documents + sum(sum(row.values()) for row in dropped)


def _sources_table(manifests: Mapping[str, Manifest]) -> str:
    heads = ("documents", "tokens", "held out", "bytes/token", "8K and over", "16K and over", "left out", "shards")
    rows = [[name, *_source_row(manifest)] for name, manifest in manifests.items()]
    return _table(("source", *heads), rows=rows)


def _source_row(manifest: Manifest) -> list[str]:
    every = manifest.train.tokens + manifest.held_out.tokens
    long = [_from_bin(manifest.statistics, least) for least in LONG] if manifest.statistics else ["–", "–"]
    return [
        f"{manifest.train.documents:,}",
        short(manifest.train.tokens),
        short(manifest.held_out.tokens),
        f"{manifest.text_bytes / every:.2f}" if manifest.text_bytes and every else "–",
        *long,
        f"{_lost(manifest):,}",
        f"{len(manifest.train.shards) + len(manifest.held_out.shards):,}",
    ]


def _from_bin(statistics: Statistics, least: int) -> str:
    """Tokens of documents of 2^least tokens and more, and their share."""
    tokens, every = sum(statistics.length_tokens[least:]), sum(statistics.length_tokens)
    return f"{short(tokens)} ({tokens / max(1, every):.1%})"


def _details(name: str, manifest: Manifest) -> str:
    statistics = manifest.statistics
    assert statistics  # the caller asks only of those that have some
    parts = [f'<figure class="wide"><figcaption>{LEGEND}</figcaption>{_histogram(statistics)}</figure>']
    if left_out := _left_out(manifest, statistics=statistics):
        parts.append(_figure(f"Rows left out, of {statistics.rows:,}", body=_bars(left_out, of=statistics.rows)))
    if statistics.kept:
        parts.append(_figure("Rows kept by each step", body=_bars(statistics.kept.items(), of=statistics.rows)))
    for what, row in statistics.found.items():
        counts = sorted(row.items(), key=_most)[:MOST_BARS]
        parts.append(_figure(f"{escape(what)}, of documents kept", body=_bars(counts, of=sum(row.values()))))
    return f'<section class="source"><h2>{escape(name)}</h2><div class="columns">{"".join(parts)}</div></section>'


def _left_out(manifest: Manifest, *, statistics: Statistics) -> list[tuple[str, int]]:
    """Why, and how many rows."""
    dropped = statistics.dropped.items()
    rows = [(f"{step}: {reason}", count) for step, row in dropped for reason, count in sorted(row.items(), key=_most)]
    others = (("malformed", manifest.rejected_rows), ("empty", manifest.empty_documents))
    return [*rows, *((what, count) for what, count in others if count)]


def _figure(caption: str, *, body: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{body}</figure>"


def _most(item: tuple[str, int]) -> int:
    return -item[1]


LEGEND = (
    '<span class="key tokens"></span>share of the tokens<span class="key documents"></span>share of the documents, '
    "by the length of the document in tokens"
)


def _histogram(statistics: Statistics) -> str:
    """Tokens as bars, documents as steps over them; both as shares, so that both fit one axis."""
    tokens, documents = _shares(statistics.length_tokens), _shares(statistics.length_documents)
    step, room = WIDTH / len(tokens), HEIGHT - FOOT
    scale = room / max(*tokens, *documents, 0.01)
    bars = [_bar(index, step=step, room=room, share=share, scale=scale) for index, share in enumerate(tokens)]
    outline = [(x, room - share * scale) for index, share in enumerate(documents) for x in (index * step, (index + 1) * step)]
    borders = [
        f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{room}"/>' for x in ((b - FIRST_BIN) * step for b in LONG)
    ]
    return (
        f'<svg viewBox="0 -6 {WIDTH} {HEIGHT + 6}" role="img" aria-label="Lengths of documents">'
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{room}" y2="{room}"/>{"".join(bars)}{"".join(borders)}'
        f'<polyline class="bar-documents" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in outline)}"/></svg>'
    )


def _bar(index: int, *, step: float, room: float, share: float, scale: float) -> str:
    left, high, label = index * step, share * scale, _bin_name(index + FIRST_BIN)
    place = f'x="{left + 2:.1f}" y="{room - high:.1f}" width="{step - 4:.1f}" height="{high:.1f}"'
    bar = f'<rect class="bar-tokens" rx="2" {place}><title>from {label} tokens: {share:.1%} of the tokens</title></rect>'
    return bar + (f'<text x="{left:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>' if index else "")


def _shares(counts: Sequence[int]) -> list[float]:
    """Of the bins that are drawn; the first and last take what lies beyond them."""
    inner = [sum(counts[: FIRST_BIN + 1]), *counts[FIRST_BIN + 1 : LAST_BIN], sum(counts[LAST_BIN:])]
    return [count / max(1, sum(counts)) for count in inner]


def _bin_name(place: int) -> str:
    size = 2**place
    return f"{size >> 20}M" if size >= 1 << 20 else f"{size >> 10}K" if size >= 1 << 10 else str(size)


def _bars(counts: Iterable[tuple[str, int]], *, of: int) -> str:
    shares = [(name, count, count / max(1, of)) for name, count in counts]
    rows = [
        [escape(name), f"{count:,}", f"{share:.1%}", f'<span class="bar"><span style="width:{share:.2%}"></span></span>']
        for name, count, share in shares
    ]
    return _table(("", "rows", "share", ""), rows=rows, escaped=True)


def _table(heads: Sequence[str], *, rows: Iterable[Sequence[str]], escaped: bool = False) -> str:
    keep = (lambda cell: cell) if escaped else escape
    head = "".join(f'<th class="{"" if index == 0 else "number"}">{escape(name)}</th>' for index, name in enumerate(heads))
    body = "".join(f"<tr>{''.join(_cell(keep(cell), index=index) for index, cell in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(content: str, *, index: int) -> str:
    kind = "number" if index and not content.startswith("<") else ""
    return f'<td class="{kind}">{content}</td>'
