"""What slurm/pretrain.sh runs inside a job: checks and freezes the config at the first start, goes on from the run directory at
every other. Not meant to be called by hand."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.check import check_run
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError, Problem
from launcher.config.schema import RunConfig
from launcher.jobs.allocation import Allocation, Remembered, fitted_to, read_allocation, remember, remembered, said_nodes
from launcher.jobs.stages import refuse_headless
from launcher.jobs.steps import place_of
from launcher.jobs.work import Job, signals_kept, work
from launcher.plan.planner import Planner, check_fits
from launcher.plan.preflight import check_data_ready
from launcher.rundir.code import snapshot_code
from launcher.rundir.exits import ExitClass
from launcher.rundir.freeze import open_run, read_config
from launcher.rundir.paths import RunDir
from launcher.rundir.permissions import check_key_file, refuse_world_writable
from launcher.rundir.stop import lower_flag
from launcher.verbs.request import Request

OPTIONS: dict[str, tuple[str, ...]] = {}


def run(words: Sequence[str]) -> int:
    from launcher.verbs.app import run_config_verb

    with signals_kept() as asked:
        start = Start(read_allocation(os.environ), asked, tuple(words))
        if known := remembered(start.allocation):
            return start.again(known)
        return run_config_verb("job", words=start.words_with_nodes(), act=start.first)


@dataclass(frozen=True)
class Start:
    """A start of the job. `asked`: the signals that came; `words`: what stands behind the script."""

    allocation: Allocation
    asked: list[int]
    words: tuple[str, ...]

    def words_with_nodes(self) -> list[str]:
        """The words, and how many nodes there are, so that layout=auto and all rules are about these. In front of the first
        override: Hydra wants them side by side."""
        if said_nodes(self.words):
            return list(self.words)
        place = next((i for i, word in enumerate(self.words) if "=" in word and not word.startswith("-")), len(self.words))
        said = [word.partition("=")[2] for word in self.words if word.lstrip("+").startswith("cluster.spare_nodes=")]
        spare = int(said[-1]) if said and said[-1].isdigit() else 0  # what is no number is Hydra's to refuse
        num_nodes = max(1, len(self.allocation.nodes) - spare)
        return [*self.words[:place], f"cluster.num_nodes={num_nodes}", *self.words[place:]]

    def first(self, request: Request) -> int:
        """Nothing is frozen yet: checks everything, as `phidias train` does."""
        if request.in_sweep:
            rule = "a job trains one run"
            raise ConfigError(Problem("job", "-m", rule, "`phidias submit -m` queues a job for each run of a sweep"))
        config = self.recomposed(request)
        config = fitted_to(config, self.allocation, overrides=self.words)
        check_run(config)
        check_fits(config)
        check_key_file(config)
        prepared = check_data_ready(config)
        refuse_headless(RunDir(Path(config.run.runs_dir) / config.run.name), config)
        run = open_run(config, prepared=prepared, on_change=print)
        lower_flag(run)
        code = snapshot_code(run)
        remember(run, config, allocation=self.allocation, code=code)
        return self.work(Remembered(run, config, code))

    def recomposed(self, request: Request) -> RunConfig:
        """With the spare nodes that a YAML file names taken off."""
        config = request.config
        num_nodes = len(self.allocation.nodes) - config.cluster.spare_nodes
        if said_nodes(self.words) or num_nodes == config.cluster.num_nodes or num_nodes < 1:
            return config
        return compose_run([*request.overrides, f"cluster.num_nodes={num_nodes}"], planner=Planner())

    def again(self, known: Remembered) -> int:
        """A requeue, or a job of `phidias submit`. What was queued before its data was made freezes the order of it now."""
        config = fitted_to(known.config, self.allocation, overrides=())
        if not known.run.order.exists() or config != known.config:
            whole = fitted_to(read_config(known.run), self.allocation, overrides=())
            check_run(whole)
            open_run(whole, prepared=check_data_ready(whole), on_change=print)
        return self.work(Remembered(known.run, config, known.code))

    def work(self, known: Remembered) -> ExitClass:
        refuse_world_writable(known.run)
        check_key_file(known.config)
        place = place_of(known.run, known.config, code=known.code, environment=os.environ)
        return work(Job(known.run, known.config, self.allocation, place, self.asked))
