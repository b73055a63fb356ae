"""Mixture rules: amounts that can be met, one meaning for each source name, and how often a source may be read."""

import math
from collections.abc import Iterator

from data_prep.exposure import Reading, breaches, readings
from data_prep.mixing import AmountError, UnknownSize, plan_phases
from data_prep.spec import Mixture, Source
from launcher.config.errors import Problem
from launcher.config.reading import Sizes, Tables, assumed_sizes, extent_of, plan_tables, stage_uses
from launcher.config.schema import RunConfig, StageConfig

IDENTITY = ("inputs", "format", "text_field", "parent", "min_document_tokens", "unique_tokens")
Found = tuple[str | None, Problem]


def check_mixtures(config: RunConfig) -> Iterator[Found]:
    """What is wrong in the mixtures; caps are counted where nothing else is."""
    wrong = [*check_sources(config), *check_identity(config), *check_replays(config)]
    stages = {stage for stage, _ in wrong}
    amounts = check_amounts(config, sizes=assumed_sizes(config), prepared=False)
    wrong += [(stage, problem) for stage, problem in amounts if stage not in stages]
    yield from wrong or check_caps(config, sizes=assumed_sizes(config))


def check_sources(config: RunConfig) -> Iterator[Found]:
    for stage in config.stages:
        for name, source in stage.mixture.sources.items():
            rules = (*check_origin(name, source), *check_bucket(name, source, config=config))
            for problem in (*rules, *check_read(name, mixture=stage.mixture), *check_stated(name, source)):
                yield stage.stage.name, problem
        for problem in check_phase_names(stage.mixture):
            yield stage.stage.name, problem


def check_origin(name: str, source: Source) -> Iterator[Problem]:
    """A source is made from inputs, or is the long documents of another."""
    path = f"mixture.sources.{name}"
    if source.parent is None and not source.inputs:
        yield Problem(f"{path}.inputs", "nothing", "a source is made from files", f"{path}.inputs=[...], or a parent")
    elif source.parent is None and source.format is None:
        yield Problem(f"{path}.format", "nothing", "it is one of jsonl, parquet, text", f"{path}.format=jsonl")
    if source.parent is not None and (source.inputs or source.format):
        rule = f"it is the long documents of {source.parent}, which has the inputs"
        yield Problem(f"{path}.inputs", ", ".join(source.inputs) or str(source.format), rule, "leave inputs and format out")
    if (source.parent is None) != (source.min_document_tokens is None):
        said = "parent" if source.parent else "min_document_tokens"
        rule = "the long documents of a source: parent names it, min_document_tokens says how long"
        yield Problem(f"{path}.{said}", str(getattr(source, said)), rule, "set both, or neither")


def check_bucket(name: str, source: Source, *, config: RunConfig) -> Iterator[Problem]:
    """A parent is a source of the run that has inputs, and keeps documents of this length apart."""
    if source.parent is None or source.min_document_tokens is None:
        return
    path, buckets = f"mixture.sources.{name}", config.data.length_buckets
    parents = {other for stage in config.stages for other, spec in stage.mixture.sources.items() if spec.parent is None}
    if source.parent not in parents:
        rule = f"it is another source of the run, with inputs of its own ({', '.join(sorted(parents))})"
        yield Problem(f"{path}.parent", source.parent, rule, "name one of them; a source of a mixture may be left unread")
    if source.min_document_tokens not in buckets:
        rule = f"shards are kept apart from {', '.join(map(str, buckets)) or 'no'} tokens up (data.length_buckets)"
        fix = "one of these, or another data.length_buckets before the data is prepared"
        yield Problem(f"{path}.min_document_tokens", str(source.min_document_tokens), rule, fix)


def check_read(name: str, *, mixture: Mixture) -> Iterator[Problem]:
    """A source that nothing reads was forgotten."""
    named = {other for phase in mixture.phases for other in phase.sources}
    parents = {source.parent for source in mixture.sources.values()}
    if not mixture.sources[name].stated and name not in named | parents:
        rule = "a source has a share, epochs or tokens, in the mixture or in one of its phases"
        yield Problem(f"mixture.sources.{name}", "no amount", rule, f"mixture.sources.{name}.share=0.1 (0: not read)")


def check_stated(name: str, source: Source) -> Iterator[Problem]:
    if len(source.stated) > 1:
        found = " and ".join(f"{key} {value:g}" for key, value in source.stated.items())
        yield Problem(f"mixture.sources.{name}", found, "a source has one of share, epochs, tokens", "keep one of them")


