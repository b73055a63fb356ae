"""The files that steps read beside the text: what is in them decides what is dropped, as the settings do."""

import glob

from data_prep.curate.spec import DecontaminateSpec, LanguageSpec, StepSpec


def files_of(step: StepSpec) -> list[str]:
    """Paths in a fixed order; a glob without a match gives none."""
    if isinstance(step, LanguageSpec):
        return [step.model_file]
    if isinstance(step, DecontaminateSpec):
        patterns = [pattern for benchmark in step.benchmarks.values() for pattern in benchmark.inputs]
        items = [path for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
        return [*items, *([step.common_grams_file] if step.common_grams_file else [])]
    return []
