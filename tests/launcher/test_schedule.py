"""Pipeline schedules: the order is Megatron's, and the closed forms are what the simulation counts."""

from itertools import groupby, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from launcher.plan.schedule import (
    chunks_in_flight,
    chunks_in_flight_by_chunk,
    num_warmup,
    pipeline_time,
    rank_order,
    simulate,
)
from launcher.plan.stage import bubble_fraction

# pipeline_time's docstring has what was measured: 1.1% at worst.
TOLERANCE = 0.02


@st.composite
def shapes(draw):
    """(pp, vpp, num_microbatches) that Megatron takes."""
    pp, vpp = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    if pp == 1 or vpp == 1:
        return pp, 1, draw(st.integers(1, 20))
    return pp, vpp, pp * draw(st.integers(1, 4))


@st.composite
def uneven(draw):
    """A real model's pipeline: equal layers, an embedding first, an LM head last, a layer less on the first or last chunk."""
    pp, vpp, num_microbatches = draw(shapes())
    layers, ratio = draw(st.integers(2, 10)), draw(st.floats(1.6, 3.2))
    forward = [[float(layers)] * vpp for _ in range(pp)]
    forward[0][0] -= draw(st.integers(0, 1))
    if pp * vpp > 1:
        forward[-1][-1] -= draw(st.integers(0, 1))
    backward = [[seconds * ratio for seconds in row] for row in forward]
    for seconds, place in ((draw(st.floats(0, 0.15)), 0), (draw(st.floats(0.3, 2.5)), -1)):
        forward[place][place] += seconds
        backward[place][place] += 2 * seconds
    return num_microbatches, forward, backward, draw(st.sampled_from([0.0, 0.01, 0.05])) * layers


def spans_of(num_microbatches, forward_s, backward_s, send_s=0.0):
    pp, vpp = len(forward_s), len(forward_s[0])
    times = dict(forward_s=forward_s, backward_s=backward_s, send_s=send_s)
    return simulate(pp=pp, vpp=vpp, num_microbatches=num_microbatches, **times)


def makespan(*args):
    return max(span.end_s for span in spans_of(*args))


def closed_form(num_microbatches, forward_s, backward_s, send_s=0.0):
    return pipeline_time(num_microbatches=num_microbatches, forward_s=forward_s, backward_s=backward_s, send_s=send_s)


