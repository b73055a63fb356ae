"""What nodes must be like, by `cluster.checks`: reports and figures in, faults out. Nothing is run here.

A fault names a node. What all nodes share, and what no majority decides, is a problem: another node would not help.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.config.schema import Cluster, NodeChecks

SAME_DISK = 0.01  # free space of one file system, seen from several nodes while others write there
OWN_PARTS = ("join", "gemm", "node all-reduce")  # of training.bandwidth: no other node takes part
GIB, MIB_PER_GIB = 1 << 30, 1024

Report = Mapping[str, Any]


@dataclass(frozen=True)
class NodeFault:
    """A node, and all that is wrong with it."""

    node: str
    reason: str


class Judgement(NamedTuple):
    faults: tuple[NodeFault, ...]
    problem: str | None


class Finding(NamedTuple):
    """What a rule found on a node; on none where `node` is null."""

    node: str | None
    rule: str
    reason: str


def summary(report: Report) -> dict[str, Any]:
    """Of a node, for the event."""
    free = [gpu["free_mib"] for gpu in report["gpus"] if gpu["free_mib"] is not None]
    return {
        "gpus": len(report["gpus"]),
        "driver": "/".join(sorted({gpu["driver"] for gpu in report["gpus"]})) or None,
        "gpu_memory_free_gib": round(min(free) / MIB_PER_GIB, 1) if free else None,
        "infiniband_ports": len(active_ports(report)),
        "disk_free_gib": round(report["free_bytes"] / GIB, 1) if report["free_bytes"] is not None else None,
        "clock_s": round(clock(report), 2),
    }


def clock(report: Report) -> float:
    """Seconds that the node's clock is ahead of ours, less what its row was on the way: nodes begin at different times."""
    return float(report["time"]) - float(report["arrived"])


def active_ports(report: Report) -> list[Mapping[str, str]]:
    return [port for port in report["ports"] if "ACTIVE" in port["state"] and port["link_layer"] == "InfiniBand"]


def judge_reports(reports: Mapping[str, Report], *, nodes: Sequence[str], cluster: Cluster) -> Judgement:
    """`reports`: of read_reports. Without `cluster.checks`: that every node answers, its GPUs, and the folder they share."""
    known = {node: reports[node] for node in nodes if node in reports}
    if not known:
        return Judgement((), "no node answered")
    silent = [Finding(node, "answer", "did not answer") for node in nodes if node not in known]
    found = [*silent, *folder_findings(known)]
    if cluster.gpu:
        found += [finding for node, report in known.items() for finding in gpu_count_findings(node, report, cluster=cluster)]
    if checks := cluster.checks:
        for node, report in known.items():
            found += [*gpu_findings(node, report, checks=checks), *port_findings(node, report, checks=checks)]
        found += [*agreement_findings(known), *clock_findings(known, checks=checks), *disk_findings(known, checks=checks)]
    return blame(found, among=list(known))


def blame(found: Sequence[Finding], *, among: Sequence[str]) -> Judgement:
    """One fault a node. A rule that all of several nodes break speaks against the rule, or against what they share."""
    reasons, problems = dict[str, list[str]](), list[str]()
    for rule in dict.fromkeys(finding.rule for finding in found):
        broken = [finding for finding in found if finding.rule == rule]
        problems += [finding.reason for finding in broken if finding.node is None]
        named = [(finding.node, finding.reason) for finding in broken if finding.node is not None]
        if len(among) > 1 and {node for node, _ in named} == set(among):
            problems.append(f"all {len(among)} nodes, {named[0][0]} for one: {named[0][1]}")
            continue
        for node, reason in named:
            reasons.setdefault(node, []).append(reason)
    faults = tuple(NodeFault(node, "; ".join(dict.fromkeys(why))) for node, why in reasons.items())
    return Judgement(faults, "; ".join(problems) or None)


