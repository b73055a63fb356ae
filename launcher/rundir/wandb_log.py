"""The logs that W&B's client writes, one for each start of a stage, as far as they must be known to upload one that a crash cut
off: wandb 0.31 refuses a log that ends inside a record, and with it all later ones of the run.

The format is LevelDB's: a head of 7 bytes, then blocks of 32 KiB with pieces of records in them. A piece is its checksum (4
bytes), length (2), kind (1: a whole record, 2 first, 3 middle, 4 last) and content; none begins in the last 6 of a block."""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

MAGIC = b":W&B"
BLOCK, HEAD = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
# A log begins with a record about itself and one about its run: with less there is nothing to upload.
LEAST = 2
# Beside a log: all of it is in W&B (`wandb sync` leaves this); or it was to be uploaded while it was written, and may not be.
SYNCED, UNFINISHED = ".wandb.synced", ".wandb.unfinished"


def parts(folder: Path) -> list[Path]:
    """The logs in a run's folder, oldest first: `offline-run-TIME-ID/run-ID.wandb`, online ones in `run-TIME-ID`."""
    found = (log for start in ("offline-run-*", "run-*") for log in folder.glob(f"{start}/run-*.wandb"))
    return sorted(found, key=lambda log: log.parent.name.removeprefix("offline-"))


def is_offline(log: Path) -> bool:
    return log.parent.name.startswith("offline-")


def is_waiting(log: Path) -> bool:
    """Whether some of it is not uploaded yet, as far as is known."""
    return not log.with_suffix(SYNCED).exists() if is_offline(log) else log.with_suffix(UNFINISHED).exists()


def records(data: bytes) -> Iterator[bytes]:
    """Those that are all there."""
    found = b""
    for begin, end, kind in pieces(data):
        found += data[begin:end]
        if kind in (WHOLE, LAST):
            yield found
            found = b""


def pieces(data: bytes | mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Where the bytes of each piece begin and end, and its kind; up to the first that is not all there."""
    at = HEAD
    while data[:4] == MAGIC and at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        end = at + HEAD + length
        if end > len(data) or not WHOLE <= kind <= LAST:
            return
        yield at + HEAD, end, kind
        at = end


def cut_torn_end(path: Path) -> bool:
    """Takes the record off that a crash cut off, and that nobody can read. Whether anything is left to upload. Not for a log
    that is still being written."""
    if not path.stat().st_size:
        return False
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            ends = [end for _, end, kind in pieces(data) if kind in (WHOLE, LAST)]
            size = len(data)
        if len(ends) < LEAST:
            return False
        if ends[-1] < size:
            file.truncate(ends[-1])
    return True
