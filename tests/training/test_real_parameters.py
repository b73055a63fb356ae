"""launcher.plan.parameters against real GPTModels, exactly: every pipeline stage of many layouts, built in this process.

A fake process group makes this process any one rank of a world; models are on the meta device, so phi4_14b takes no memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import parallel_state
from pydantic import TypeAdapter

from launcher.config.schema import ModelConfig, StageConfig
from launcher.plan.parameters import ParameterCount, count_by_stage, count_parameters, layer_parameters
from tests.training.world import cpu_seams, model, one_rank, stage
from training.model import build_chunk, transformer_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODELS = Path(__file__).resolve().parents[2] / "model_configs" / "model"
SMALL = dict(
    num_layers=8, hidden_size=64, num_attention_heads=8, num_query_groups=8, kv_channels=8, ffn_hidden_size=176,
    vocab_size=1003, padded_vocab_size=1024,
)  # fmt: skip
GPT2 = dict(SMALL, activation="gelu", normalization="layernorm", mlp_bias=True, tied_embeddings=True)
GQA = dict(SMALL, num_query_groups=2)
SHAPES: dict[str, dict[str, Any]] = {
    "MHA": SMALL,
    "GQA": GQA,
    "one group": dict(SMALL, num_query_groups=1),
    "wide heads": dict(GQA, kv_channels=24),
    "gelu": dict(SMALL, activation="gelu"),
    "squared relu": dict(GQA, activation="squared_relu"),
    "layernorm": dict(GQA, normalization="layernorm"),
    "attention bias": dict(GQA, attention_bias=True),
    "both biases": dict(GQA, attention_bias=True, mlp_bias=True),
    "tied": dict(GQA, tied_embeddings=True),
    "GPT-2 like": GPT2,
}
# Each shape in each of these: tensor parallelism past the number of groups, pipelines with and without interleaving.
LAYOUTS: list[dict[str, Any]] = [
    {}, dict(tp=2), dict(tp=8, sequence_parallel=True), dict(pp=2), dict(tp=2, pp=4), dict(pp=8), dict(tp=4, pp=2, vpp=2),
    dict(pp=4, vpp=2), dict(tp=2, pp=2, cp=2),
]  # fmt: skip
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
UNEVEN: list[dict[str, Any]] = [
    {"pp": 2, FIRST: 3}, {"pp": 2, LAST: 2}, {"pp": 2, FIRST: 5, LAST: 3}, {"pp": 4, FIRST: 1, LAST: 3, "tp": 2},
    {"pp": 4, LAST: 2}, {"pp": 3, FIRST: 2}, {"pp": 4, "vpp": 2, FIRST: 2, LAST: 2},
    {"pp": 2, EMBEDDING: True, LOSS: True}, {"pp": 5, EMBEDDING: True, LOSS: True, "tp": 2}, {"pp": 3, EMBEDDING: True},
    {"pp": 3, LOSS: True}, {"pp": 5, "vpp": 2, EMBEDDING: True, LOSS: True},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


def part(name: str) -> str:
    return "embedding" if name.startswith("embedding.") else "layers" if ".layers." in name else "head"


def built(wanted: ModelConfig, config: StageConfig) -> ParameterCount:
    """What the present rank holds in all its chunks, by part."""
    counts = dict.fromkeys(("embedding", "layers", "head"), 0)
    megatron, vpp = transformer_config(config, model=wanted), config.layout.vpp
    for vp_stage in range(vpp) if vpp > 1 else [None]:
        with torch.device("meta"):
            chunk = build_chunk(config, model=wanted, config=megatron, vp_stage=vp_stage)
        for name, parameter in chunk.named_parameters():
            counts[part(name)] += parameter.numel()
    return ParameterCount(**counts)


def assert_planned(wanted: ModelConfig, layout: dict[str, Any]) -> None:
    """The first tensor-parallel rank of every pipeline stage, and the last one of the last stage."""
    config = stage(layout=layout)
    world_size = config.layout.model_parallel_size
    planned = count_by_stage(wanted, layout=config.layout)
    assert len(planned) == config.layout.pp
    for rank in {*range(0, world_size, world_size // config.layout.pp), world_size - 1}:
        with one_rank(config.layout, rank=rank, world_size=max(2, world_size)) as place:
            assert built(wanted, config) == planned[place.pp_rank], (rank, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_holds_what_the_plan_says(shape: str, layout: dict[str, Any]) -> None:
    assert_planned(model(**SHAPES[shape]), layout)


@pytest.mark.parametrize("layout", UNEVEN, ids=str)
@pytest.mark.parametrize("shape", ["both biases", "GPT-2 like"])
def test_uneven_stages(shape: str, layout: dict[str, Any]) -> None:
    assert_planned(model(**SHAPES[shape]), layout)


@pytest.mark.parametrize("name", ["phi4_14b", "llama3_8b"])
@pytest.mark.parametrize("layout", [{}, dict(tp=2, pp=4), dict(tp=2, pp=8), dict(pp=4, vpp=2)], ids=str)
def test_released_models_at_their_real_size(name: str, layout: dict[str, Any]) -> None:
    wanted = TypeAdapter(ModelConfig).validate_python(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))
    assert_planned(wanted, layout)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_is_the_sum_of_its_stages(shape: str) -> None:
    """Over a pipeline alone, stages add up to the model, and once more the table where it is tied."""
    wanted = model(**SHAPES[shape])
    stages = count_by_stage(wanted, layout=stage(layout=dict(pp=4)).layout)
    again = wanted.padded_vocab_size * wanted.hidden_size if wanted.tied_embeddings else 0
    assert sum(count.total for count in stages) == count_parameters(wanted).total + again


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_layer(shape: str, tp: int) -> None:
    wanted, config = model(**{**SHAPES[shape], "num_layers": 1}), stage(layout=dict(tp=tp))
    with one_rank(config.layout, world_size=2 * tp):
        assert parallel_state.get_tensor_model_parallel_world_size() == tp
        assert built(wanted, config).layers == layer_parameters(wanted, tp=tp)
