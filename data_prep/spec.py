"""What a source, a mixture and a tokenizer may be: the part of the config contract that data_prep owns.

Values live in model_configs/; these types hold the constraints. Optional fields of the repeated records are the only defaults.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.curate.spec import StepSpec
from data_prep.fields import STRICT, Float, Int, Positive, PositiveInt, Share

__all__ = [
    "STRICT",
    "Amount",
    "DataSettings",
    "Float",
    "Int",
    "Mixture",
    "Phase",
    "Positive",
    "PositiveInt",
    "Share",
    "Source",
    "TokenizerSpec",
]

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
WindowKind = Literal["stream", "anchored", "best_fit"]


@dataclass(config=STRICT, frozen=True)
class Amount:
    """How much of a phase is read from one source: `tokens`, `epochs`, or a `share` of what those two leave. One of them."""

    _: KW_ONLY
    share: Share | None = None
    epochs: Positive | None = None
    tokens: Positive | None = None

    @property
    def stated(self) -> dict[str, float]:
        """What was said: one entry in an amount that is well formed."""
        said = {"share": self.share, "epochs": self.epochs, "tokens": self.tokens}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(config=STRICT, frozen=True)
class Source(Amount):
    """One named stream of documents, made from `inputs`, or the documents of at least `min_document_tokens` of a `parent`.

    `steps` are what its documents pass before they are tokenized, in order (docs/curation.md); `id_field` is what reports call
    a document by. Its amount is that of the first phase; a source without one is read by later phases or through its buckets
    only. `unique_tokens` is what the plan assumes until a manifest says the truth; `max_epochs` is the most often a token may
    be read; `windows` is how it is cut, where not as the mixture says."""

    _: KW_ONLY
    inputs: tuple[str, ...] = ()
    format: Literal["jsonl", "parquet", "text"] | None = None
    text_field: str = "text"
    id_field: str | None = None
    steps: tuple[StepSpec, ...] = ()
    parent: SourceName | None = None
    min_document_tokens: PositiveInt | None = None
    max_epochs: Positive | None = None
    unique_tokens: Positive | None = None
    windows: WindowKind | None = None


@dataclass(config=STRICT, frozen=True)
class Phase:
    """What a stage reads from `start_tokens` of the stage on: every source of the phase, and how much of each."""

    _: KW_ONLY
    start_tokens: Positive
    sources: Annotated[dict[SourceName, Amount], Field(min_length=1)]


@dataclass(config=STRICT, frozen=True)
class Mixture:
    """The sources a stage reads, by name, and how their amounts change (checked where all errors are collected). `windows`:
    `stream` cuts documents end to end; `anchored` takes whole windows from the start of long documents; `best_fit` packs whole
    documents."""

    _: KW_ONLY
    name: str
    sources: Annotated[dict[SourceName, Source], Field(min_length=1)]
    phases: tuple[Phase, ...] = ()
    windows: WindowKind = "stream"

    def windows_of(self, name: str) -> WindowKind:
        """How one of the sources is cut into windows."""
        return self.sources[name].windows or self.windows


@dataclass(config=STRICT, frozen=True)
class TokenizerSpec:
    """`cl100k` reads tiktoken's ranks file, `huggingface` a tokenizer.json; both offline. `eod` ends every document."""

    _: KW_ONLY
    kind: Literal["cl100k", "huggingface"]
    ranks_file: str | None
    file: str | None
    eod: Annotated[str, Field(min_length=1)]


@dataclass(config=STRICT, frozen=True)
class DataSettings:
    """How sources become shards and windows; the same for every stage of a run.

    `held_out_fraction`: part of the documents (by keyed content hash) kept for validation. `shard_tokens`: about what a shard
    holds. `shuffle_mib`: documents are mixed in buffers of so many token ids, from places far apart; 0 keeps the order of the
    inputs. `max_row_mib`: the largest row, which bounds the memory of a worker. `oracle_fraction`: part of the documents that
    are tokenized twice, to prove the fast tokenizer. `dropped_samples`: documents kept to look at, of each reason to drop one.
    `num_workers`: processes on a machine, of which engine=slurm takes
    `num_machines`. `length_buckets`: documents from each of these lengths up lie in shards of
    their own. `chunk_tokens` (C) and `group_tokens`: units of the shuffle, see docs/data_order.md. `max_rejected_rows`:
    malformed rows tolerated per source, listed in rejects.jsonl.

    `reader`: how shards are read. `cache_dir`: what is read from object storage is kept there, up to `cache_gib`; null keeps
    nothing. `prefetch_batches`: global batches read ahead in the background; 0 reads in the step. `trace`: ranks write down
    every window they read."""

    _: KW_ONLY
    held_out_fraction: Annotated[Float, Field(ge=0.0, lt=0.5)]
    shard_tokens: PositiveInt
    length_buckets: tuple[PositiveInt, ...]
    chunk_tokens: PositiveInt
    group_tokens: PositiveInt
    num_workers: PositiveInt
    num_machines: PositiveInt
    max_rejected_rows: Annotated[Int, Field(ge=0)]
    max_row_mib: PositiveInt
    shuffle_mib: Annotated[Int, Field(ge=0)]
    oracle_fraction: Share
    dropped_samples: Annotated[Int, Field(ge=0)]
    reader: Literal["mmap", "pread"]
    cache_dir: str | None
    cache_gib: Positive
    prefetch_batches: Annotated[Int, Field(ge=0)]
    trace: bool
