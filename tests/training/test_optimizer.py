"""The learning rate as a function of samples, which parameters decay, and whose settings hold after a load."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedObject

from launcher.config.schema import StageConfig
from launcher.plan.stage import StagePlan, plan_stage
from launcher.rundir.checkpoints import CheckpointError, Meta, newest_checkpoint
from launcher.rundir.paths import RunDir
from tests.training.tiny import run_config
from tests.training.world import cpu_seams, model, one_rank, stage
from training.checkpoint import Checkpointer, get_rng, layout_key, restore_settings, set_rng
from training.model import build_model
from training.optimizer import build_optimizer, build_schedule, set_schedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LR, MIN_LR = 3e-3, 3e-4
CLUSTER = run_config(Path("unused")).cluster


def plan_of(config: StageConfig) -> StagePlan:
    return plan_stage(config, cluster=CLUSTER)


def groups() -> SimpleNamespace:
    """What the scheduler sees of an optimizer."""
    return SimpleNamespace(param_groups=[dict(wd_mult=1.0), dict(wd_mult=0.0)])


def rates(config: StageConfig) -> list[float]:
    """The learning rate of every step of the stage, in order, as the loop asks for it."""
    plan, batch = plan_of(config), config.stage.global_batch_size
    schedule = build_schedule(config, plan=plan, optimizer=groups())
    return [set_schedule(schedule, samples=(step + 1) * batch) for step in range(plan.num_steps)]


def scheduled(name: str, *, steps: int = 20, warmup: int = 4, batch: int = 8) -> StageConfig:
    tokens = 32.0 * batch
    optim = dict(lr=LR, min_lr=MIN_LR, schedule=name, warmup_tokens=warmup * tokens)
    return stage(stage=dict(global_batch_size=batch, tokens=steps * tokens), optim=optim)


MIDDLE = (LR + MIN_LR) / 2  # half way down, for both shapes


@pytest.mark.parametrize(("name", "half", "quarter", "last"), [
    ("linear", MIDDLE, MIN_LR + 0.75 * (LR - MIN_LR), MIN_LR),
    ("cosine", MIDDLE, MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi / 4)) / 2, MIN_LR),
    ("constant", LR, LR, LR),
])  # fmt: skip
def test_schedule(name: str, half: float, quarter: float, last: float) -> None:
    found = rates(scheduled(name))
    assert len(found) == 20
    assert found[0] == pytest.approx(LR / 4)
    assert found[1] == pytest.approx(LR / 2)
    assert found[3] == pytest.approx(LR)  # the last step of the warm-up
    assert found[4 - 1 + 4] == pytest.approx(quarter)
    assert found[4 - 1 + 8] == pytest.approx(half)
    assert found[-1] == pytest.approx(last)
    assert max(found) == pytest.approx(LR)


@pytest.mark.parametrize(("name", "first"), [("linear", MIN_LR + 0.9 * (LR - MIN_LR)), ("constant", LR)])
def test_without_warm_up_the_first_step_is_the_schedules(name: str, first: float) -> None:
    assert rates(scheduled(name, steps=10, warmup=0))[0] == pytest.approx(first)


@given(
    name=st.sampled_from(["linear", "cosine", "constant"]),
    steps=st.integers(2, 60),
    warmup=st.integers(0, 59),
    batch=st.integers(1, 64),
)
def test_rates_rise_once_and_fall_once_between_their_bounds(name: str, steps: int, warmup: int, batch: int) -> None:
    warmup = min(warmup, steps - 1)
    found = rates(scheduled(name, steps=steps, warmup=warmup, batch=batch))
    top = max(0, warmup - 1)
    assert all(later >= earlier for earlier, later in pairwise(found[: top + 1]))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(found[top:]))
    assert all(0 < rate <= LR * (1 + 1e-9) for rate in found)
    assert found[-1] == pytest.approx(LR if name == "constant" else MIN_LR)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_schedule_is_of_samples_whatever_the_batch(name: str) -> None:
    small, large = rates(scheduled(name, steps=40, warmup=8, batch=8)), rates(scheduled(name, steps=10, warmup=2, batch=32))
    assert small[3::4] == pytest.approx(large)


def test_the_schedule_has_no_state() -> None:
    """A resume asks for one step in the middle, and gets what the run that never stopped got."""
    config = scheduled("cosine")
    schedule = build_schedule(config, plan=plan_of(config), optimizer=groups())
    expected = rates(config)
    for step in (13, 2, 19, 0):
        assert set_schedule(schedule, samples=(step + 1) * 8) == expected[step]


def test_every_group_gets_the_rate_and_its_own_decay() -> None:
    config, optimizer = scheduled("linear"), groups()
    schedule = build_schedule(config, plan=plan_of(config), optimizer=optimizer)
    for samples in (8, 32, 160):
        rate = set_schedule(schedule, samples=samples)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.fixture
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


BIASED = model(mlp_bias=True, attention_bias=True, normalization="layernorm", tied_embeddings=True)


@pytest.mark.parametrize("wanted", [model(), BIASED], ids=["no biases", "biases"])
def test_norms_and_biases_do_not_decay(wanted: Any, seams: None) -> None:
    config = stage(layout=dict(distributed_optimizer=False))
    with one_rank(config.layout):
        (chunk,) = build_model(config, model=wanted, seed=7)
        optimizer = build_optimizer(config, chunks=[chunk])
        set_schedule(build_schedule(config, plan=plan_of(config), optimizer=optimizer), samples=8)
        names = {id(parameter): name for name, parameter in chunk.module.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    expected = {name: 0.0 if "norm" in name or name.endswith("bias") else 0.1 for name in decay}
    assert decay == expected
    assert set(decay.values()) == {0.0, 0.1}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_distributed_optimizer_has_the_same_groups(dtype: str, seams: None) -> None:
    """It holds slices of flat buffers, so the groups are told apart by their sizes."""
    config = stage(precision=dict(params_dtype=dtype))
    with one_rank(config.layout):
        (chunk,) = build_model(config, model=BIASED, seed=7)
        optimizer = build_optimizer(config, chunks=[chunk])
        parameters = [(p.dim() > 1, p.numel()) for p in chunk.parameters()]
        found = {group["wd_mult"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert found == {mult: sum(n for matrix, n in parameters if matrix == bool(mult)) for mult in (0.0, 1.0)}


def test_the_configs_settings_reach_adam(seams: None) -> None:
    config = stage(optim=dict(lr=1e-3, min_lr=1e-5, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3, clip_grad=0.5))
    with one_rank(config.layout):
        optimizer = build_optimizer(config, chunks=build_model(config, model=model(), seed=7))
        for group in optimizer.param_groups:
            assert (group["max_lr"], group["min_lr"], group["betas"], group["eps"]) == (1e-3, 1e-5, (0.8, 0.9), 1e-6)
    (inner,) = optimizer.chained_optimizers
    assert (inner.config.clip_grad, inner.config.weight_decay, inner.config.decoupled_weight_decay) == (0.5, 0.3, True)


OLD = dict(lr=2e-3, min_lr=2e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
NEW = dict(lr=1e-3, min_lr=1e-4, betas=[0.8, 0.99], eps=1e-6, weight_decay=0.02)


def test_after_a_load_the_config_rules(tmp_path: Path, seams: None) -> None:
    """A checkpoint brings the groups it was saved with; an amended optimizer section must win over them."""
    run = RunDir(tmp_path / "run")
    before, after = stage(optim=OLD), stage(optim=NEW)
    with one_rank(before.layout):
        chunks, optimizer = stepped(before)
        saver = Checkpointer(run, stage="pretrain", layout=before.layout, chunks=chunks, optimizer=optimizer)
        saver.save(meta(before), policy=before.stage.checkpoint)
        moments = adam(optimizer).state_dict()["state"]
        chunks, optimizer = build(after)
        loader = Checkpointer(run, stage="pretrain", layout=after.layout, chunks=chunks, optimizer=optimizer)
        saved, _ = newest_checkpoint(run, "pretrain")
        assert saved is not None and set(saved.meta.digests) == set(saved.meta.files) and not loader.damages(saved)
        loader.load(saved, after.optim)
        change_a_byte(next(saved.path.glob("*.distcp")))
        (damage,) = loader.damages(saved)
        assert ".distcp: its content is not what was written" in damage
        rate = set_schedule(build_schedule(after, plan=plan_of(after), optimizer=optimizer), samples=16)
    assert rate == pytest.approx(1e-3)  # the second step of two of warm-up
    for group in optimizer.param_groups:
        assert (group["max_lr"], group["min_lr"], group["eps"]) == (1e-3, 1e-4, 1e-6)
        assert tuple(group["betas"]) == (0.8, 0.99)
        assert group["lr"] == rate
        assert group["weight_decay"] == pytest.approx(0.02 * group["wd_mult"])
        assert group["step"] == 1
    loaded = adam(optimizer).state_dict()["state"]
    assert moments.keys() == loaded.keys()
    assert all(torch.equal(moments[key]["exp_avg"], loaded[key]["exp_avg"]) for key in moments)


def test_what_fp8_keeps_may_be_missing_and_nothing_else(tmp_path: Path, seams: None) -> None:
    """As where a GPU reads a checkpoint of CPU ranks: transformer-engine's modules ask for a state that those have not."""
    run, config = RunDir(tmp_path / "run"), stage()
    with one_rank(config.layout):
        chunks, optimizer = stepped(config)
        checkpointer = Checkpointer(run, stage="pretrain", layout=config.layout, chunks=chunks, optimizer=optimizer)
        checkpointer.save(meta(config), policy=config.stage.checkpoint)
        saved, _ = newest_checkpoint(run, "pretrain")
        assert saved is not None
        weights = checkpointer._model_state()
        lacking = {name: ShardedObject(name, None, (1,), (0,)) for name in ("a.b._extra_state", "a.b.weight")}
        known = checkpointer._read(weights | {"one": lacking["a.b._extra_state"]}, saved.path)
        assert set(weights["model"]) <= set(known["model"])
        with pytest.raises(CheckpointError, match=r"could not be read into this model and layout: it has no a\.b\.weight"):
            checkpointer._read(checkpointer._model_state() | {"one": lacking["a.b.weight"]}, saved.path)


