"""A comparison in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from launcher.config.validate import shown
from launcher.report.compare import Comparison, Measured
from launcher.report.compare_document import describe_fit, describe_where
from launcher.report.compare_groups import differences_of
from launcher.report.compare_stats import Difference, Verdict, mean_of, spread_of
from launcher.report.compare_tasks import caution, cell, task_scores
from launcher.report.format import MISSING, format_count, format_number
from launcher.report.mixture_fit import MixtureFit

LOSS_DIGITS = 4
# Of differing paths, the rest is in out=json and on the page.
MOST_COLUMNS = 8
MAX_WIDTH = 10_000


def print_comparison(comparison: Comparison, *, console: Console | None = None) -> None:
    console = console or Console(highlight=False, markup=False, emoji=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    say(describe_where(comparison))
    say(f"shared mean: held-out loss of {', '.join(comparison.sources)}, equal weights, nats per token\n")
    show(losses_table(comparison.groups, verdict=comparison.verdict), console=console)
    say(f"\n{comparison.verdict.text}")
    if comparison.flops is not None and comparison.flops_verdict is not None:
        say(f"\nat equal FLOPs, {comparison.flops:.3g} (causal)\n")
        show(losses_table(comparison.at_flops, verdict=comparison.flops_verdict), console=console)
        say(f"\n{comparison.flops_verdict.text}")
    say("\nby source; own mean: by each run's own shares, which says nothing between mixtures\n")
    show(sources_table(comparison.groups), console=console)
    print_scores(comparison, console=console)
    print_differences(comparison, console=console)
    say(f"\n{describe_fit(comparison.fit)}")
    if not isinstance(comparison.fit, str) and comparison.fit.proposal is not None:
        show(shares_table(comparison, fit=comparison.fit), console=console)
    for line in comparison.notes:
        say(f"note: {line}")


def show(table: Table, *, console: Console) -> None:
    """As wide as it is: a number cut, or folded over two lines, is not read."""
    needed = console.measure(table, options=console.options.update(max_width=MAX_WIDTH)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def losses_table(groups: Sequence[Measured], *, verdict: Verdict) -> Table:
    """A row a group, the lowest first; ± is the standard deviation between seeds."""
    table = _table(("group", "seeds", "tokens", "shared mean", "above the best"))
    found = {each.label: each for each in verdict.differences}
    for each in groups:
        mean = format_spread(mean_of(each.shared), spread=spread_of(each.shared))
        read = format_count(each.readings[0].tokens)
        table.add_row(each.label, str(len(each.shared)), read, mean, format_difference(found.get(each.label)))
    return table


def sources_table(groups: Sequence[Measured]) -> Table:
    """Mean held-out loss of each source."""
    table = _table(("group", *groups[0].losses(), "own mean"))
    for each in groups:
        losses = [format_number(value, digits=LOSS_DIGITS) for value in each.losses().values()]
        table.add_row(each.label, *losses, own_mean(each))
    return table


def own_mean(measured: Measured) -> str:
    """The total by the runs' own shares, which no two mixtures have alike."""
    values = [reading.own for reading in measured.readings if reading.own is not None]
    return format_number(sum(values) / len(values), digits=LOSS_DIGITS) if values else MISSING


def format_spread(mean: float, *, spread: float | None) -> str:
    told = format_number(mean, digits=LOSS_DIGITS)
    return told if spread is None else f"{told} ± {format_number(spread, digits=LOSS_DIGITS)}"


def format_difference(found: Difference | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:.4f} ± ?"
    return f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})"


def print_scores(comparison: Comparison, *, console: Console) -> None:
    """A row a score of a task, a column a group; nothing where no export was scored."""
    found = task_scores(comparison.groups, stage=comparison.stage)
    if not found:
        return
    labels = [each.label for each in comparison.groups]
    table = _table(("task", *labels, "asked"))
    for (name, told), row in found.items():
        table.add_row(name, *(cell(row, label) for label in labels), told)
    told = caution(found)
    console.print("\ntasks, as `phidias eval` scored the exports" + (f"; {told}" if told else ""), soft_wrap=True)
    show(table, console=console)


def print_differences(comparison: Comparison, *, console: Console) -> None:
    """A row a group, a column a path that differs."""
    found = differences_of([each.group for each in comparison.groups])
    if not found:
        return
    prefix, names = short_paths(list(found))
    table = _table(("group", *names[:MOST_COLUMNS]))
    for each in comparison.groups:
        table.add_row(each.label, *(shown(row[each.label]).strip("'") for row in list(found.values())[:MOST_COLUMNS]))
    console.print(f"\nconfigs differ in {prefix}*" if prefix else "\nconfigs differ in", soft_wrap=True)
    show(table, console=console)
    if len(names) > MOST_COLUMNS:
        console.print(f"and in {len(names) - MOST_COLUMNS} more: {', '.join(names[MOST_COLUMNS:])}", soft_wrap=True)


def short_paths(paths: Sequence[str]) -> tuple[str, list[str]]:
    """What all paths begin with, whole words, and what is left of each."""
    split = [path.split(".") for path in paths]
    common = 0
    while all(len(words) > common + 1 and words[common] == split[0][common] for words in split):
        common += 1
    return "".join(f"{word}." for word in split[0][:common]), [".".join(words[common:]) for words in split]


def shares_table(comparison: Comparison, *, fit: MixtureFit) -> Table:
    """The proposed shares beside those of the best mixture that was tried and the range of all."""
    proposal = fit.proposal
    assert proposal is not None  # the caller shows it only then
    best = comparison.groups[0]
    read: Mapping[str, float] = best.group.shares or {}
    table = _table(("source", "proposed", best.label, "tried from", "to"))
    for name, share in proposal.shares.items():
        low, high = proposal.box[name]
        table.add_row(name, *(f"{value:.4f}" for value in (share, read.get(name, 0.0), low, high)))
    return table
