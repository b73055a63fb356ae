"""One rank of a pretended world: what it holds is what the planner counts, what it computes is what training computes."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.profiler import ProfilerActivity, profile

from launcher.config.schema import StageConfig
from launcher.plan.parameters import count_by_stage
from tests.training import tiny
from tests.training.shards import write_sources
from tests.training.world import cpu_seams, one_rank, rerun_state_machine
from training.data import StageData, TrainingFeed
from training.kernels import kernel_table, kind_of
from training.model import build_model
from training.optimizer import build_optimizer, build_schedule, set_schedule
from training.rehearse import (
    Rehearsal,
    activation_shape,
    build_rehearsal,
    measure,
    plan_stage,
    pretended_rank,
    profiled,
    random_batches,
    random_documents,
    rehearsed_stage,
)
from training.standin import StandInGroup, StandIns
from training.step import Stepper


@pytest.fixture(autouse=True)
def seams():
    with cpu_seams():
        yield


def config_of(tmp_path, *, world, **layout):
    """The tiny model over a pretended world, two microbatches for each pipeline stage."""
    parts = {"tp": 1, "pp": 1, "cp": 1, **layout}
    dp = world // (parts["tp"] * parts["pp"] * parts["cp"])
    stage = tiny.stage_config(layout=layout, stage={"global_batch_size": 2 * parts["pp"] * dp})
    return tiny.run_config(tmp_path, ranks=world, stages=[stage])


@contextmanager
def rehearsal_of(config, *, rank, **options) -> Rehearsal:
    threads, stage = torch.get_num_threads(), rehearsed_stage(config.stages[0])
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), pretended_rank(config, stage=stage, rank=rank) as (placed, world):
            yield build_rehearsal(config, stage=stage, rank=placed, world=world, **options)
    finally:
        rerun_state_machine.destroy_rerun_state_machine()
        torch.set_num_threads(threads)


LAYOUTS = {
    "interleaved": (16, dict(tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True), (0, 3, 8, 15)),
    "deep": (16, dict(pp=4, distributed_optimizer=False), (0, 5, 8, 15)),
    "1920": (1920, dict(tp=2, pp=2, cp=2, overlap_grad_reduce=True, overlap_param_gather=True), (0, 1001)),
}


@pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name, (_, _, ranks) in LAYOUTS.items() for rank in ranks], ids=lambda value: str(value)
)
def test_a_rank_of_each_pipeline_stage_steps_and_holds_what_is_planned(tmp_path, name, rank):
    world, layout, _ = LAYOUTS[name]
    config = config_of(tmp_path, world=world, **layout)
    stage = config.stages[0]
    with rehearsal_of(config, rank=rank) as rehearsal:
        measured = measure(rehearsal, steps=2, warmup=1)
        gradients = [buffer.grad_data for chunk in rehearsal.chunks for buffer in chunk.buffers]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.abs().sum() > 0 for gradient in gradients)
    assert measured["problems"] == []
    pipeline_stage = measured["pipeline_stage"]
    assert pipeline_stage == rank // (world // stage.layout.pp)
    assert measured["num_params"] == count_by_stage(config.model, layout=stage.layout)[pipeline_stage].total
    assert measured["memory_bytes"]["weights"] == 4 * measured["num_params"]
    for row in measured["steps"]:
        knows_loss = pipeline_stage == stage.layout.pp - 1 and measured["tp_rank"] == 0
        assert (row["loss"] is not None) == knows_loss
        assert row["loss"] is None or math.isfinite(row["loss"])
        assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
        inside = sum(row["stand_in_s"].values())
        assert 0 < inside < row["step_s"]
        assert row["forward_s"] + row["backward_s"] <= row["gradients_s"] <= row["step_s"]
        assert row["stand_in_s"]["forward"] <= row["forward_s"] and row["stand_in_s"]["backward"] <= row["backward_s"]


def test_the_replicas_shares_of_the_optimizer_are_the_whole(tmp_path):
    config = config_of(tmp_path, world=8, tp=2, cp=2)
    shares = []
    for rank in (0, 2, 4, 6):  # the same weights: dp 2 x cp 2
        with rehearsal_of(config, rank=rank) as rehearsal:
            rehearsal.step()
            bytes_held = sum(
                tensor.numel() * tensor.element_size()
                for state in rehearsal.optimizer.chained_optimizers[0].optimizer.state.values()
                for tensor in state.values()
            )
            shares.append(measure(rehearsal, steps=1, warmup=0)["memory_bytes"]["optimizer"])
            assert shares[-1] == bytes_held
    count = count_by_stage(config.model, layout=config.stages[0].layout)[0].total
    assert sum(shares) == 8 * count
    assert max(shares) < 1.1 * 8 * count / 4


def test_main_weights_in_fp32_count_as_the_optimizers(tmp_path):
    stage = tiny.stage_config(precision=dict(name="bf16", params_dtype="bf16"))
    config = tiny.run_config(tmp_path, stages=[stage])
    with rehearsal_of(config, rank=0) as rehearsal:
        measured = measure(rehearsal, steps=1, warmup=0)
    count = measured["num_params"]
    held = measured["memory_bytes"]
    assert (held["weights"], held["gradients"] // count, held["optimizer"]) == (2 * count, 4, 12 * count)


def test_a_world_of_one_computes_what_training_computes(tmp_path):
    config = tiny.run_config(tmp_path)
    stage = config.stages[0]
    with rehearsal_of(config, rank=0) as rehearsal:
        rehearsed = [(row["loss"], row["grad_norm"]) for row in (rehearsal.step() for _ in range(3))]
    with one_rank(stage.layout, seed=config.run.seed) as rank:
        chunks = build_model(stage, model=config.model, seed=config.run.seed, quick=True)
        optimizer, plan = build_optimizer(stage, chunks=chunks), plan_stage(stage, cluster=config.cluster)
        schedule = build_schedule(stage, plan=plan, optimizer=optimizer)
        stepper = Stepper(stage, chunks=chunks, optimizer=optimizer, rank=rank)
        batches = random_batches(config, stage=stage, rank=rank, num_microbatches=plan.num_microbatches)
        trained = []
        for step in range(3):
            set_schedule(schedule, samples=(step + 1) * stage.stage.global_batch_size)
            sums, norm = stepper.train(batches(step), num_microbatches=plan.num_microbatches)
            trained.append((sums.loss, norm))
    assert rehearsed == trained
    assert trained[-1][0] < trained[0][0]


def test_quick_weights_have_the_distribution_of_the_others(tmp_path):
    config = tiny.run_config(tmp_path)
    with rehearsal_of(config, rank=0) as rehearsal:
        quick = dict(rehearsal.chunks[0].module.named_parameters())
        with torch.no_grad():
            found = {name: (float(p.std()), float(p.mean())) for name, p in quick.items() if p.dim() > 1}
        ones = [p for name, p in quick.items() if p.dim() == 1]
    std = config.model.init_method_std
    for name, (deviation, mean) in found.items():
        scale = 1 / math.sqrt(2 * config.model.num_layers) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1
        assert deviation == pytest.approx(std * scale, rel=0.05) and abs(mean) < 0.1 * std
    assert all((p == 1).all() for p in ones)


# What stands in


@pytest.fixture
def group():
    world = StandIns(torch.device("cpu"), seed=3, shape_SBH=(5, 1, 64))
    dist.Backend.register_backend(
        "standin", lambda store, rank, size, timeout: StandInGroup(rank, size, world=world), devices=["cpu", "cuda"]
    )
    dist.init_process_group("standin", store=dist.HashStore(), rank=1, world_size=3)
    yield dist.group.WORLD
    dist.destroy_process_group()


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


@pytest.mark.parametrize("op", [dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG])
def test_a_reduction_leaves_the_own_value(group, op):
    tensor = values(1, 2)
    assert dist.all_reduce(tensor, op=op, async_op=True).wait()
    dist.broadcast(tensor, src=0)
    dist.barrier()
    assert tensor.equal(values(1, 2))


def test_a_count_that_another_rank_knows_is_one(group):
    """Megatron divides gradients by the tokens that the last pipeline stage counted: where there are none it does not."""
    own, others = torch.tensor(0, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    dist.broadcast(own, src=1)
    dist.broadcast(others, src=2)
    assert (int(own), int(others)) == (0, 1)


def test_a_gather_repeats_the_own_part(group):
    own, whole, parts = values(1, 2), torch.zeros(6), [torch.zeros(2) for _ in range(3)]
    dist.all_gather_into_tensor(whole, own)
    dist.all_gather(parts, own)
    assert whole.equal(values(1, 2, 1, 2, 1, 2)) and torch.cat(parts).equal(whole)
    objects = [None] * 3
    dist.all_gather_object(objects, {"own": 1})
    assert objects == [{"own": 1}] * 3


def test_a_gather_in_place_leaves_the_others(group):
    whole = torch.arange(6.0)
    dist.all_gather_into_tensor(whole, whole[2:4])
    assert whole.equal(torch.arange(6.0))


def test_a_scatter_takes_the_own_slice(group):
    whole, own = torch.arange(6.0), torch.zeros(2)
    dist.reduce_scatter_tensor(own, whole)
    assert own.equal(values(2, 3))
    dist.reduce_scatter_tensor(whole[2:4], whole)
    dist.reduce_scatter(own, [values(1, 1), values(7, 8), values(2, 2)])
    assert own.equal(values(7, 8)) and whole.equal(torch.arange(6.0))


def test_an_all_to_all_gives_back(group):
    output = torch.zeros(3)
    dist.all_to_all_single(output, values(1, 2, 3))
    assert output.equal(values(1, 2, 3))
    with pytest.raises(NotImplementedError):
        dist.all_to_all_single(torch.zeros(2), values(1, 2, 3), output_split_sizes=[1, 1, 0], input_split_sizes=[1, 1, 1])


def test_what_is_received_is_drawn_at_random(group):
    first, second, shape = torch.zeros(10_000), torch.zeros(10_000, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    operations = [dist.P2POp(dist.isend, values(1), 2), dist.P2POp(dist.irecv, first, 0), dist.P2POp(dist.irecv, second, 2)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for tensor in (first, second.float()):
        assert abs(float(tensor.mean())) < 0.05 and float(tensor.std()) == pytest.approx(1, abs=0.05)
    dist.recv(shape, src=0)
    assert shape.tolist() == [5, 1, 64]
    other = torch.ones(4, dtype=torch.int32)
    dist.recv(other, src=0)
    assert not other.any()


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_coalesced_collectives_are_these(group, device):
    outputs = [torch.zeros(6), torch.zeros(3)]
    with _coalescing_manager(group, device=device, async_ops=True) as manager:
        dist.all_gather_into_tensor(outputs[0], values(1, 2))
        dist.all_gather_into_tensor(outputs[1], values(4))
    manager.wait()
    assert outputs[0].equal(values(1, 2, 1, 2, 1, 2)) and outputs[1].equal(values(4, 4, 4))
    own = torch.zeros(1)
    with _coalescing_manager(group, device=device):
        dist.reduce_scatter_tensor(own, values(1, 2, 3))
    assert own.item() == 2


def test_standing_in_is_measured_by_phase(group):
    meter = group.world.meter
    meter.take()
    meter.phase = "backward"
    dist.all_gather_into_tensor(torch.zeros(3), values(1))
    taken = meter.take()
    assert taken["backward"] > 0 and taken["forward"] == taken["other"] == 0
    dist.all_reduce(values(1))
    assert not any(meter.take().values())


# Data and kernels


def test_random_documents_need_no_padding():
    config = tiny.stage_config(layout={"cp": 2}, stage={"seq_length": 4096, "reset_attention_mask": True})
    stage = TypeAdapter(StageConfig).validate_python(config)
    documents = np.stack([random_documents(stage, generator=np.random.default_rng(seed)) for seed in range(20)])
    assert documents.shape == (20, 4096)
    borders = np.flatnonzero(np.diff(documents.ravel())) + 1
    assert not (borders % 4).any()
    assert 300 < np.diff(borders).mean() < 1500


def test_documents_apart_are_rehearsed(tmp_path):
    stage = tiny.stage_config(stage={"reset_attention_mask": True, "reset_position_ids": True}, layout={"pp": 2})
    config = tiny.run_config(tmp_path, ranks=2, stages=[stage])
    with rehearsal_of(config, rank=1) as rehearsal:
        batch = rehearsal.batches(0)[0]
        assert batch.document_BT is not None
        assert measure(rehearsal, steps=1)["problems"] == []


def test_prepared_shards_are_read_as_training_reads_them(tmp_path):
    write_sources(tmp_path / "data")
    config = config_of(tmp_path, world=4, tp=2)
    stage = config.stages[0]
    with rehearsal_of(config, rank=2, real_data=True) as rehearsal:
        feed = TrainingFeed(StageData(config, stage, ledger={}), stage, rank=rehearsal.rank)
        for step in range(2):
            rows, batches = feed.batch(step * stage.stage.global_batch_size), rehearsal.batches(step)
            assert [row.tokens_BS.tolist() for row in rows] == [batch.tokens_BS.tolist() for batch in batches]
        assert rehearsal.step()["loss"] is None, "the other half of the vocabulary has labels' logits too"
    with rehearsal_of(config_of(tmp_path, world=2), rank=1, real_data=True) as rehearsal:
        assert math.isfinite(rehearsal.step()["loss"])


def test_random_labels_are_of_the_ranks_part_of_the_vocabulary(tmp_path):
    config = config_of(tmp_path, world=2, tp=2)
    for rank, (low, high) in enumerate([(0, 127), (128, 249)]):
        with rehearsal_of(config, rank=rank) as rehearsal:
            labels = torch.cat([batch.labels_BS for batch in rehearsal.batches(0)])
            tokens = torch.cat([batch.tokens_BS for batch in rehearsal.batches(0)])
        assert low <= int(labels.min()) and int(labels.max()) <= high
        assert int(tokens.min()) < 128 <= int(tokens.max()) < 250


def test_the_next_stage_is_told_its_part_of_the_sequence():
    config = tiny.stage_config(layout={"cp": 2, "tp": 2, "sequence_parallel": True, "micro_batch_size": 3})
    stage = TypeAdapter(StageConfig).validate_python(config)
    assert activation_shape(stage, hidden_size=64) == (8, 3, 64)
    alone = replace(stage, layout=replace(stage.layout, tp=1, cp=1, sequence_parallel=False))
    assert activation_shape(alone, hidden_size=64) == (32, 3, 64)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
        ("aten::addmm", "gemm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mul", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_profile_names_what_took_the_time(tmp_path):
    config = config_of(tmp_path, world=4, tp=2, pp=2)
    with rehearsal_of(config, rank=2) as rehearsal:
        table, groups = profiled(rehearsal)
    assert set(groups) == {"gemm", "attention", "stand_in", "other"}
    assert all(seconds > 0 for seconds in groups.values())
    assert "aten::mm" in table or "aten::addmm" in table


def test_an_empty_profile_is_a_table_too():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        pass
    _, groups = kernel_table(profiler.key_averages(), on_gpu=False)
    assert groups["gemm"] == 0
