"""What launcher.rundir.reshard says of Megatron's buckets, against Megatron."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir.reshard import bucket_size
from tests.training import tiny
from tests.training.world import cpu_seams, model, one_rank, stage
from training.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({}, 60),
        ({"overlap_grad_reduce": True}, 4),
        ({"overlap_grad_reduce": True}, 60),
        ({"overlap_grad_reduce": True, "tp": 2, "cp": 2}, 240),
    ],
)
def test_buckets_are_as_large_as_megatrons(layout: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    config, cluster = stage(layout=layout), tiny.run_config(tmp_path, ranks=ranks).cluster
    with one_rank(config.layout, world_size=ranks):
        (chunk,) = build_model(config, model=model(), seed=1)
        assert chunk.ddp_config.bucket_size == bucket_size(config.layout, cluster=cluster)
