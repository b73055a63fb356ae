"""The picture of a plan: one file, every figure in it, readable in size, and silent about what nobody predicted."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from launcher.plan.schedule import pipeline_time
from launcher.report import plan_page
from launcher.report.page import ReportError
from launcher.report.plan_figures import draw_memory, draw_time, draw_timeline
from launcher.report.plan_page import render_plan_page, render_plan_picture, write_plan_page

SHAPES = [(2, 2, 12), (1, 1, 8), (8, 6, 64), (16, 8, 128), (4, 1, 3)]


def plan(pp=2, vpp=2, num_microbatches=12, *, name="pretrain", layers=10, capacity=79.2):
    """A stage of the plan document, of the size of phi-4 on H100s."""
    forward = [[layers * 0.0035] * vpp for _ in range(pp)]
    backward = [[2 * seconds for seconds in row] for row in forward]
    forward[0][0], backward[0][0] = forward[0][0] + 0.0003, backward[0][0] + 0.0004
    forward[-1][-1], backward[-1][-1] = forward[-1][-1] + 0.005, backward[-1][-1] + 0.010
    times = dict(num_microbatches=num_microbatches, forward_s=forward, backward_s=backward, send_s=0.0002)
    busy_s = num_microbatches * max(sum(down) + sum(up) for down, up in zip(forward, backward, strict=True))
    bubble_s = pipeline_time(**times) - busy_s
    shares = {"GEMM": 0.62, "attention": 0.14, "memory-bound": 0.13, "TP exposed": 0.09, "CP exposed": 0.0, "PP exposed": 0.02}
    time_s = {key: busy_s * share for key, share in shares.items()}
    time_s |= {"bubble": bubble_s, "DP exposed": 0.031, "optimizer": 0.012, "other": 0.004}
    parts = {"weights": 6.8, "gradients": 13.6, "optimizer": 0.1, "activations": 30.0, "logits": 0.0, "buffers": 2.4}
    rows = [parts | {"activations": 30 - 20 * stage / pp, "logits": 3.1 if stage == pp - 1 else 0.0} for stage in range(pp)]
    by_stage = [{"stage": stage, "total": sum(row.values()), "by_component": row} for stage, row in enumerate(rows)]
    fullest = max(by_stage, key=lambda row: row["total"])
    return {
        "run": "phi4",
        "stage": name,
        "model": "phi4_14b",
        "num_params": 14_659_507_200,
        "cluster": "slurm_h100",
        "world_size": 1920,
        "layout": {"tp": 2, "pp": pp, "vpp": vpp, "cp": 1, "dp": 480},
        "precision": "bf16",
        "seq_length": 4096,
        "global_batch_size": 5760,
        "micro_batch_size": 1,
        "tokens": 9.8e12,
        "num_steps": 415_379,
        "num_microbatches": num_microbatches,
        "tokens_per_s_per_gpu": 4892.0,
        "step_time_s": sum(time_s.values()),
        "model_tflops_per_gpu": {"full": 464.0, "causal": 440.0, "sixn": 430.0},
        "mfu": 0.445,
        "memory_gib": {
            "peak": fullest["total"],
            "capacity": capacity,
            "by_component": fullest["by_component"],
            "by_stage": by_stage,
        },
        "days": 12.1,
        "gpu_hours": 557_000.0,
        "cost_usd": 1_392_500.0,
        "time_s": time_s,
        "pipeline": {"forward_s": forward, "backward_s": backward, "send_s": 0.0002},
        "refusals": [],
    }


def unpredicted():
    """A stage on CPUs: nothing of its speed or memory is known."""
    names = (
        "tokens_per_s_per_gpu",
        "step_time_s",
        "model_tflops_per_gpu",
        "mfu",
        "memory_gib",
        "days",
        "gpu_hours",
        "cost_usd",
    )
    return plan() | dict.fromkeys((*names, "time_s", "pipeline"))


def titles(figure):
    return re.findall(r"<title>([^<]*)</title>", figure.body)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [plan_page.WIDE, plan_page.NARROW])
def test_figures_are_xml_and_nothing_leaves_their_ground(shape, width):
    for draw in (draw_timeline, draw_memory, draw_time):
        figure = draw(plan(*shape), width=width)
        root = ElementTree.fromstring(figure.svg(label="a & b"))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
            assert float(rect.get("x", 0)) + float(rect.get("width")) <= width + 0.2
            assert float(rect.get("y", 0)) + float(rect.get("height")) <= figure.height
        for x in re.findall(r"M(-?[\d.]+) ", figure.body):
            assert 0 <= float(x) <= width


@pytest.mark.parametrize("shape", SHAPES)
def test_page_is_one_small_file_without_a_network(tmp_path, shape):
    write_plan_page(tmp_path / "plan.html", [plan(*shape), plan(*shape, name="midtrain")])
    page = (tmp_path / "plan.html").read_text()
    assert len(page) < 1_000_000
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert all(f'class="stage-name">{name}<' in page for name in ("pretrain", "midtrain"))


def test_timeline_has_a_block_for_each_microbatch_chunk_and_direction():
    figure = draw_timeline(plan(), width=plan_page.WIDE)
    paths = dict(re.findall(r'<path class="(?:for|back)ward"[^>]* d="([^"]*)"><title>([^<]*)</title>', figure.body))
    expected = {f"stage {s}, chunk {c}, {way}" for s in (0, 1) for c in (0, 1) for way in ("forward", "backward")}
    assert set(paths.values()) == expected
    assert all(path.count("M") == 12 for path in paths)
    assert {"DP exposed: 31.0 ms", "optimizer: 12.0 ms", "other: 4.0 ms"} <= set(titles(figure))


def test_long_steps_are_broken_and_say_how_much_is_left_out():
    assert "left out" in draw_timeline(plan(8, 6, 64), width=plan_page.WIDE).body
    assert "left out" not in draw_timeline(plan(), width=plan_page.WIDE).body


def test_memory_shows_every_stage_against_the_device():
    body = draw_memory(plan(), width=plan_page.HALF).body
    assert "device 79.2 GiB" in body and ">52.9<" in body and 'class="over halo"' not in body
    assert draw_memory(plan(capacity=40.0), width=plan_page.HALF).body.count('class="over halo"') == 2
    assert "device" not in draw_memory(plan(capacity=None), width=plan_page.HALF).body


def test_time_is_sorted_and_leaves_out_what_is_nothing():
    body = draw_time(plan(), width=plan_page.HALF).body
    assert body.index(">GEMM<") < body.index(">attention<") < body.index(">optimizer<")
    assert "CP exposed" not in body


def test_headlines_and_refusals_are_on_the_page():
    page = render_plan_page([plan() | {"refusals": ["layout.tp: 3 <does> not divide"], "cost_usd": None}])
    for words in ("4,892", "440 TFLOP/s", "44.5%", "12.1 days", "557,000 GPU hours", "no price", "3 &lt;does&gt; not divide"):
        assert words in page


@pytest.mark.parametrize("stage", [unpredicted(), {k: v for k, v in unpredicted().items() if v is not None}])
def test_what_nobody_predicts_is_said(stage):
    assert "No step time" in render_plan_page([stage])
    assert "No step time" in render_plan_picture([stage])[0]


def test_memory_without_a_time_is_still_drawn():
    page = render_plan_page([unpredicted() | {"memory_gib": plan(capacity=None)["memory_gib"]}])
    assert "No step time" in page and "Memory of a rank" in page


def test_picture_alone_is_one_svg(tmp_path):
    write_plan_page(tmp_path / "plan.svg", [plan(), unpredicted()])
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    assert root.get("width") == str(plan_page.SLIDE)
    assert "--backward" in root.find("{http://www.w3.org/2000/svg}style").text


def test_png_needs_a_browser_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReportError, match=r"PATH has none. Fix: \.svg, or \.html"):
        write_plan_page(tmp_path / "plan.png", [plan()])


@pytest.mark.skipif(
    not any(map(plan_page.shutil.which, plan_page.BROWSERS)),
    reason="no Chromium in PATH: runs where there is one (apt-get install chromium), not in CI",
)
def test_png_is_drawn_by_the_browser(tmp_path):
    write_plan_page(tmp_path / "plan.png", [plan()])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "stages"), [("plan.pdf", [plan()]), ("plan", [plan()]), ("plan.html", [])])
def test_refused_pictures(tmp_path, name, stages):
    with pytest.raises(ReportError, match="Fix"):
        write_plan_page(tmp_path / name, stages)