def test_random_numbers_of_another_kind_of_device_are_left(seams: None) -> None:
    with one_rank(stage().layout):
        before = get_rng()
        of_a_gpu = {**before, "cuda": torch.zeros(16, dtype=torch.uint8), "tracker": {"of a GPU": torch.zeros(16)}}
        set_rng(of_a_gpu)
        assert get_rng()["tracker"].keys() == before["tracker"].keys()


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_load_alone_would_bring_the_old_settings(seams: None) -> None:
    """Why restore_settings exists. When megatron stops doing this, it can go."""
    before, after = stage(optim=OLD), stage(optim=NEW)
    with one_rank(before.layout):
        state = stepped(before)[1].state_dict()
        optimizer = build(after)[1]
        optimizer.load_state_dict(state)
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.9, 0.95)}
        restore_settings(optimizer, after.optim)
        assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.99)}


def build(config: StageConfig) -> tuple[list[Any], Any]:
    chunks = build_model(config, model=model(), seed=7)
    return chunks, build_optimizer(config, chunks=chunks)


def adam(optimizer: Any) -> Any:
    return optimizer.chained_optimizers[0].optimizer


def stepped(config: StageConfig) -> tuple[list[Any], Any]:
    """A model after one step on gradients of one."""
    chunks, optimizer = build(config)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1.0)
    optimizer.step()
    return chunks, optimizer


def meta(config: StageConfig) -> Meta:
    return Meta(
        format_version=1, stage="pretrain", step=1, samples=8, tokens=256, finished=False, layout=layout_key(config.layout),
        ledger={}, start_ledger={}, tokens_by_source={}, files={},
    )  # fmt: skip
