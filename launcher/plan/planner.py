"""What composing a config asks of the planner: layouts for what is left free, and the nearest one that works for a refused
one."""

from collections.abc import Mapping
from dataclasses import replace

from launcher.config.auto import Free
from launcher.config.check import check_run
from launcher.config.errors import ConfigError, LayoutError, Problem
from launcher.config.schema import RunConfig, StageConfig
from launcher.plan.memory import Memory
from launcher.plan.predict import too_large
from launcher.plan.search import Found, choose_layouts, describe, nearest_layout


class Planner:
    """Keeps what it found, by stage, for the page to tell."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}

    def choose(self, config: RunConfig, free: Mapping[str, Free]) -> RunConfig:
        return choose_layouts(config, free, on_found=self.found.__setitem__)

    def nearest(self, config: RunConfig) -> list[str]:
        """A line for each stage whose layout is refused and would be accepted as another one: the overrides that make it."""
        lines = []
        for stage in config.stages:
            alone = replace(config, stages=(stage,), run=replace(config.run, stages=(stage.stage.name,)))
            stage_alone = replace(stage, stage=replace(stage.stage, init_from=None, replay_from_tokens=None))
            alone = replace(alone, stages=(stage_alone,))
            if not is_refused(alone):
                continue
            words = nearest_words(stage_alone, config=alone)
            if words:
                lines.append(f"stage {stage.stage.name}: {words}")
        return lines


def nearest_words(stage: StageConfig, *, config: RunConfig) -> str | None:
    """Overrides from the stage's layout to the nearest that fits and keeps every rule; None where there is none."""
    layout = nearest_layout(stage, config=config)
    if layout is None or is_refused(replace(config, stages=(replace(stage, layout=layout),))):
        return None
    return describe(layout, than=stage.layout) or None


def check_fits(config: RunConfig) -> None:
    """LayoutError with every stage that its GPUs cannot hold, as predicted, and the nearest layout that they can."""
    problems = [problem for stage in config.stages if (problem := unfit(stage, config=config))]
    if problems:
        raise LayoutError(*problems)


def unfit(stage: StageConfig, *, config: RunConfig) -> Problem | None:
    if config.hardware is None:
        return None
    memory = Memory(stage, model=config.model, cluster=config.cluster, hardware=config.hardware)
    found = too_large(memory, capacity=config.hardware.memory_gib)
    if found is None:
        return None
    words = nearest_words(stage, config=config)
    fix = words or "no layout fits: more GPUs, larger ones, or a shorter stage.seq_length"
    return Problem(f"layout (stage {stage.stage.name})", *found, fix)


def is_refused(config: RunConfig) -> bool:
    try:
        check_run(config)
    except ConfigError:
        return True
    return False
