"""What a source, a mixture and a tokenizer may be: the part of the config contract that data_prep owns.

Values live in model_configs/; these types hold the constraints. Optional fields of the repeated records are the only defaults.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", defer_build=True)


def _refuse_bool(value: Any) -> Any:
    """Python counts True as 1: `layout.tp=true` would pass as a number."""
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]

Share = Annotated[Float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0.0, allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(gt=0)]


@dataclass(config=STRICT, frozen=True)
class Source:
    """One named stream of documents. `share` is its part of a stage's tokens; `unique_tokens` is what the plan assumes
    until a manifest says the truth; `max_epochs` is the most often a token may be read."""

    _: KW_ONLY
    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    format: Literal["jsonl", "parquet", "text"]
    share: Share
    text_field: str = "text"
    max_epochs: Positive | None = None
    unique_tokens: Positive | None = None


@dataclass(config=STRICT, frozen=True)
class Mixture:
    """The sources a stage reads, by name; the shares sum to 1 (checked where all errors are collected)."""

    _: KW_ONLY
    name: str
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")], Source], Field(min_length=1)]


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

    `held_out_fraction`: part of the documents (by keyed content hash) kept for validation. `shard_tokens`: a shard is closed
    at the first document border past this size. `chunk_tokens` (C) and `group_tokens`: units of the shuffle, see
    docs/data_order.md. `max_rejected_rows`: malformed rows tolerated per source, listed in rejects.jsonl."""

    _: KW_ONLY
    held_out_fraction: Annotated[Float, Field(ge=0.0, lt=0.5)]
    shard_tokens: PositiveInt
    chunk_tokens: PositiveInt
    group_tokens: PositiveInt
    num_workers: PositiveInt
    max_rejected_rows: Annotated[Int, Field(ge=0)]
