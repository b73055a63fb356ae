"""Before training: is the data there, made by this tokenizer, and enough for every stage? Reads manifests."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.errors import DataError
from data_prep.manifest import Manifest, damaged_shards, read_manifest
from data_prep.tokenizers import build_tokenizer
from launcher.config.check_mixture import check_caps
from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.config.validate import merge_over_stages

RUN_DATA = "run `phidias data` with the same overrides"


def check_data_ready(config: RunConfig) -> dict[str, Manifest]:
    """The manifest of every source; ConfigError with everything that keeps the run from reading its data."""
    manifests, problems = read_manifests(config)
    problems += [*check_tokenizer(config, manifests=manifests), *check_vocabulary(config, manifests=manifests)]
    found: list[tuple[str | None, Problem]] = [(None, problem) for problem in problems]
    found += check_windows(config, manifests=manifests)
    found += check_caps(config, unique_tokens={name: manifest.train.tokens for name, manifest in manifests.items()})
    if found:
        raise ConfigError(*merge_over_stages(found, names=config.stage_names))
    return manifests


def counted_tokens(config: RunConfig) -> dict[str, float]:
    """Training tokens of the sources that are prepared."""
    directories = [Path(config.run.data_dir) / name for name in source_names(config)]
    prepared = [directory for directory in directories if (directory / "manifest.json").exists()]
    return {directory.name: float(read_manifest(directory).train.tokens) for directory in prepared}


def source_names(config: RunConfig) -> list[str]:
    return list(dict.fromkeys(name for stage in config.stages for name in stage.mixture.sources))


def read_manifests(config: RunConfig) -> tuple[dict[str, Manifest], list[Problem]]:
    manifests, problems = {}, []
    for name in source_names(config):
        directory = Path(config.run.data_dir) / name
        try:
            manifests[name] = manifest = read_manifest(directory)
            for damage in damaged_shards(directory, manifest=manifest):
                rule = "shards are written once and never repaired"
                fix = f"restore it, or remove {directory} and {RUN_DATA}"
                problems.append(Problem(f"mixture.sources.{name}", damage, rule, fix))
        except DataError as error:
            missing = not (directory / "manifest.json").exists()
            found = f"no data ({directory / 'manifest.json'} is missing)" if missing else str(error)
            rule = "a source is read from its shards and their manifest"
            problems.append(Problem(f"mixture.sources.{name}", found, rule, RUN_DATA))
    return manifests, problems


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


def check_windows(config: RunConfig, *, manifests: Mapping[str, Manifest]) -> Iterator[tuple[str | None, Problem]]:
    for stage in config.stages:
        needed = stage.stage.seq_length + 1
        for name in stage.mixture.sources:
            if name in manifests and manifests[name].train.tokens < needed:
                found = f"{manifests[name].train.tokens} tokens"
                rule = f"one window at stage.seq_length {stage.stage.seq_length} takes {needed}"
                fix = "add documents, shorten stage.seq_length, or leave the source out"
                yield stage.stage.name, Problem(f"mixture.sources.{name}", found, rule, fix)
