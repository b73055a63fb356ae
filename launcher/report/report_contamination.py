"""What decontamination took out of the training data: by source, as the manifests have counted it."""

from html import escape

from data_prep.curate.spec import DecontaminateSpec
from data_prep.errors import DataError
from data_prep.manifest import Manifest, read_manifest
from launcher.config.reading import all_sources
from launcher.config.schema import RunConfig
from launcher.plan.prepared import folder_of
from launcher.report.format import MISSING, format_percent
from launcher.report.tables import table

LONG, SHORT = "contaminated_13gram", "contaminated_7gram"
LEAD = (
    "Documents that hold items of benchmarks and were dropped before training, by the rule that found them; those below its "
    "limit are kept, and noted in the curated rows. Sources without a list were not compared with any."
)


def contamination_section(config: RunConfig) -> str:
    """A whole section; empty where no source is decontaminated."""
    lists = benchmarks_of(config)
    if not any(lists.values()):
        return ""
    rows = [contamination_row(name, names, manifest=manifest_of(config, name)) for name, names in lists.items()]
    heads = ("source", "compared with", "#rows", "#13-gram", "#7-grams", "#dropped")
    return f'<section><h2>Decontamination</h2><p class="lead">{LEAD}</p>{table(heads, rows=rows, empty="")}</section>'


def benchmarks_of(config: RunConfig) -> dict[str, list[str]]:
    """The lists of tasks that each source is held against, by the steps of it, or of the source that it is a part of."""
    sources = all_sources(config)
    found = {}
    for name, source in sources.items():
        whole = sources.get(source.parent or name, source)
        steps = [step for step in whole.steps if isinstance(step, DecontaminateSpec)]
        found[name] = list(dict.fromkeys(benchmark for step in steps for benchmark in step.benchmarks))
    return found


def contamination_row(name: str, benchmarks: list[str], *, manifest: Manifest | None) -> tuple[str, ...]:
    statistics = manifest.statistics if manifest else None
    told = escape(", ".join(benchmarks)) or "nothing"
    if statistics is None or not benchmarks:
        return escape(name), told, f"{statistics.rows:,}" if statistics else MISSING, MISSING, MISSING, MISSING
    counts = [sum(row.get(reason, 0) for row in statistics.dropped.values()) for reason in (LONG, SHORT)]
    part = format_percent(sum(counts) / max(1, statistics.rows), digits=3)
    return escape(name), told, f"{statistics.rows:,}", *(f"{count:,}" for count in counts), part


def manifest_of(config: RunConfig, name: str) -> Manifest | None:
    """None where the data lies elsewhere."""
    try:
        return read_manifest(folder_of(config, name))
    except (OSError, DataError):
        return None
