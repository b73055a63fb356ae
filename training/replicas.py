"""Silent corruption: weights that data-parallel ranks should hold alike, and a step that is computed twice.

The time to compare weights is between backward and update: all gathers have ended then, and the weights are those that were
computed with. Later, the distributed optimizer gathers them anew from one owner each, over whatever had been damaged.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from training.initialize import global_parameters
from training.parallel import Rank

# Words are added up in so many columns: a prime, so that blocks that changed places show.
COLUMNS = 1021
CHUNK_BYTES = 4 << 20  # where bytes have to be widened
# Odd numbers without a pattern; what is multiplied by one can be told from its product.
ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
MAX_NAMED = 5
# Where transformer-engine keeps the bytes of an FP8 parameter, by recipe.
FP8_BYTES = ("_data", "_rowwise_data")


@dataclass(frozen=True)
class Disagreement:
    """Ranks that should hold the same weights and do not. `odd`: those that hold others than most; nobody where no value of any
    parameter has a majority. `parameters`: the first few that differ."""

    replicas: tuple[int, ...]
    odd: tuple[int, ...]
    parameters: tuple[str, ...]
    num_parameters: int

    def __str__(self) -> str:
        odd = " and ".join(map(str, self.odd)) or "one of them, which cannot be told,"
        names = ", ".join(self.parameters) + (", ..." if self.num_parameters > len(self.parameters) else "")
        which = f"of ranks {', '.join(map(str, self.replicas))}, {odd} differ"
        return f"{which} in {self.num_parameters} parameters: {names}"


@torch.no_grad()
def parameter_digest(chunks: Sequence[DistributedDataParallel]) -> torch.Tensor:
    """A number for the bits of each parameter of this rank, [P] int64, computed where they are. One flipped bit shows."""
    return digest([parameter for _, parameter in named_parameters(chunks)])


def named_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Under their names in the whole model; in the same order on all replicas."""
    for chunk in unwrap_model(list(chunks)):
        yield from global_parameters(chunk)


def digest(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number for the bits of each, [P] int64. Their columns are mixed before they are added: or two flips of the highest bit
    would cancel, as all sums wrap around."""
    columns_PC = torch.stack([columns(tensor) for tensor in tensors])
    columns_PC += ODD[0] * torch.arange(1, COLUMNS + 1, device=columns_PC.device)
    for odd in ODD[1:]:  # other columns, other products: nothing of what differs is lost
        columns_PC = (columns_PC ^ (columns_PC >> 31 & 2**33 - 1)) * odd
    return (columns_PC ^ (columns_PC >> 32 & 2**32 - 1)).sum(dim=1)


def columns(tensor: torch.Tensor) -> torch.Tensor:
    """Sums of a tensor's 8-byte words, [COLUMNS] int64; a changed word changes its own. It is not copied, but for what is no
    whole word, a piece at a time."""
    tensor = next((getattr(tensor, name) for name in FP8_BYTES if getattr(tensor, name, None) is not None), tensor)
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    whole = 0 if raw.storage_offset() % 8 else raw.numel() // 8 * 8
    found = torch.zeros(COLUMNS, dtype=torch.int64, device=raw.device)
    if whole:
        add_up(raw[:whole].view(torch.int64), into=found, weight=1)
    pieces = raw[whole:].split(CHUNK_BYTES) if whole < len(raw) else ()
    for number, piece in enumerate(pieces, 1):
        add_up(piece.long(), into=found, weight=2 * number + 1)
    return found


def add_up(words: torch.Tensor, *, into: torch.Tensor, weight: int) -> None:
    """Adds the words to [COLUMNS] sums, one to each in turn, times an odd weight."""
    rows = len(words) // COLUMNS
    if rows:
        into.add_(words[: rows * COLUMNS].view(rows, COLUMNS).sum(dim=0), alpha=weight)
    if len(left := words[rows * COLUMNS :]):
        into[: len(left)].add_(left, alpha=weight)


def compare_replicas(chunks: Sequence[DistributedDataParallel], rank: Rank) -> list[Disagreement]:
    """Compares the weights of the ranks that should hold the same, over data and context parallelism. Collective over the
    world; every rank gets the same answer, empty where all is well."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return []
    own = parameter_digest(chunks).to(rank.device)
    # The greatest of ~x is ~ of the least x.
    extremes = torch.stack([own, ~own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differs = extremes[0] != ~extremes[1]
    if not ranks_where(bool(differs.any()), rank=rank):
        return []
    found = find_odd(chunks, own=own, differs=differs, group=group) if differs.any() else None
    answers: list[Any] = [None] * rank.world_size
    dist.all_gather_object(answers, found)
    return [answer for index, answer in enumerate(answers) if answer and index == answer.replicas[0]]


def find_odd(
    chunks: Sequence[DistributedDataParallel], *, own: torch.Tensor, differs: torch.Tensor, group: dist.ProcessGroup
) -> Disagreement:
    """Who holds what most do not, of the parameters that differ. Collective over the group."""
    replicas = tuple(dist.get_process_group_ranks(group))
    gathered = [torch.empty_like(own) for _ in replicas]
    dist.all_gather(gathered, own, group=group)
    where = differs.nonzero().flatten().tolist()
    odd: set[int] = set()
    for held in torch.stack(gathered)[:, where].T.tolist():
        odd |= minority(held, replicas=replicas)
    names = [name for name, _ in named_parameters(chunks)]
    return Disagreement(replicas, tuple(sorted(odd)), tuple(names[index] for index in where[:MAX_NAMED]), len(where))


def minority(held: Sequence[int], *, replicas: Sequence[int]) -> set[int]:
    """Ranks that hold another value than more than half of them do; nobody where no value is held by so many."""
    value, count = Counter(held).most_common(1)[0]
    if count * 2 <= len(held):
        return set()
    return {rank for rank, own in zip(replicas, held, strict=True) if own != value}


def ranks_where(flag: bool, *, rank: Rank) -> tuple[int, ...]:
    """The ranks of the world on which it is so, on every rank."""
    flags = torch.zeros(rank.world_size, dtype=torch.int32, device=rank.device)
    flags[rank.rank] = int(flag)
    dist.all_reduce(flags)
    return tuple(flags.nonzero().flatten().tolist())


def same_result(first: Sequence[float | None], again: Sequence[float | None], *, tolerance: float) -> bool:
    """Whether a step computed twice gave the same loss and gradient norm (and what else is handed in): each within `tolerance`
    of itself, 0 for equal. Twice NaN, or twice the same infinity, is the same."""
    return all(_same(one, other, tolerance) for one, other in zip(first, again, strict=True))


def _same(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    if not (math.isfinite(one) and math.isfinite(other)):
        return repr(one) == repr(other)
    return abs(one - other) <= tolerance * max(abs(one), abs(other))
