"""What the multi-rank tests run under torchrun: many checks in one world, results as JSON on rank 0.

    torchrun --nproc-per-node N -m tests.training.ranks <work dir> <case> [<case> ...]

A case is `layout:<name>`: train a fresh run in that layout; `masked:<name>`: the same, documents apart and what follows them
not predicted; `packed:<name>`: that again, as packed rows with their documents' borders, as on GPUs; `yarn:<name>[+masked]`:
any of these with scaled angles; `long:<name>`: many steps, to compare with a plain loop; `resume:<name>[:<dtype>]`: stop half
way and go on; `rewind:<name>`: go back and past a batch; `move:<name>:<name>`: save in one layout, go on in another; or
`border:<name>:<name>`: stages that start from another's end; `batch`; `nan`. tests/training/test_ranks.py compares the results.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from training import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from launcher.config.schema import RunConfig  # noqa: E402
from launcher.plan.stage import plan_stage  # noqa: E402
from launcher.rundir.freeze import write_config  # noqa: E402
from launcher.rundir.paths import RunDir  # noqa: E402
from launcher.rundir.records import append_record  # noqa: E402
from tests.training.thd import as_on_gpus  # noqa: E402
from tests.training.tiny import run_config, stage_config  # noqa: E402
from training.errors import NonFiniteError, UnhealthyError  # noqa: E402
from training.health import Finding  # noqa: E402
from training.heartbeat import Heartbeat  # noqa: E402
from training.parallel import initialize_parallel, join_world, leave_world  # noqa: E402
from training.startup import Phases  # noqa: E402
from training.step import Flags  # noqa: E402
from training.trainer import Trainer  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "mbs4": dict(micro_batch_size=4),
    "plain_optimizer": dict(distributed_optimizer=False),
    "recompute": dict(recompute="full"),
    "selective": dict(recompute="selective"),
    "selective_mlp": dict(recompute="selective", recompute_modules=["mlp"]),
    "tp2": dict(tp=2),
    "tp2_sp": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "pp2_first1": dict(pp=2, num_layers_in_first_pipeline_stage=1),
    "pp2_vpp3_ends": dict(pp=2, vpp=3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
    "pp2_vpp2": dict(pp=2, vpp=2),
    "cp2": dict(cp=2),
    "dp2": dict(),
    "dp2_plain": dict(distributed_optimizer=False),
    "dp2_overlap": dict(overlap_grad_reduce=True, overlap_param_gather=True),
    "tp2_pp2_sp": dict(tp=2, pp=2, sequence_parallel=True),
    "cp2_dp2": dict(cp=2),
    "tp2_cp2": dict(tp=2, cp=2, sequence_parallel=True),
    "cp2_mbs2": dict(cp=2, micro_batch_size=2),
    "pp4": dict(pp=4),
    "pp2_vpp2_cp2": dict(pp=2, vpp=2, cp=2),
}
MASKS = dict(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.05)
STEPS, LONG_STEPS = 6, 50


class Case:
    """A run of one layout in this world."""

    def __init__(
        self,
        work: Path,
        name: str,
        *,
        run_name: str,
        device: torch.device,
        left_out: Any = (),
        trace: bool = False,
        before: Any = (),
        **sections: Any,
    ):
        stage = stage_config(layout=LAYOUTS[name], **sections)
        self.config: RunConfig = run_config(work, ranks=dist.get_world_size(), stages=[*before, stage], data={"trace": trace})
        self.run = RunDir(work / "runs" / run_name)
        self.rank = initialize_parallel(self.config.stages[-1].layout, seed=self.config.run.seed, device=device, timeout_s=120)
        if dist.get_rank() == 0:
            self.run.root.mkdir(parents=True, exist_ok=True)
            for first, count in left_out:
                append_record(self.run.events, "skip", stage="pretrain", first_sample=first, num_samples=count)
        dist.barrier()
        stage_cfg = self.config.stages[-1]
        plan = plan_stage(stage_cfg, cluster=self.config.cluster)
        heartbeat = Heartbeat(self.run, stage=stage_cfg.stage.name, rank=self.rank.rank, hang=self.config.monitor.hang)
        self.trainer = Trainer(
            self.run, self.config, stage=stage_cfg, plan=plan, rank=self.rank, heartbeat=heartbeat, phases=Phases()
        )
        self.trainer.restore()

    def steps(self, count: int) -> "Case":
        for _ in range(count):
            self.trainer.train_step(Flags())
        return self

    def rows(self, kind: str) -> list[dict[str, Any]]:
        dist.barrier()
        rows = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run.events.read_text().splitlines()]

    def digest(self) -> list[str]:
        """One digest a rank over weights and moments, byte for byte."""
        hasher = hashlib.sha256()
        for chunk in self.trainer.stepper.chunks:
            for tensor in chunk.state_dict().values():
                if isinstance(tensor, torch.Tensor):
                    hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for group in self.trainer.stepper.optimizer.param_groups:
            for parameter in group["params"]:
                hasher.update(parameter.detach().float().numpy().tobytes())
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, hasher.hexdigest())
        return digests

    def optimizer(self) -> dict[str, Any]:
        """A digest a rank over fp32 weights and moments, their squares summed over all ranks, and the step."""
        parts: dict[str, list[torch.Tensor]] = {"weights": [], "exp_avg": [], "exp_avg_sq": []}
        groups = self.trainer.stepper.optimizer.param_groups
        for part in self.trainer.stepper.optimizer.chained_optimizers:
            for parameter in (one for group in part.param_groups for one in group["params"]):
                parts["weights"].append(parameter.detach())
                for kind in ("exp_avg", "exp_avg_sq"):
                    parts[kind].append(part.state[parameter][kind] if part.state[parameter] else torch.zeros_like(parameter))
        said: dict[str, Any] = {"step": max(group.get("step", 0) for group in groups), "type": str(parts["weights"][0].dtype)}
        for kind, tensors in parts.items():
            total = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
            dist.all_reduce(total)
            bytes_ = b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
            digests: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(digests, hashlib.sha256(bytes_).hexdigest())
            said |= {kind: digests, f"{kind}_sum": float(total)}
        return said

    def started(self) -> dict[str, Any]:
        dist.barrier()
        return [row for row in self.events() if row["kind"] == "stage_start"][-1]

    def close(self) -> None:
        parallel_state.destroy_model_parallel()


def check_layout(
    work: Path, name: str, *, device: torch.device, kind: str = "layout", **sections: dict[str, Any]
) -> dict[str, Any]:
    case = Case(work, name, run_name=f"{kind}_{name}", device=device, **sections).steps(STEPS)
    case.trainer.validate()
    rows, held_out = case.rows("train"), case.rows("validation")[-1]
    case.close()
    return {"rows": rows, "held_out": held_out["loss_by_source"]}


def check_long(work: Path, name: str, *, device: torch.device) -> dict[str, Any]:
    """Many steps, through the end of a source; the first weights and the windows of each batch, for plain.py."""
    stage = {"tokens": float(LONG_STEPS * 8 * 32)}
    case = Case(work, name, run_name=f"long_{name}", device=device, trace=True, stage=stage)
    if name == "one":
        state = case.trainer.stepper.chunks[0].module.state_dict()
        torch.save({key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, work / "initial.pt")
    rows = case.steps(LONG_STEPS).rows("train")
    trace = [json.loads(line) for line in case.run.window_trace.read_text().splitlines()] if name == "one" else []
    case.close()
    return {"rows": rows, "windows": [row["windows"] for row in trace], "work": str(work)}


def check_masked(work: Path, name: str, *, device: torch.device) -> dict[str, Any]:
    return check_layout(work, name, device=device, kind="masked", stage=MASKS)


def check_packed(work: Path, name: str, *, device: torch.device) -> dict[str, Any]:
    with as_on_gpus():
        return check_layout(work, name, device=device, kind="packed", stage=MASKS)


def check_yarn(work: Path, name: str, *, device: torch.device) -> dict[str, Any]:
    """Longer than the angles are made for. `<name>+masked` and `+packed`: documents apart, in either way."""
    name, _, way = name.partition("+")
    with as_on_gpus() if way == "packed" else nullcontext():
        stage = {"rope_scaling": YARN} | (MASKS if way else {})
        return check_layout(work, name, device=device, kind=f"yarn{way}", stage=stage)


def check_resume(work: Path, name: str, dtype: str = "fp32", *, device: torch.device) -> dict[str, Any]:
    """Half way, save, build everything anew, go on; beside a run that never stopped."""
    sections = {"precision": {"params_dtype": dtype}}
    whole = Case(work, name, run_name=f"whole_{name}_{dtype}", device=device, **sections).steps(STEPS)
    expected = whole.digest()
    whole.close()
    first = Case(work, name, run_name=f"halves_{name}_{dtype}", device=device, **sections)
    for _ in range(STEPS // 2):  # from the third on, Megatron writes by the plan of those before
        first.steps(1).trainer.save()
    first.trainer.publish()
    first.close()
    second = Case(work, name, run_name=f"halves_{name}_{dtype}", device=device, **sections)
    start = second.trainer.progress.step
    found = second.steps(STEPS - STEPS // 2).digest()
    losses = [row["loss"] for row in second.rows("train")]
    second.close()
    return {"expected": expected, "found": found, "start": start, "losses": losses}


def check_rewind(work: Path, name: str, *, device: torch.device) -> dict[str, Any]:
    """Back to a checkpoint in the same process, and past the batches that a finding names; beside a run that never took it."""
    clean = Case(work, name, run_name=f"clean_{name}", device=device, left_out=[(16, 16)]).steps(STEPS - 2)
    expected = clean.digest()
    clean.close()
    case = Case(work, name, run_name=f"rewound_{name}", device=device).steps(2)
    case.trainer.save()
    case.steps(2)
    case.trainer.save()  # on its way, from behind what is left out
    finding = Finding("loss_spike", "rewind", 3, value=9.0, limit=5.0, first_sample=16, end_sample=32, text="loss is high")
    case.trainer.leave_out(finding, first=24, end=32, action="rewind")
    found = case.steps(STEPS - 4).digest()
    finished, kinds = case.trainer.is_finished, [row["kind"] for row in case.events()]
    case.trainer.save(is_last=True)
    names = sorted(path.name for path in case.run.checkpoints("pretrain").glob("step_*"))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(case.run.checkpoints("pretrain") / names[0])  # as keep_last does
    dist.barrier()
    try:
        case.trainer.leave_out(finding, first=24, end=32, action="rewind")
        error = None
    except UnhealthyError as raised:
        error = str(raised)
    case.close()
    return {"expected": expected, "found": found, "finished": finished, "kinds": kinds, "names": names, "error": error}


def check_move(work: Path, before: str, after: str, *, device: torch.device) -> dict[str, Any]:
    first = Case(work, before, run_name=f"move_{before}_{after}", device=device).steps(STEPS // 2)
    first.trainer.save(any_layout=True, is_last=True)
    first.close()
    second = Case(work, after, run_name=f"move_{before}_{after}", device=device).steps(STEPS - STEPS // 2)
    losses = [row["loss"] for row in second.rows("train")]
    second.close()
    return {"losses": losses}


def check_border(work: Path, before: str, after: str, *, device: torch.device) -> dict[str, Any]:
    """Stages in bf16 from the end of another: by name in its layout, and from another run in a layout of their own, with its
    moments and without. What the optimizer has, byte for byte, and its sums over all ranks."""
    sections: dict[str, Any] = {"precision": {"params_dtype": "bf16"}}
    first = Case(work, before, run_name="border", device=device, **sections).steps(STEPS)
    found = {"end": first.optimizer()}
    first.trainer.save(any_layout=True, is_last=True)
    expected = first.trainer.opened.ledger(STEPS * 8)
    parent, root = stage_config(layout=LAYOUTS[before], **sections), str(first.run.root)
    if dist.get_rank() == 0:
        write_config(first.run, first.config)
    first.close()
    for name, keep, layout, start in (
        ("kept", True, before, "pretrain"), ("new", False, before, "pretrain"), ("moved", True, after, root)
    ):  # fmt: skip
        stage = {"name": name, "init_from": start, "seq_length": 64, "rotary_base": 50000}
        more = sections | {"stage": stage, "optim": {"keep_moments": keep, "lr": 1e-3, "warmup_tokens": 640.0}}
        run_name, stages = ("border", [parent]) if start == "pretrain" else ("other", [])
        child = Case(work, layout, run_name=run_name, device=device, before=stages, **more)
        found[name] = child.optimizer()
        found[name]["goes_on"] = child.trainer.opened.start_ledger == expected
        child.steps(2)
        found[name] |= {"event": child.started(), "stepped": child.optimizer(), "rows": child.rows("train")[-2:]}
        child.close()
    return found


def check_batch(work: Path, *, device: torch.device) -> dict[str, Any]:
    """Half of the run in batches of 8, then in batches of 4: the samples read and the end."""
    first = Case(work, "one", run_name="batch", device=device).steps(STEPS // 2)
    first.trainer.save(is_last=True)
    first.close()
    second = Case(work, "one", run_name="batch", device=device, stage={"global_batch_size": 4})
    while not second.trainer.is_finished:
        second.trainer.train_step(Flags())
    rows = [{key: row[key] for key in ("step", "samples", "tokens", "tokens_by_source")} for row in second.rows("train")]
    second.close()
    return {"rows": rows}


def check_nan(work: Path, *, device: torch.device) -> dict[str, Any]:
    """A weight turns NaN: the steps must be left out before the optimizer spreads it, until a person is asked."""
    case = Case(work, "one", run_name="nan", device=device).steps(1)
    chunk = case.trainer.stepper.chunks[0]
    before = chunk.module.output_layer.weight.clone()
    chunk.module.decoder.final_layernorm.weight.data[0] = float("nan")
    case.steps(2)  # the budget
    skips = [row for row in case.events() if row["kind"] == "skip"]
    try:
        case.steps(1)
        error = None
    except NonFiniteError as raised:
        error = str(raised)
    unchanged = bool(torch.equal(before, chunk.module.output_layer.weight))
    case.close()
    left_out = [(row["first_sample"], row["num_samples"]) for row in skips]
    return {"error": error, "unchanged": unchanged, "step": case.trainer.progress.step, "left_out": left_out}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "layout": check_layout, "masked": check_masked, "packed": check_packed, "resume": check_resume, "move": check_move,
    "rewind": check_rewind, "batch": check_batch, "nan": check_nan, "long": check_long, "yarn": check_yarn,
    "border": check_border,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    work, *cases = Path(sys.argv[1]), *sys.argv[2:]
    device = join_world(timeout_s=120)
    results = {}
    for case in cases:
        kind, *arguments = case.split(":")
        results[case] = CHECKS[kind](work, *arguments, device=device)
    if dist.get_rank() == 0:
        (work / f"world{dist.get_world_size()}.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
