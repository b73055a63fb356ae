"""The configs that the GPU benchmarks measure, composed as every command composes them; in a rehearsal the demo's."""

from launcher.config.compose import compose_run
from launcher.config.schema import RunConfig
from launcher.plan.planner import Planner
from launcher.plan.search import describe

GPU = ["cluster.gpu=h200_sxm"]
ONE_GPU = ["cluster=local", "cluster.gpus_per_node=1", *GPU]
APART = ["layout.overlap_grad_reduce=false", "layout.overlap_param_gather=false"]
TINY = ["run=demo", "stage=demo_pretrain", "cluster.gpus_per_node=1"]


def compose(words: list[str]) -> RunConfig:
    return compose_run(words, planner=Planner())


def single_words(*, tiny: bool, precision: str, length: int, layers: int, microbatches: int = 1) -> list[str]:
    """Overrides: the 14B with fewer layers, whole on one device."""
    if tiny:
        words = [*TINY, "layout=dp", *APART]
    else:
        words = ["run=phi4", "stage=pretrain", *ONE_GPU, "layout=dp", "run.stages=[pretrain]"]
    batch = [f"stage.global_batch_size={microbatches}", "layout.micro_batch_size=1"]
    return [*words, *batch, f"precision={precision}", f"model.num_layers={layers}", f"stage.seq_length={length}"]


def best_words(*, stage: str, precision: str) -> list[str]:
    """The layout that the planner likes best for the job on 1,920 H100, as overrides."""
    planner = Planner()
    compose_run(["run=phi4", f"stage={stage}", "layout=auto", f"precision={precision}"], planner=planner)
    return ["layout=dp", *describe(planner.found[stage].best[0].layout).split()]
