"""The faults: how each strikes a run, what the run has to say of it, and what a person does where it ends by design.

A flipped bit in a shard that turns one token into another and leaves the file's time as it was is none of them: nothing but
`phidias data action=verify` tells it.
"""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from launcher.rundir.exits import ExitClass
from tests.chaos.processes import descendants
from tests.chaos.storm import CHECK_STEPS, PATIENCE, Fault, Storm

START_S = 8.0
SOURCE = "prose"
LIMIT_BYTES = 40_000  # more than the files that every step adds to; less than a part of a checkpoint
EVERY_STEP = ("metrics.jsonl", "events.jsonl", "windows.jsonl")
LOST_BIT = 1 << 15  # beyond the vocabulary


# Processes


def kill_rank(storm: Storm) -> None:
    storm.rank().send(signal.SIGKILL)


def kill_starting(storm: Storm) -> float:
    """Twice: the ranks that come after are killed as they import, meet, load or take their first steps."""
    before = {rank.pid for rank in storm.ranks()}
    kill_rank(storm)
    storm.wait(lambda: {rank.pid for rank in storm.ranks()} - before, what="the next ranks")
    time.sleep(storm.random.uniform(0, START_S))
    struck = time.time()
    kill_rank(storm)
    return struck


def stop_rank(storm: Storm) -> None:
    storm.rank().send(signal.SIGSTOP)


def ask_rank(storm: Storm) -> None:
    storm.rank().send(signal.SIGTERM)


def ask_launcher(storm: Storm) -> None:
    os.kill(storm.launcher.pid, signal.SIGTERM)


def kill_rendezvous(storm: Storm) -> None:
    """torchrun, which is the rendezvous of its ranks and ends with them."""
    os.kill(storm.rank().parent, signal.SIGKILL)


# Disks


def fill_disk(storm: Storm) -> None:
    """For the ranks that run, and what they fork: no file grows beyond what is just enough for the small ones."""
    sizes = [path.stat().st_size for name in EVERY_STEP if (path := storm.run_dir / name).exists()]
    for rank in storm.ranks():
        for pid in (rank.pid, *descendants(rank.pid)):
            with suppress(ProcessLookupError):  # a writer ends when it has written
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(sizes) + LIMIT_BYTES, hard))


Damage = Callable[[Path, Storm], None]


def lose_newest(storm: Storm, *, damage: Damage) -> None:
    """With all ranks gone, so that it is what the next ones go on from."""
    ranks = storm.ranks()
    kill_rank(storm)
    storm.wait_for_end_of(ranks)
    damage_newest(storm, damage=damage)


def damage_newest(storm: Storm, *, damage: Damage) -> None:
    """One of its files. There is a checkpoint before it."""
    newest = storm.checkpoints()[1:][-1]
    damage(storm.random.choice(sorted(path for path in newest.iterdir() if path.stat().st_size)), storm)


def truncate(path: Path, storm: Storm) -> None:
    os.truncate(path, storm.random.randrange(path.stat().st_size))


def flip(path: Path, storm: Storm) -> None:
    """One bit."""
    content, at = bytearray(path.read_bytes()), storm.random.randrange(path.stat().st_size)
    content[at] ^= 1 << storm.random.randrange(8)
    path.write_bytes(content)


# Shards: of one source all, so that the next read finds it


def shards(storm: Storm) -> list[Path]:
    return sorted((storm.workspace.root / "data" / SOURCE).glob("shard_*.bin"))


def keep_shards(storm: Storm) -> None:
    for path in shards(storm):
        shutil.copy2(path, path.with_suffix(".whole"))


def restore_shards(storm: Storm) -> None:
    """As from a copy that kept the times."""
    for path in shards(storm):
        path.with_suffix(".whole").replace(path)


def truncate_shards(storm: Storm) -> None:
    keep_shards(storm)
    for path in shards(storm):
        truncate(path, storm)


def flip_shards(storm: Storm) -> None:
    keep_shards(storm)
    for path in shards(storm):
        content, at = path.read_bytes(), storm.random.randrange(path.stat().st_size)
        write_in_place(path, at=at, content=bytes([content[at] ^ 1 << storm.random.randrange(8)]))


