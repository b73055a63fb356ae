"""What a finished task says of itself: receipts/<task>.json. A restart does only what has no valid receipt."""

import functools
import hashlib
import json
from dataclasses import KW_ONLY, asdict, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_prep.fields import STRICT
from data_prep.indexed import ShardEntry
from data_prep.prepare.place import Place
from data_prep.readers import RowCount

FOLDER = "receipts"

Tally = dict[str, dict[str, int]]


@dataclass(config=STRICT)
class Counts(RowCount):
    """What went in and what became of it: rows = documents + empty + rejected + dropped, always. `dropped`: by step and reason;
    `found`: what steps saw, such as languages."""

    _: KW_ONLY
    documents: int = 0
    empty_documents: int = 0
    rejected_rows: int = 0
    tokens: int = 0
    text_bytes: int = 0
    input_bytes: int = 0
    dropped: Tally = field(default_factory=dict)
    found: Tally = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.dropped.values())

    def count(self, tally: Tally, *, key: str, value: str, by: int = 1) -> None:
        row = tally.setdefault(key, {})
        row[value] = row.get(value, 0) + by

    def add(self, other: "Counts") -> None:
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for mine, theirs in ((self.dropped, other.dropped), (self.found, other.found)):
            for key, row in theirs.items():
                for value, by in row.items():
                    self.count(mine, key=key, value=value, by=by)


@dataclass(config=STRICT, frozen=True)
class Receipt:
    """`plan`: its digest; `files`: bytes of every file that the task left; shards and lengths: of tasks that tokenize."""

    _: KW_ONLY
    task: str
    plan: str
    code: str
    counts: Counts
    files: dict[str, int]
    shards: tuple[ShardEntry, ...] = ()
    held_out: tuple[ShardEntry, ...] = ()
    length_documents: tuple[int, ...] = ()
    length_tokens: tuple[int, ...] = ()


def write_receipt(place: Place, *, receipt: Receipt) -> None:
    place.write(f"{FOLDER}/{receipt.task}.json", json.dumps(asdict(receipt), indent=1).encode())


def read_receipt(place: Place, *, task: str, plan: str | None = None) -> Receipt | None:
    """None where there is none, what is there is none, or it is of another plan than `plan`."""
    data = place.read(f"{FOLDER}/{task}.json")
    try:
        receipt = _adapter().validate_python(json.loads(data)) if data else None
    except (ValueError, ValidationError):
        return None
    return receipt if receipt and plan in (None, receipt.plan) else None


@functools.cache
def _adapter() -> TypeAdapter[Receipt]:
    return TypeAdapter(Receipt)


def finished_tasks(place: Place) -> set[str]:
    """The tasks that have a receipt."""
    return {name.removesuffix(".json") for name in place.names(FOLDER) if name.endswith(".json")}


def is_valid(receipt: Receipt | None, *, plan: str, sizes: dict[str, int]) -> bool:
    """Whether a receipt is of this plan, and its files are there as long as it says."""
    return receipt is not None and receipt.plan == plan and all(sizes.get(file) == size for file, size in receipt.files.items())


@functools.cache
def code_version() -> str:
    """The version, and a digest of the code that makes shards: a commit says nothing of what was edited since."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    try:
        return f"{version('phidias')} {digest.hexdigest()}"
    except PackageNotFoundError:
        return f"source {digest.hexdigest()}"


def merged(receipts: list[Receipt]) -> Counts:
    """Their counts together."""
    counts = Counts()
    for receipt in receipts:
        counts.add(receipt.counts)
    return counts
