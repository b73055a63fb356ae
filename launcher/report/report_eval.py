"""What `phidias eval` measured of a run's exports: whether they are the trained model, and what they make of long text."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from launcher.report.format import format_count, format_number, format_percent
from launcher.report.report_tasks import evaluations, read_evaluation, tasks_table
from launcher.report.tables import table
from launcher.rundir.paths import RunDir

Section = Mapping[str, Any]
RISES = "rises"


def eval_section(run: RunDir, *, stages: tuple[str, ...]) -> str:
    """A whole section; empty where nothing was evaluated."""
    parts = [part for name in stages if (found := evaluations(run, stage=name)) for part in of_stages_exports(run, name, found)]
    if not parts:
        return ""
    lead = "Through transformers alone, on the exported folder."
    return f'<section><h2>What was exported</h2><p class="lead">{lead}</p>{"".join(parts)}</section>'


def of_stages_exports(run: RunDir, stage: str, found: list[Section]) -> Iterator[str]:
    """The stage's own export, or else the newest of its checkpoints that was measured; then tasks, of all that were."""
    yield from of_stage(stage, read_evaluation(run, name=stage) or found[-1])
    yield tasks_table(found)


def of_stage(name: str, found: Section) -> Iterator[str]:
    held_out, long = found["held_out"], found.get("long_context")
    verdict = {True: "agrees with", False: "does NOT agree with", None: "was not compared with"}[held_out.get("agrees")]
    loss = format_number(held_out["mixture"].get("loss"))
    yield f"<h3>{escape(name)}, step {found['step']:,}</h3>"
    yield f"<p>Held-out loss {loss}: {verdict} what the run measured.</p>"
    if not long:
        return
    if long.get("positions"):
        yield positions_table(long["positions"])
        yield needles_table(long["needles"])
    else:
        yield f"<p>Long text was not measured: {escape(str(long.get('why_not')))}.</p>"


def positions_table(positions: Section) -> str:
    documents = sum(positions["documents"].values())
    told = "rises" if positions["rises"] else "does not rise"
    lead = f"Loss by position in {documents} held-out documents: it {told} past {positions['reference']:,} tokens."
    rows = [position_row(bucket) for bucket in positions["buckets"]]
    return f'<p class="lead">{lead}</p>{table(("positions", "#loss", "#above", "#error", ""), rows=rows, empty="")}'


def position_row(bucket: Section) -> tuple[str, ...]:
    rise, error = bucket["rise"], bucket["rise_error"]
    above, spread = ("", "") if rise is None else (f"{rise:+.3f}", f"{error:.3f}")
    mark = f'<strong class="over">{RISES}</strong>' if bucket["rises"] else ""
    return f"{bucket['begin']:,} to {bucket['end']:,}", format_number(bucket["loss"]), above, spread, mark


def needles_table(needles: list[Section]) -> str:
    """Lengths down, depths across."""
    if not needles:
        return ""
    depths = list(dict.fromkeys(needle["depth"] for needle in needles))
    by_length: dict[int, list[str]] = {}
    for needle in needles:
        part, gain = needle["recalled"] / needle["trials"], f"{needle['gain']:+.1f}"
        by_length.setdefault(needle["length"], []).append(f"{format_percent(part)} <small>{gain}</small>")
    rows = [(f"{format_count(length)} tokens", *cells) for length, cells in by_length.items()]
    lead = "Needle in a haystack, by the text's length and the fact's depth: found, and the nats that the fact is worth."
    return f'<p class="lead">{lead}</p>{table(("", *(f"#{depth:.0%}" for depth in depths)), rows=rows, empty="")}'
