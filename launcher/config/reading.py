"""What the stages of a run read, for data_prep's arithmetic: the config and the sizes of sources, put together.

Sizes come from manifests where the data is prepared, before that from the mixture's `unique_tokens`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.exposure import Cut, StageUse
from data_prep.mixing import Extent, PhaseRow, plan_phases
from data_prep.order import SourceOrder
from data_prep.spec import Source, WindowKind
from launcher.config.schema import RunConfig, StageConfig

Tables = Mapping[str, Sequence[PhaseRow]]


@dataclass(frozen=True)
class SourceSize:
    """Training tokens of a source, and of its window tables the windows and the tokens in them, by kind and seq_length."""

    tokens: int
    tables: Mapping[tuple[WindowKind, int], tuple[int, int]] = field(default_factory=dict)

    def num_windows(self, kind: WindowKind, *, seq_length: int) -> int:
        """Windows of an epoch; of a table that is not prepared yet, as many as a stream would have."""
        if kind == "stream" or (kind, seq_length) not in self.tables:
            return max(0, (self.tokens - 1) // seq_length)
        return self.tables[kind, seq_length][0]

    def window_tokens(self, kind: WindowKind, *, seq_length: int) -> float:
        windows, tokens = self.tables.get((kind, seq_length), (1, seq_length))
        return tokens / windows


Sizes = Mapping[str, SourceSize]


def all_sources(config: RunConfig) -> dict[str, Source]:
    """The union over the stages; that one name is one source is checked with the config."""
    return {name: source for stage in config.stages for name, source in stage.mixture.sources.items()}


def assumed_sizes(config: RunConfig) -> dict[str, SourceSize]:
    """What the mixtures assume."""
    found = {name: source.unique_tokens for name, source in all_sources(config).items()}
    return {name: SourceSize(int(tokens)) for name, tokens in found.items() if tokens is not None}


def extent_of(stage: StageConfig, *, sizes: Sizes) -> Extent:
    seq_length = stage.stage.seq_length
    windows = {
        name: sizes[name].num_windows(stage.mixture.windows_of(name), seq_length=seq_length) if name in sizes else None
        for name in stage.mixture.sources
    }
    return Extent(seq_length, stage.stage.num_samples, windows)


def plan_tables(config: RunConfig, *, sizes: Sizes) -> dict[str, list[PhaseRow]]:
    """The phases of every stage, as a run that has read nothing would record them. AmountError."""
    return {stage.stage.name: plan_phases(stage.mixture, extent=extent_of(stage, sizes=sizes)) for stage in config.stages}


def source_order(name: str, *, stage: StageConfig, config: RunConfig, size: SourceSize) -> SourceOrder:
    """The order of a source in a stage; the windows of a table are laid end to end as a stream of their own."""
    kind, seq_length = stage.mixture.windows_of(name), stage.stage.seq_length
    of_table = size.num_windows(kind, seq_length=seq_length) * seq_length + 1
    return SourceOrder(
        name=name,
        num_tokens=size.tokens if kind == "stream" else of_table,
        seq_length=seq_length,
        chunk_tokens=config.data.chunk_tokens,
        group_tokens=config.data.group_tokens,
        seed=config.run.seed,
        windows=kind,
    )


def stage_uses(config: RunConfig, *, sizes: Sizes, tables: Tables, samples: Mapping[str, int] | None = None) -> list[StageUse]:
    """The stages of a run up to their ends, or as far as `samples` says; then stages that have not begun are left out."""
    stages = [stage for stage in config.stages if samples is None or samples.get(stage.stage.name)]
    return [
        StageUse(
            name=stage.stage.name,
            seq_length=stage.stage.seq_length,
            num_samples=stage.stage.num_samples if samples is None else samples[stage.stage.name],
            rows=tables[stage.stage.name],
            sources=stage.mixture.sources,
            cuts=_cuts(stage, config=config, sizes=sizes),
            init_from=stage.stage.parent,
            replay_sample=replay_sample(stage, config=config),
        )
        for stage in stages
    ]


def _cuts(stage: StageConfig, *, config: RunConfig, sizes: Sizes) -> dict[str, Cut]:
    """Of the sources whose size is known and holds a window."""
    seq_length, cuts = stage.stage.seq_length, {}
    for name in stage.mixture.sources:
        kind = stage.mixture.windows_of(name)
        if name in sizes and sizes[name].num_windows(kind, seq_length=seq_length):
            order = source_order(name, stage=stage, config=config, size=sizes[name])
            cuts[name] = Cut(order, sizes[name].window_tokens(kind, seq_length=seq_length))
    return cuts


def replay_sample(stage: StageConfig, *, config: RunConfig) -> int | None:
    """The sample of the stage it starts from at which recall begins again; None where the sources go on."""
    tokens, parent = stage.stage.replay_from_tokens, stage.stage.parent
    if tokens is None or parent not in config.stage_names:
        return None
    return math.ceil(tokens / config.stage(parent).stage.seq_length)
