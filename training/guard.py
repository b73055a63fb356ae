"""What monitor.health finds while a stage trains, and what it leads to. All ranks call the same methods at the same steps,
judge the same numbers and come to the same end."""

import shutil
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from launcher.config.schema import RunConfig
from launcher.rundir.checkpoints import CheckpointError, DiskFullError
from launcher.rundir.paths import RunDir
from launcher.rundir.records import read_records
from training.clocks import Spent
from training.devices import DeviceWatch
from training.errors import CorruptionError, NodeError, NonFiniteError, UnhealthyError
from training.health import Budgets, Finding, StepHealth, count_actions
from training.metrics import Metrics
from training.pace import Slow, StragglerWatch, gather_pace, gather_places, ratios, summary
from training.parallel import Rank
from training.replicas import compare_replicas, ranks_where, same_result
from training.step import Result

GIB = 1 << 30
# The next checkpoint may be larger than the last one.
ROOM = 1.1


class Guard:
    """Of one stage, on one rank. What is found becomes an event of the run, by the first rank."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        *,
        stage: str,
        rank: Rank,
        chunks: Sequence[DistributedDataParallel],
        metrics: Metrics,
    ):
        self.run, self.settings, self.rank, self.metrics, self.chunks = run, config.monitor.health, rank, metrics, chunks
        self.fp8 = config.stage(stage).precision.fp8
        self.steps = StepHealth(self.settings)
        self.stragglers = StragglerWatch(self.settings.straggler)
        self.devices = DeviceWatch(self.settings.device_error, rank.device.index or 0)
        self.places = gather_places(rank)
        self.budgets = Budgets(self._spent(stage))
        # A node that the run is to leave, after a checkpoint.
        self.leaving: NodeError | None = None
        self.failed_in_a_row = 0  # checkpoints
        if self.devices.why_not and rank.device.type == "cuda":
            metrics.event("not_watched", reason=self.devices.why_not)

    def judge(self, result: Result, *, first: int, end: int) -> Finding | None:
        """Of the step on samples [first, end), before its update."""
        return self.steps.judge(loss=result.sums.loss, grad_norm=result.grad_norm, samples=first, next_samples=end)

    def replays(self, finding: Finding | None, *, step: int) -> bool:
        """Whether the step is to be computed again: to know whether hardware or arithmetic made what was found, and every
        so often."""
        if self.fp8 == "delayed":  # its scales come from the steps before: twice is not the same
            return False
        return (finding is not None and finding.action != "note") or self._every_so_often(step)

    def checks_replicas(self, *, step: int, saves: bool) -> bool:
        """Every so often, and where a checkpoint follows: it is to be sound."""
        return saves or self._every_so_often(step)

    def _every_so_often(self, step: int) -> bool:
        every = self.settings.corruption.interval_steps
        return every is not None and step > 0 and step % every == 0

    def compare(self, result: Result, again: Result, *, step: int) -> None:
        """CorruptionError or NodeError where the same batch on the same weights came to something else."""
        tolerance = self.settings.corruption.tolerance
        first, second = (result.sums.loss, result.grad_norm), (again.sums.loss, again.grad_norm)
        # One replica of many hardly moves the sums.
        own = same_result((result.own_loss,), (again.own_loss,), tolerance=tolerance)
        found = ranks_where(not own, rank=self.rank)
        if not found and same_result(first, second, tolerance=tolerance):
            return
        # The loss is the last pipeline stage's: any rank of the replica may be the cause.
        replicas = {self.places[rank].dp_rank for rank in found}
        ranks = [rank for rank, place in enumerate(self.places) if place.dp_rank in replicas]
        text = (
            f"step {step} computed twice: loss {first[0]!r}, then {second[0]!r}; gradient norm {first[1]!r}, then {second[1]!r}"
        )
        self.corrupt(text, ranks=ranks, step=step)

    def check_replicas(self, *, step: int) -> None:
        """CorruptionError or NodeError where data-parallel ranks hold other weights."""
        if found := compare_replicas(self.chunks, self.rank):
            ranks = sorted({rank for one in found for rank in one.odd})
            self.corrupt("; ".join(str(one) for one in found[:3]), ranks=ranks, step=step)

    def corrupt(self, text: str, *, ranks: Sequence[int], step: int) -> None:
        nodes = {self.places[rank].node for rank in ranks}
        node = nodes.pop() if len(nodes) == 1 else None
        rule = self.settings.corruption
        action = self._spend("corruption", rule.action, rule.budget)
        self.metrics.event(
            "corruption", step=step, action=action, reason=text, rank=ranks[0] if len(ranks) == 1 else None, node=node
        )
        if action == "stop":
            raise UnhealthyError(f"silent corruption: {text}")
        if action == "requeue" and node:
            raise NodeError(f"silent corruption: {text}", node=node)
        raise CorruptionError(f"silent corruption: {text}; the run goes on from its last checkpoint")

    def act(self, finding: Finding, *, step: int) -> str:
        """`note`, `skip` or `rewind`; what is to be left to a person is raised."""
        action = self._spend(finding.kind, finding.action, finding.budget)
        self.metrics.event(finding.kind, step=step, **finding.fields | {"action": action})
        if action != "stop":
            return action
        why = f"step {step}: {finding.text}; the update was not taken, and the run goes on from its last checkpoint"
        if finding.action != "stop":
            why += f". {finding.budget} such steps were left out before: monitor.health.{finding.kind}.budget"
        raise (NonFiniteError if finding.kind == "non_finite" else UnhealthyError)(why)

    def look_around(self, *, step: int, step_s: float, spent: Spent, waited_s: float) -> dict[str, Any]:
        """At a metrics row; times are means over the steps since the last one, in seconds. What it says of the ranks."""
        paces = gather_pace(self.rank, places=self.places, spent=spent, wait_s=waited_s, step_s=step_s)
        compared = ratios(paces)
        if slow := self.stragglers.judge(compared):
            self._leave_behind(slow, step=step)
        return summary(paces, compared=compared)

    def _leave_behind(self, found: Sequence[Slow], *, step: int) -> None:
        """The slowest first; one node at a time is left, the others are told."""
        rule, slow = self.settings.straggler, found[0]
        action = self._spend("straggler", rule.action, rule.budget)
        for one in found:
            done = action if one is slow else "note"
            about = {"value": one.ratio, "limit": rule.factor, "rank": one.rank, "node": one.node}
            self.metrics.event("straggler", step=step, action=done, **about)
        text = f"rank {slow.rank} on {slow.node} computes {slow.ratio:.2f} times as long as the others of its pipeline stage"
        if action == "stop":
            raise UnhealthyError(text)
        if action == "requeue":
            self.leaving = NodeError(text, node=slow.node)

    def look_at_own(self, *, step: int, waited_s: float) -> None:
        """What a rank sees alone, after each step: its wait for data, its GPU."""
        rule = self.settings.data_stall
        if waited_s > rule.limit_s:
            self._tell_own("data_stall", step=step, action=rule.action, value=round(waited_s, 1), limit=rule.limit_s)
            if rule.action == "stop":
                raise UnhealthyError(f"step {step}: rank {self.rank.rank} waited {waited_s:.0f} s for its batch")
        if problem := self.devices.poll():
            action = self._of_device()
            self._tell_own("device_error", step=step, action=action, reason=problem)
            if action != "note":
                raise (NodeError if action == "requeue" else UnhealthyError)(f"GPU of rank {self.rank.rank}: {problem}")

    def _of_device(self) -> str:
        """As the budget was when the ranks started: one rank alone sees its GPU."""
        rule = self.settings.device_error
        is_spent = rule.action == "requeue" and not self.budgets.allowed("device_error", rule.budget)
        return "stop" if is_spent else rule.action

    def check_disk(self, *, step: int, last_bytes: int) -> None:
        """Before a checkpoint, of about as many bytes as the last one. DiskFullError where there is too little room, and a
        person is to make some."""
        free, rule = shutil.disk_usage(self.run.root).free, self.settings.disk_low
        wanted = max(rule.free_gib * GIB, ROOM * last_bytes)
        answer = [free < wanted]
        dist.broadcast_object_list(answer, src=0)
        if not answer[0]:
            return
        self.metrics.event("disk_low", step=step, action=rule.action, value=round(free / GIB, 3), limit=round(wanted / GIB, 3))
        if rule.action == "stop":
            raise DiskFullError(
                f"{free / GIB:.2f} GiB are free at {self.run.root}, {wanted / GIB:.2f} wanted before a checkpoint "
                "(monitor.health.disk_low). Fix: free space there, or lower stage.checkpoint.keep_last"
            )

    def checkpoint_failed(self, error: CheckpointError, *, step: int, is_last: bool = False) -> None:
        """Raises it, unless the run is to go on without: as often in a row as the budget says, and not where it is the last
        one."""
        rule = self.settings.checkpoint
        self.failed_in_a_row += 1
        action = "stop" if isinstance(error, DiskFullError) else self._spend("checkpoint", rule.action, rule.budget)
        if action == "note" and (is_last or self.failed_in_a_row > rule.budget):
            action = "restart"
        self.metrics.event("checkpoint_failed", step=step, action=action, error=str(error))
        if action == "stop" and not isinstance(error, DiskFullError):
            raise UnhealthyError(str(error)) from error
        if action != "note":
            raise error

    def _spend(self, kind: str, action: str, budget: int) -> str:
        """The action, or `stop` where it has been taken too often."""
        if action not in ("note", "stop"):
            if not self.budgets.allowed(kind, budget):
                return "stop"
            self.budgets.use(kind)
        return action

    def _spent(self, stage: str) -> dict[str, int]:
        answer = [count_actions(read_records(self.run.events), stage=stage) if self.rank.rank == 0 else {}]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _tell_own(self, kind: str, **fields: Any) -> None:
        self.metrics.own_event(kind, rank=self.rank.rank, node=self.places[self.rank.rank].node, **fields)