def check_phase_names(mixture: Mixture) -> Iterator[Problem]:
    for index, phase in enumerate(mixture.phases):
        for name in phase.sources:
            if name not in mixture.sources:
                rule = f"a phase reads sources of the mixture ({', '.join(mixture.sources)})"
                yield Problem(f"mixture.phases.{index}.sources.{name}", name, rule, "describe it under mixture.sources")


def check_identity(config: RunConfig) -> Iterator[Found]:
    """One name is one source for the whole run: its shards and its place in the data order go by the name."""
    first: dict[str, tuple[str, Source]] = {}
    for stage in config.stages:
        for name, source in stage.mixture.sources.items():
            where, before = first.setdefault(name, (stage.stage.name, source))
            for field in IDENTITY:
                here, there = getattr(source, field), getattr(before, field)
                if here != there:
                    rule = f"in stage {where} it is {_shown(there)}, and one name is one source for the whole run"
                    path = f"mixture.sources.{name}.{field}"
                    yield stage.stage.name, Problem(path, _shown(here), rule, "give the other source a name of its own")


def check_replays(config: RunConfig) -> Iterator[Found]:
    for stage in config.stages:
        tokens, parent = stage.stage.replay_from_tokens, stage.stage.parent
        if tokens is None:
            continue
        if parent is None:
            rule = "recall is of the stage it starts from, and it starts from none"
            yield stage.stage.name, Problem("stage.replay_from_tokens", f"{tokens:g}", rule, "stage.replay_from_tokens=null")
        elif parent in config.stage_names and tokens >= config.stage(parent).stage.tokens:
            rule = f"stage {parent} ends at {config.stage(parent).stage.tokens:g} tokens"
            fix = "an earlier token, or null to go on where it stopped"
            yield stage.stage.name, Problem("stage.replay_from_tokens", f"{tokens:g}", rule, fix)


def check_amounts(config: RunConfig, *, sizes: Sizes, prepared: bool) -> Iterator[Found]:
    """Amounts that do not fill a phase, or phases in the wrong order. Before the data is `prepared`, epochs of a source of
    unknown size are let through."""
    for stage in config.stages:
        try:
            plan_phases(stage.mixture, extent=extent_of(stage, sizes=sizes))
        except AmountError as error:
            if not prepared and isinstance(error, UnknownSize):
                continue
            yield stage.stage.name, problem_of(error)


def problem_of(error: AmountError) -> Problem:
    return Problem(f"mixture.{error.path}", error.found, error.rule, error.fix)


def check_caps(config: RunConfig, *, sizes: Sizes, tables: Tables | None = None) -> Iterator[Found]:
    """Sources read more often than max_epochs allows. `tables`: the phases, where a run has recorded some."""
    if any(config.data.chunk_tokens % stage.stage.seq_length for stage in config.stages):
        return  # reported elsewhere
    try:
        planned = plan_tables(config, sizes=sizes)
    except AmountError:  # reported as such
        return
    uses = stage_uses(config, sizes=sizes, tables={**planned, **(tables or {})})
    for reading, cap in breaches(uses, found=readings(uses, seed=config.run.seed, find_repeats=False)):
        yield reading.stage, _breach(reading, cap=cap, stage=config.stage(reading.stage), sizes=sizes)


def _breach(reading: Reading, *, cap: float, stage: StageConfig, sizes: Sizes) -> Problem:
    unique, epochs = sizes[reading.source].tokens, reading.epochs or 0.0
    rule = f"{reading.tokens_after:.4g} tokens of {unique:.4g} unique ones are {epochs:.4g} epochs by the end of it"
    if epochs > reading.tokens_after / unique * 1.01:
        rule = f"its longest documents are read {epochs:.4g} times by the end of it, through it, its parent and other buckets"
    if reading.epochs_before:
        rule += f", {reading.epochs_before:.4g} of them before the stage"
    room = max(0.0, (cap - (reading.epochs_before or 0.0)) / max(1e-12, epochs - (reading.epochs_before or 0.0)))
    share = math.floor(reading.samples / stage.stage.num_samples * min(1.0, room) * 1e6) / 1e6
    fix = f"a share of at most {share:g}, fewer stage.tokens, more text, or a higher cap"
    return Problem(f"mixture.sources.{reading.source}.max_epochs", f"{cap:g}", rule, fix)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
