"""The files that steps read beside the text: what is in them decides what is dropped, as the settings do."""

from data_prep.curate.spec import DecontaminateSpec, LanguageSpec, StepSpec


def files_of(step: StepSpec) -> list[str]:
    """Paths and URLs in a fixed order. DataError: a glob of benchmarks without a match."""
    from data_prep.curate.decontaminate import benchmark_files  # it needs the reader, which needs the specs

    if isinstance(step, LanguageSpec):
        return [step.model_file]
    if isinstance(step, DecontaminateSpec):
        items = [file.path for name, benchmark in step.benchmarks.items() for file in benchmark_files(name, benchmark)]
        return [*items, *([step.common_grams_file] if step.common_grams_file else [])]
    return []