def equal(pp, vpp, *, seconds):
    return [[seconds] * vpp] * pp


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches"), [(2, 2, 12), (4, 3, 4), (8, 6, 64), (3, 2, 9)])
def test_interleaved_order_is_megatrons(pp, vpp, num_microbatches):
    table = get_schedule_table(num_microbatches, vpp, pp)
    for stage in range(pp):
        order = rank_order(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
        assert [(task.microbatch, task.chunk) for task in order if task.forward] == table
        assert [(task.microbatch, vpp - 1 - task.chunk) for task in order if not task.forward] == table


def megatrons_warmup(monkeypatch, *, pp, vpp, num_microbatches, stage):
    names = ("get_pipeline_model_parallel_world_size", "get_pipeline_model_parallel_rank")
    for name, value in (*zip(names, (pp, stage), strict=True), ("get_virtual_pipeline_model_parallel_world_size", vpp)):
        value = None if vpp == 1 and "virtual" in name else value
        monkeypatch.setattr(f"megatron.core.parallel_state.{name}", lambda value=value: value)
    return get_pp_rank_microbatches(num_microbatches, vpp, pp)[2]


@pytest.mark.parametrize(
    ("pp", "vpp", "num_microbatches"), [(1, 1, 3), (4, 1, 2), (4, 1, 9), (2, 2, 12), (4, 3, 4), (8, 6, 64), (3, 2, 9)]
)
def test_warmup_is_megatrons_and_then_forwards_and_backwards_alternate(monkeypatch, pp, vpp, num_microbatches):
    for stage in range(pp):
        shape = dict(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
        warmup = megatrons_warmup(monkeypatch, **shape)
        assert num_warmup(**shape) == warmup
        runs = [len(list(run)) for _, run in groupby(task.forward for task in rank_order(**shape))]
        pairs = num_microbatches * vpp - warmup
        alternating = [warmup + 1, *[1] * (2 * pairs - 2), warmup + 1] if pairs else [warmup, warmup]
        assert runs == alternating


@given(shape=shapes())
def test_every_task_runs_once_and_after_its_input(shape):
    pp, vpp, num_microbatches = shape
    spans = spans_of(num_microbatches, equal(pp, vpp, seconds=1.0), equal(pp, vpp, seconds=2.0), 0.25)
    at = {(span.task.chunk * pp + span.task.stage, span.task.microbatch, span.task.forward): span for span in spans}
    assert len(at) == len(spans) == 2 * pp * vpp * num_microbatches
    for (place, microbatch, forward), span in at.items():
        if forward and place:
            assert span.start_s >= at[place - 1, microbatch, True].end_s + (0.25 if pp > 1 else 0.0)
        if not forward and place == pp * vpp - 1:
            assert span.start_s >= at[place, microbatch, True].end_s
        elif not forward:
            assert span.start_s >= at[place + 1, microbatch, False].end_s + (0.25 if pp > 1 else 0.0)
    for earlier, later in pairwise(spans):
        assert later.task.stage != earlier.task.stage or later.start_s >= earlier.end_s


@given(shape=shapes(), forward=st.floats(0.5, 2), ratio=st.floats(0.5, 4))
def test_bubble_of_equal_stages_is_narayanans(shape, forward, ratio):
    pp, vpp, num_microbatches = shape
    times = (equal(pp, vpp, seconds=forward), equal(pp, vpp, seconds=forward * ratio))
    ideal_s = num_microbatches * vpp * forward * (1 + ratio)
    bubble_s = ideal_s * bubble_fraction(SimpleNamespace(pp=pp, vpp=vpp), num_microbatches=num_microbatches)
    assert makespan(num_microbatches, *times) - ideal_s == pytest.approx(bubble_s, rel=1e-9, abs=1e-9)


@given(shape=shapes(), ratio=st.floats(0.5, 4), send=st.floats(0, 0.1))
def test_closed_form_is_exact_for_equal_stages(shape, ratio, send):
    pp, vpp, num_microbatches = shape
    times = (equal(pp, vpp, seconds=1.0), equal(pp, vpp, seconds=ratio), send)
    assert closed_form(num_microbatches, *times) == pytest.approx(makespan(num_microbatches, *times), rel=1e-9)


@settings(max_examples=300)
@given(case=uneven())
def test_closed_form_is_close_for_uneven_stages(case):
    simulated_s = makespan(*case)
    assert closed_form(*case) == pytest.approx(simulated_s, rel=TOLERANCE)
    assert closed_form(*case) <= simulated_s * (1 + 1e-9)


@given(shape=shapes())
def test_chunks_in_flight_are_what_the_order_holds(shape):
    pp, vpp, num_microbatches = shape
    for stage in range(pp):
        at = dict(pp=pp, vpp=vpp, num_microbatches=num_microbatches, stage=stage)
        held, seen = [0] * vpp, []
        for task in rank_order(**at):
            held[task.chunk] += 1 if task.forward else -1
            seen.append(tuple(held))
        assert chunks_in_flight(**at) == max(map(sum, seen))
        fullest = chunks_in_flight_by_chunk(**at)
        assert set(fullest) <= set(seen) and len(fullest) <= 2 * vpp + 2
        for weights in ([1] * vpp, [3, *[1] * (vpp - 1)], [*[1] * (vpp - 1), 2], list(range(vpp))):
            weighed = [sum(count * weight for count, weight in zip(row, weights, strict=True)) for row in seen]
            assert max(sum(c * w for c, w in zip(row, weights, strict=True)) for row in fullest) == max(weighed)


def test_chunks_in_flight_of_two_published_shapes():
    """Narayanan et al.: 1F1B holds pp microbatches on the first rank; interleaving adds (pp - 1) / (pp * vpp) of that."""
    assert chunks_in_flight(pp=8, vpp=1, num_microbatches=64, stage=0) == 8
    assert chunks_in_flight(pp=8, vpp=4, num_microbatches=64, stage=0) == 8 * 4 + 8 - 1
    assert chunks_in_flight(pp=8, vpp=1, num_microbatches=3, stage=0) == 3


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches"), [(4, 2, 6), (4, 2, 2), (2, 1, 0)])
def test_microbatches_that_megatron_refuses(pp, vpp, num_microbatches):
    times = dict(forward_s=equal(pp, vpp, seconds=1.0), backward_s=equal(pp, vpp, seconds=1.0))
    for run in (lambda **kw: simulate(pp=pp, vpp=vpp, **kw), pipeline_time):
        with pytest.raises(ValueError, match=f"{num_microbatches} microbatches"):
            run(num_microbatches=num_microbatches, **times)