def folder_findings(reports: Mapping[str, Report]) -> Iterator[Finding]:
    """The folder of the run is one for all."""
    for node, report in reports.items():
        if report["write_error"]:
            yield Finding(node, "write", f"cannot write in the run directory: {report['write_error']}")
    blind = [node for node, report in reports.items() if not report["sees_token"]]
    if len(blind) >= max(2, len(reports) - 1):
        yield Finding(
            None, "see", f"{len(blind)} of {len(reports)} nodes do not see the run directory; it must be shared by all"
        )
    else:
        yield from (Finding(node, "see", "does not see what another node writes in the run directory") for node in blind)


def gpu_count_findings(node: str, report: Report, *, cluster: Cluster) -> Iterator[Finding]:
    found, rule = len(report["gpus"]), f"cluster {cluster.name} has {cluster.gpus_per_node}"
    if report["gpu_error"]:
        yield Finding(node, "gpus", f"{report['gpu_error']}; {rule} GPUs")
    elif found != cluster.gpus_per_node:
        yield Finding(node, "gpus", f"{found} GPUs; {rule}")


def gpu_findings(node: str, report: Report, *, checks: NodeChecks) -> Iterator[Finding]:
    """Memory that somebody holds, errors, and a clock that the hardware itself holds down."""
    for gpu in report["gpus"]:
        name, free = f"GPU {gpu['index']}", gpu["free_mib"]
        least = checks.gpu_memory_free_gib
        if least is not None and free is not None and free < least * MIB_PER_GIB:
            held = f", held by {', '.join(gpu['processes'])}" if gpu["processes"] else ""
            yield Finding(node, "memory", f"{name}: {free / MIB_PER_GIB:.1f} GiB free{held}; checks ask for {least:g}")
        if gpu["ecc_errors"]:
            yield Finding(node, "ecc", f"{name}: {gpu['ecc_errors']} uncorrected memory errors; none is right")
        if gpu["slowed"]:
            yield Finding(node, "slowed", f"{name}: slowed down by its hardware (heat or power); it must not be")


def port_findings(node: str, report: Report, *, checks: NodeChecks) -> Iterator[Finding]:
    wanted, active = checks.infiniband_ports, len(active_ports(report))
    if wanted is None or active >= wanted:
        return
    down = [f"{port['name']} {port['state'] or 'unknown'}" for port in report["ports"] if port not in active_ports(report)]
    which = f" ({', '.join(down)})" if down else ""
    yield Finding(node, "ports", f"{active} active InfiniBand ports{which}; checks ask for {wanted}")


def agreement_findings(reports: Mapping[str, Report]) -> Iterator[Finding]:
    """What must be the same on all nodes, by what most have."""
    for what, key in (("GPU", "name"), ("driver", "driver"), ("largest SM clock", "max_sm_mhz")):
        values = {node: joined(gpu[key] for gpu in report["gpus"]) for node, report in reports.items() if report["gpus"]}
        yield from odd_ones(values, what=what)
    rates = {node: joined(port["rate"] for port in active_ports(report)) for node, report in reports.items()}
    yield from odd_ones(rates, what="InfiniBand rate")


def joined(values: Iterable[Any]) -> str:
    return " and ".join(sorted({str(value) for value in values})) or "none"


def odd_ones(values: Mapping[str, str], *, what: str) -> Iterator[Finding]:
    """Nodes that differ from more than half of them; a problem where no value has that many."""
    ranking = Counter(values.values()).most_common()
    if len(ranking) < 2:
        return
    usual, count = ranking[0]
    if 2 * count <= len(values):
        found = ", ".join(f"{value} on {number}" for value, number in ranking)
        yield Finding(None, what, f"{what}: {found} nodes; all must have the same, and no value has a majority")
        return
    for node, value in values.items():
        if value != usual:
            yield Finding(node, what, f"{what} {value}; {count} of {len(values)} nodes have {usual}")


def clock_findings(reports: Mapping[str, Report], *, checks: NodeChecks) -> Iterator[Finding]:
    limit = checks.clock_skew_s
    if limit is None:
        return
    clocks = {node: clock(report) for node, report in reports.items()}
    middle = statistics.median_low(clocks.values())
    off = {node: value - middle for node, value in clocks.items() if abs(value - middle) > limit}
    if off and 2 * len(off) >= len(clocks):
        spread = max(clocks.values()) - min(clocks.values())
        yield Finding(None, "clock", f"clocks lie up to {spread:.1f} s apart without a majority; checks allow {limit:g}")
        return
    for node, skew in off.items():
        side = "ahead of" if skew > 0 else "behind"
        yield Finding(node, "clock", f"clock {abs(skew):.1f} s {side} the other nodes'; checks allow {limit:g}")


