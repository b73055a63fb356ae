"""What the import test runs on several ranks: `python -m tests.training.import_ranks <work dir> <layout> [<layout> ...]`, alone
or under torchrun. A fresh run of each layout (`<layout>:bf16`: in bf16) starts from <work dir>/folder; rank 0 writes the losses
and how many tensors were compared with the weights that the folder was made of, cut as Megatron's own checkpoint would be."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.training.ranks import Case  # first: it makes CPU ranks possible

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip

from training.parallel import join_world, leave_world


def differing(chunks: list[Any], reference: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Tensors compared, and those that are not the reference's. `reference`: by Megatron's names in a checkpoint, layers
    stacked."""
    held: list[ShardedTensor] = []
    for chunk in unwrap_model(chunks):
        state = chunk.sharded_state_dict()
        apply_factories(state)
        held += [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    wrong = [row.key for row in held if not torch.equal(row.data, reference[row.key][row.global_slice()].to(row.data.dtype))]
    return len(held), wrong


def check(work: Path, name: str, *, device: torch.device, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    layout, _, dtype = name.partition(":")
    start, precision = {"init_from": f"{work}/folder"}, {"params_dtype": dtype or "fp32"}
    case = Case(work, layout, run_name=f"import_{name}", device=device, stage=start, precision=precision)
    compared, wrong = differing(case.trainer.stepper.chunks, reference)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (compared, wrong))
    case.steps(2)
    result = {"loss": [row["loss"] for row in case.rows("train")], "tensors": everyone, "event": case.events()[0]}
    case.close()
    return result


def main() -> None:
    torch.set_num_threads(1)
    work, *names = Path(sys.argv[1]), *sys.argv[2:]
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device, reference = join_world(timeout_s=120), torch.load(work / "reference.pt")
    results = {name: check(work, name, device=device, reference=reference) for name in names}
    if dist.get_rank() == 0:
        (work / f"imported{dist.get_world_size()}.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
