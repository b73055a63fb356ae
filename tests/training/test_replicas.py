"""Damaged weights are seen and the rank that holds them is named, in a real gloo world; a step computed twice."""

import math
from typing import Any

import pytest
import torch

import tests.training.world  # noqa: F401  (megatron warns when it is first imported)
from tests.training.health_ranks import DAMAGES, LAYOUTS, run_world
from training.replicas import CHUNK_BYTES, COLUMNS, digest, minority, same_result

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_world(tmp_path_factory.mktemp("world"), world_size=6, cases=[f"replicas:{name}" for name in LAYOUTS])


@pytest.mark.parametrize("name", LAYOUTS)
def test_sound_weights_agree(name: str, world: list[dict[str, Any]]) -> None:
    """Tensor-parallel twins and pipeline stages hold others; so did some rank, before its bit was flipped back."""
    found = world[0][f"replicas:{name}"]["found"]
    assert found[0] == found[-1] == [] and len(found) == len(DAMAGES[name]) + 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_learns_the_same(name: str, world: list[dict[str, Any]]) -> None:
    results = [each[f"replicas:{name}"] for each in world]
    assert all(result == results[0] for result in results)
    assert results[0]["where"] == [1, 5]


def odd_of(world: list[dict[str, Any]], name: str) -> list[list[tuple[list[int], list[int]]]]:
    """Of each damage: the replicas, and who of them is named."""
    found = world[0][f"replicas:{name}"]["found"][1:-1]
    return [[(one["replicas"], one["odd"]) for one in each] for each in found]


def test_of_three_replicas_the_odd_one_is_named(world: list[dict[str, Any]]) -> None:
    ones, twos = [0, 2, 4], [1, 3, 5]
    assert odd_of(world, "tp2_dp3") == [
        [(twos, [3])],
        [(ones, [4])],
        [(ones, [0]), (twos, [1])],  # of both tensor-parallel halves
        [],  # all hold the same wrong weight: no comparison shows that
        [(ones, [2])],  # two are wrong alike: most are not always right
    ]


def test_of_two_replicas_nobody_is_named(world: list[dict[str, Any]]) -> None:
    assert odd_of(world, "pp3_dp2") == [[([2, 3], [])], [([4, 5], [])]]
    text = world[0]["replicas:pp3_dp2"]["found"][1][0]["text"]
    assert text == (
        "of ranks 2, 3, one of them, which cannot be told, differ in 1 parameters: decoder.layers.2.mlp.linear_fc2.weight"
    )


def test_context_parallel_ranks_hold_the_same_weights_too(world: list[dict[str, Any]]) -> None:
    everyone = list(range(6))
    assert odd_of(world, "cp2_dp3") == [[(everyone, [1, 4])], [(everyone, [])]]


def test_the_majority() -> None:
    assert minority([7, 7, 9], replicas=[0, 4, 8]) == {8}
    assert minority([7, 9], replicas=[0, 4]) == set()
    assert minority([7, 7, 9, 9], replicas=[0, 1, 2, 3]) == set()
    assert minority([7, 8, 9], replicas=[0, 1, 2]) == set()
    assert minority([7, 7, 7, 8, 9], replicas=[0, 1, 2, 3, 4]) == {3, 4}


def number(tensor: torch.Tensor) -> int:
    return int(digest([tensor]).item())


@pytest.mark.parametrize("numel", [1, 7, 8, 100, COLUMNS, 5 * COLUMNS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_every_flipped_bit_shows(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw, before = tensor.view(torch.uint8), number(tensor)
    for byte in {0, 1, len(raw) // 2, len(raw) - 1} & set(range(len(raw))):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert number(tensor) != before
            raw[byte] ^= 1 << bit
    assert number(tensor) == before


def test_two_flips_of_the_highest_bit_do_not_cancel() -> None:
    """A stuck line flips the same bit of many words."""
    words = torch.arange(10 * COLUMNS)
    before = number(words)
    words[[3, 400]] ^= -(2**63)
    assert number(words) != before


@pytest.mark.parametrize(("first", "last"), [(0, 1), (5, 4000), (1024, 2048), (2**15, 2**16)])
def test_words_that_changed_places_show(first: int, last: int) -> None:
    words = torch.randint(2**62, (2**16 + 1,), generator=torch.Generator().manual_seed(1))
    before = number(words)
    words[[first, last]] = words[[last, first]]
    assert number(words) != before


def test_a_tensor_that_begins_amid_a_word() -> None:
    """It is widened in pieces; its digest is its own, and says as much."""
    values = torch.randn(CHUNK_BYTES, generator=torch.Generator().manual_seed(1), dtype=torch.float32).bfloat16()
    part = values[1:]
    before = number(part)
    part[-1] *= -1
    assert number(part) != before
    part[-1] *= -1
    part[7] *= -1
    assert number(part) != before


def test_the_bytes_of_an_fp8_parameter() -> None:
    """transformer-engine keeps them in an attribute; as a tensor it is what they mean."""
    parameter = torch.zeros(64)
    parameter._data = torch.zeros(64, dtype=torch.uint8)  # type: ignore[attr-defined]
    before = number(parameter)
    parameter._data[5] = 1  # type: ignore[attr-defined]
    assert number(parameter) != before == number(torch.zeros(64, dtype=torch.uint8))


def test_shapes_do_not_matter() -> None:
    tensor = torch.randn(6, 4)
    assert number(tensor) == number(tensor.view(-1)) == number(torch.nn.Parameter(tensor))
    assert number(torch.tensor(3.0)) != number(torch.zeros(0))


def test_each_tensor_has_a_digest_of_its_own() -> None:
    tensors = [torch.randn(count) for count in (1, 3000, 7)]
    assert digest(tensors).tolist() == [number(tensor) for tensor in tensors]


@pytest.mark.parametrize(
    ("first", "again", "same"),
    [
        ((2.0, 1.0), (2.0, 1.0), True),
        ((2.0, None), (2.0, None), True),
        ((2.0, 1.0), (2.001, 1.0), True),
        ((2.0, 1.0), (2.0, 1.1), False),
        ((2.0, 1.0), (2.1, 1.0), False),
        ((2.0, 1.0), (math.nan, 1.0), False),
        ((math.nan, math.nan), (math.nan, math.nan), True),
        ((math.inf, 1.0), (-math.inf, 1.0), False),
        ((math.inf, 1.0), (math.nan, 1.0), False),
        ((2.0, None), (2.0, 1.0), False),
        ((0.0, 0.0), (0.0, -0.0), True),
    ],
)
def test_a_step_computed_twice(first: tuple[float, float], again: tuple[float, float], same: bool) -> None:
    assert same_result(first, again, tolerance=1e-3) is same
    assert same_result(again, first, tolerance=1e-3) is same


def test_without_a_tolerance_the_results_are_equal() -> None:
    assert same_result((2.0, 1.0), (2.0, 1.0), tolerance=0.0)
    assert not same_result((2.0, 1.0), (math.nextafter(2.0, 3.0), 1.0), tolerance=0.0)