def disk_findings(reports: Mapping[str, Report], *, checks: NodeChecks) -> Iterator[Finding]:
    """Nodes that see the same space see the same file system: then it is the disk that is full."""
    least = checks.disk_free_gib
    free = {node: report["free_bytes"] / GIB for node, report in reports.items() if report["free_bytes"] is not None}
    if least is None or not free or min(free.values()) >= least:
        return
    rule = f"free where the run is written; checks ask for {least:g}"
    if max(free.values()) - min(free.values()) <= SAME_DISK * max(free.values()):
        yield Finding(None, "disk", f"{min(free.values()):.1f} GiB {rule}")
        return
    yield from (Finding(node, "disk", f"{space:.1f} GiB {rule}") for node, space in free.items() if space < least)


def judge_bandwidth(figures: Report, *, nodes: Sequence[str], cluster: Cluster) -> Judgement:
    """`figures`: as training.bandwidth writes them, of all of `nodes`."""
    assert cluster.checks is not None
    found = [*join_findings(figures, nodes=nodes, cluster=cluster), *failure_findings(figures)]
    rows = {node: row for node, row in figures["nodes"].items() if node in nodes}
    found += odd_ones({node: str(row["nccl"]) for node, row in rows.items()}, what="NCCL")
    slow = [finding for node, row in rows.items() for finding in slow_findings(node, row, checks=cluster.checks)]
    found += slow or whole_job_findings(figures, checks=cluster.checks)
    return blame(found, among=nodes)


def join_findings(figures: Report, *, nodes: Sequence[str], cluster: Cluster) -> Iterator[Finding]:
    for node in nodes:
        ranks = figures["nodes"].get(node, {}).get("ranks", 0)
        if ranks != cluster.gpus_per_node:
            yield Finding(
                node, "join", f"{ranks} ranks came to be measured; cluster {cluster.name} has {cluster.gpus_per_node}"
            )


def failure_findings(figures: Report) -> Iterator[Finding]:
    """A part that only concerns the node itself is its fault; between nodes, either end may be. The first node's own failure
    is the one that nobody could write down."""
    failed = figures["failed"]
    if failed is None and figures["at"]:
        failed = {"part": figures["at"], "nodes": {next(iter(figures["nodes"])): "its first rank ended before it was done"}}
    for node, reason in failed["nodes"].items() if failed else ():
        text = f"{failed['part']} failed: {reason}"
        yield Finding(node, "failed", text) if failed["part"] in OWN_PARTS else Finding(None, "failed", f"{node}: {text}")


def slow_findings(node: str, row: Report, *, checks: NodeChecks) -> Iterator[Finding]:
    rules = (
        ("gemm_tflops", checks.gemm_tflops, "TFLOP/s in BF16 products on its slowest GPU"),
        ("node_all_reduce_gb_per_s", checks.node_all_reduce_gb_per_s, "GB/s in all-reduce among its GPUs"),
        ("pair_all_reduce_gb_per_s", checks.all_reduce_gb_per_s, "GB/s in all-reduce with the better of two other nodes"),
    )
    for name, least, unit in rules:
        if least is not None and row[name] is not None and row[name] < least:
            yield Finding(node, name, f"{row[name]:.3g} {unit}; checks ask for {least:g}")


def whole_job_findings(figures: Report, *, checks: NodeChecks) -> Iterator[Finding]:
    """Where every pair is fast enough, it is the network between them."""
    least, found = checks.all_reduce_gb_per_s, figures["all_reduce_gb_per_s"]
    if least is not None and found is not None and found < least:
        reason = (
            f"{found:.3g} GB/s in all-reduce among all {len(figures['nodes'])} nodes, none of which is slow; checks ask for"
        )
        yield Finding(None, "all_reduce_gb_per_s", f"{reason} {least:g}")
