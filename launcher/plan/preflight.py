"""Before training: is the data there, made by this tokenizer, and enough for every stage? Reads manifests and file sizes."""

from collections.abc import Iterator, Mapping

from data_prep.errors import DataError
from data_prep.manifest import Manifest, damaged_shards, read_manifest
from data_prep.tokenizers import build_tokenizer
from launcher.config.check_mixture import check_amounts, check_caps
from launcher.config.errors import ConfigError, Problem
from launcher.config.reading import all_sources
from launcher.config.schema import RunConfig
from launcher.config.validate import merge_over_stages
from launcher.plan.prepared import Prepared, folder_of, read_source

RUN_DATA = "run `phidias data` with the same overrides"


def check_data_ready(config: RunConfig) -> Prepared:
    """What is prepared; ConfigError with everything that keeps the run from reading its data."""
    prepared, problems = read_sources(config)
    problems += [
        *check_tokenizer(config, manifests=prepared.manifests),
        *check_vocabulary(config, manifests=prepared.manifests),
    ]
    found: list[tuple[str | None, Problem]] = [(None, problem) for problem in problems]
    found += check_windows(config, prepared=prepared)
    found += check_amounts(config, sizes=prepared.sizes, prepared=not problems)
    found += check_caps(config, sizes=prepared.sizes)
    if found:
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))
    return prepared


def sources_to_make(config: RunConfig) -> list[str]:
    """Sources without a manifest: what `phidias data` has still to make."""
    return [name for name in all_sources(config) if not folder_of(config, name).states(["manifest.json"])]


def read_sources(config: RunConfig) -> tuple[Prepared, list[Problem]]:
    prepared, problems = Prepared(), []
    for name in all_sources(config):
        path = f"mixture.sources.{name}"
        try:
            missing = read_source(config, name, into=prepared)
            rule = "windows other than stream are read through a table that `phidias data` prepares"
            problems += [Problem(path, found, rule, RUN_DATA) for found in missing]
        except DataError as error:
            problems += unreadable(config, name, error=error)
    return prepared, problems


def unreadable(config: RunConfig, name: str, *, error: DataError) -> Iterator[Problem]:
    """Every shard that is damaged, or what keeps the manifest from being read."""
    folder, path = folder_of(config, name), f"mixture.sources.{name}"
    rule = "a source is read from its shards and their manifest"
    if not folder.states(["manifest.json"]):
        yield Problem(path, f"no data ({folder.path('manifest.json')} is missing)", rule, RUN_DATA)
        return
    try:
        damages = damaged_shards(folder, manifest=read_manifest(folder))
    except DataError:
        damages = []
    for damage in damages:
        fix = f"restore it, or remove {folder.path('')} and {RUN_DATA}"
        yield Problem(path, damage, "shards are written once and never repaired", fix)
    if not damages:
        yield Problem(path, str(error), rule, RUN_DATA)


def check_tokenizer(config: RunConfig, *, manifests: Mapping[str, Manifest]) -> list[Problem]:
    """Every source was made by the run's tokenizer; without its file, at least all by one."""
    try:
        wanted = build_tokenizer(config.tokenizer).fingerprint
    except DataError as error:
        return [Problem("tokenizer", str(error), "the run's tokenizer must be readable", "correct the tokenizer's file")]
    rule = f"the run's tokenizer has fingerprint {wanted}"
    fix = f"the tokenizer it was made with, or remove it from {config.run.data_dir} and {RUN_DATA}"
    return [
        Problem(f"mixture.sources.{name}", f"data made by a tokenizer with fingerprint {made_by.fingerprint}", rule, fix)
        for name, made_by in ((name, manifest.tokenizer) for name, manifest in manifests.items())
        if made_by.fingerprint != wanted
    ]


def check_vocabulary(config: RunConfig, *, manifests: Mapping[str, Manifest]) -> list[Problem]:
    """Token ids beyond the padded vocabulary would index past the embedding table; beyond the vocabulary they would be taken
    for padding by whoever reads the config."""
    size = max((manifest.tokenizer.vocab_size for manifest in manifests.values()), default=0)
    rule = f"it must hold the {size} tokens of the tokenizer that made the data"
    problems = []
    if size > config.model.vocab_size:
        problems.append(Problem("model.vocab_size", str(config.model.vocab_size), rule, f"model.vocab_size={size}"))
    if size > config.model.padded_vocab_size:
        fix = f"model.padded_vocab_size={-(-size // 128) * 128}"
        problems.append(Problem("model.padded_vocab_size", str(config.model.padded_vocab_size), rule, fix))
    return problems


def check_windows(config: RunConfig, *, prepared: Prepared) -> Iterator[tuple[str | None, Problem]]:
    for stage in config.stages:
        needed = stage.stage.seq_length + 1
        for name in stage.mixture.sources:
            if name in prepared.sizes and prepared.sizes[name].tokens < needed:
                found = f"{prepared.sizes[name].tokens} tokens"
                rule = f"one window at stage.seq_length {stage.stage.seq_length} takes {needed}"
                fix = "add documents, shorten stage.seq_length, or leave the source out"
                yield stage.stage.name, Problem(f"mixture.sources.{name}", found, rule, fix)