def rot_shards(storm: Storm) -> None:
    """The disk returns other bytes and nothing else tells of it: a bit of each token, beyond the vocabulary."""
    keep_shards(storm)
    for path in shards(storm):
        stat, tokens = path.stat(), memoryview(path.read_bytes()).cast("H")
        write_in_place(path, at=0, content=b"".join((token ^ LOST_BIT).to_bytes(2, "little") for token in tokens))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def write_in_place(path: Path, *, at: int, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, content, at)
    os.close(descriptor)


# Inside a rank


def any_rank(storm: Storm) -> int:
    return storm.random.randrange(2)


def batch_of_nan(storm: Storm) -> float:
    """Whenever it is computed."""
    return storm.inject("nan", rank=any_rank(storm))


def one_nan(storm: Storm) -> float:
    """Once, as of hardware: the same batch comes to something else when it is computed again."""
    return storm.inject("nan", rank=any_rank(storm), once=True)


def steep_batch(storm: Storm) -> float:
    return storm.inject("scale", rank=any_rank(storm), factor=1e6)


def high_losses(storm: Storm) -> float:
    """Of as many batches in a row as are a spike, with gradients like others."""
    return storm.inject("shift", batches=PATIENCE, by=1e4)


def flip_weight(storm: Storm) -> float:
    """In a step that is checked. In others the owner's copy would go round to all, and no one would know."""
    place, bit = storm.random.random(), storm.random.randrange(32)
    return storm.inject(
        "flip", rank=any_rank(storm), once=True, place=place, bit=bit, suits=lambda step: step % CHECK_STEPS == 0
    )


def slow_rank(storm: Storm) -> float:
    return storm.inject("delay", rank=any_rank(storm), batches=4, seconds=0.5)


def slow_read(storm: Storm) -> float:
    return storm.inject("stall", rank=any_rank(storm), seconds=1.5)


def damaged_checkpoint(name: str, damage: Damage) -> Fault:
    told = ("checkpoint_refused", *AGAIN)
    return Fault(name, partial(lose_newest, damage=damage), told, damage=partial(damage_newest, damage=damage))


def damaged_shards(name: str, damage: Callable[[Storm], None]) -> Fault:
    """Ranks refuse them, and so does the launcher before it starts any."""
    return Fault(name, damage, ("resume",), (ExitClass.REFUSED, ExitClass.STATE), restore_shards, damage)


AGAIN = ("job_end", "resume")
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill -9 of a rank", kill_rank, AGAIN),
        Fault("kill -9 while starting", kill_starting, AGAIN),
        Fault("SIGSTOP of a rank", stop_rank, ("hang", *AGAIN)),
        Fault("SIGTERM to a rank", ask_rank, ("stop", *AGAIN), (ExitClass.INTERRUPTED,)),
        Fault("SIGTERM to the launcher", ask_launcher, ("stop", *AGAIN), (ExitClass.INTERRUPTED,)),
        Fault("rendezvous lost", kill_rendezvous, AGAIN),
        Fault("disk full", fill_disk, ("fault", *AGAIN), (ExitClass.NEEDS_PERSON,)),
        damaged_checkpoint("checkpoint truncated", truncate),
        damaged_checkpoint("checkpoint bit flipped", flip),
        damaged_shards("shard truncated", truncate_shards),
        damaged_shards("shard bit flipped", flip_shards),
        damaged_shards("shard rotten", rot_shards),
        Fault("NaN of a batch", batch_of_nan, ("non_finite", "skip")),
        Fault("NaN once", one_nan, ("corruption", *AGAIN)),
        Fault("gradient norm", steep_batch, ("grad_norm", "skip")),
        Fault("loss spike", high_losses, ("loss_spike", "skip", "rewind", "resume")),
        Fault("weight bit flipped", flip_weight, ("corruption", *AGAIN)),
        Fault("slow rank", slow_rank, ("straggler",)),
        Fault("slow read", slow_read, ("data_stall",)),
    )
}
