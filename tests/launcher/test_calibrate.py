"""Calibration: constants come back from speeds made with them, tables that are wrong are refused by the line, nothing is
overwritten."""

import csv
from dataclasses import asdict, replace

import pytest
import yaml

from launcher.cli import main
from launcher.config.errors import ConfigError
from launcher.plan.calibrate import PRIORS, errors, fit, predict
from launcher.plan.measurements import measurement, read_table

ROW = {
    "model": "LLAMA2-7B", "num_layers": "32", "hidden_size": "4096", "num_attention_heads": "32", "num_query_groups": "32",
    "ffn_hidden_size": "11008", "gated": "yes", "vocab_size": "32000", "gpu": "h100_sxm", "num_gpus": "8",
    "global_batch_size": "128", "micro_batch_size": "1", "seq_length": "4096", "tp": "1", "pp": "1", "cp": "1", "vpp": "1",
    "precision": "fp8_delayed", "tokens_per_s_per_gpu": "16934",
}  # fmt: skip
SHAPES = [
    {},
    {"precision": "bf16"},
    {"tp": "2", "num_gpus": "64", "micro_batch_size": "2", "global_batch_size": "512"},
    {"tp": "4", "pp": "2", "vpp": "4", "num_gpus": "64", "precision": "bf16"},
    {"seq_length": "16384", "cp": "2", "global_batch_size": "64"},
    {"num_gpus": "1024", "tp": "8", "global_batch_size": "256"},
]


@pytest.fixture
def phidias(capsys):
    """Calls the command line; its exit code and what it said."""

    def call(*words):
        code = main(list(words))
        return code, *capsys.readouterr()

    return call


def table(folder, *rows, name="rows.csv"):
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerows([{**ROW, **row} for row in rows])
    return path


def made_with(efficiency):
    rows = [measurement({**ROW, **shape}) for shape in SHAPES]
    return [replace(row, tokens_per_s_per_gpu=predict(row, efficiency=efficiency)) for row in rows]


def test_constants_come_back():
    start = measurement(ROW).hardware.efficiency
    truth = replace(start, gemm_bf16=start.gemm_bf16 * 0.9, gemm_fp8=start.gemm_fp8 * 1.08, memory=start.memory * 1.2)
    rows = made_with(truth)
    before = max(abs(error.error) for error in errors(rows, efficiency=start))
    after = max(abs(error.error) for error in errors(rows, efficiency=fit(rows, start=start)))
    assert before > 0.05 and after < 0.01


def test_what_rows_say_nothing_of_stays():
    start = measurement(ROW).hardware.efficiency
    fitted = fit([measurement({**ROW, "tokens_per_s_per_gpu": "15000"})], start=start)
    assert fitted.gemm_fp8 < start.gemm_fp8
    for name in ("tp_exposed", "gemm_bf16"):  # one FP8 run without tensor parallelism; the LM head alone is in bf16
        assert getattr(fitted, name) == pytest.approx(getattr(start, name), rel=0.02)
    assert set(PRIORS) == {name for name, value in asdict(start).items() if isinstance(value, float)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": "0"}, "division"),
        ({"tokens_per_s_per_gpu": "0"}, "positive numbers"),
        ({"tokens_per_s_per_gpu": "nan"}, "positive numbers"),
        ({"tokens_per_s_per_gpu": "fast"}, "could not convert"),
        ({"pp": "2", "vpp": "2", "global_batch_size": "12"}, "groups of pp"),
        ({"gpu": "a100_sxm"}, "no FP8"),
        ({"gpu": "h300"}, "it names a YAML file"),
        ({"precision": "fp6"}, "it names a YAML file"),
        ({"tp": "64", "num_gpus": "64"}, "must divide model.num_attention_heads"),
        ({"num_layers": "31", "pp": "2"}, "31 layers over pp 2"),
        ({"global_batch_size": "9"}, "multiple of micro_batch_size"),
        ({"seq_length": None}, "invalid literal"),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_line(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=r"rows.csv, line 3: ") as caught:
        read_table(table(tmp_path, {}, changes))
    assert said in str(caught.value)


def test_twelve_gpus_are_twelve(tmp_path):
    (row,) = read_table(table(tmp_path, {"num_gpus": "12", "global_batch_size": "120"}))
    assert row.cluster.world_size == 12


@pytest.mark.parametrize("content", ["", "model,gpu\n", None, b"\xff\xfe\x00"])
def test_a_table_that_is_none_is_refused(content, phidias, tmp_path):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = phidias("calibrate", f"rows={path}", f"out={tmp_path / 'ours'}")
    assert code == 2 and "rows" in err and "Traceback" not in err
    assert not (tmp_path / "ours").exists()


def test_the_verb_writes_what_plan_reads(phidias, tmp_path):
    path, folder = table(tmp_path, {"tokens_per_s_per_gpu": "12000"}), tmp_path / "ours"
    code, out, err = phidias("calibrate", f"rows={path}", f"out={folder}", "name=here")
    assert code == 0, err
    assert "12,000" in out and "written" in out
    efficiency = yaml.safe_load((folder / "efficiency" / "here.yaml").read_text())
    assert efficiency["gemm_fp8"] < measurement(ROW).hardware.efficiency.gemm_fp8
    words = ["run=phi4", "stage=pretrain", "precision=fp8_delayed", "out=json"]
    code, ours, err = phidias("plan", "--config-dir", str(folder), *words, "cluster.gpu=h100_sxm_here")
    assert code == 0, err
    theirs = phidias("plan", *words)[1]
    assert yaml.safe_load(ours)[0]["tokens_per_s_per_gpu"] < yaml.safe_load(theirs)[0]["tokens_per_s_per_gpu"]
    code, _, err = phidias("calibrate", f"rows={path}", f"out={folder}", "name=here")
    assert code == 2 and "must not be overwritten" in err


def test_nothing_to_fit_to(phidias, tmp_path):
    code, _, err = phidias("calibrate", f"out={tmp_path}")
    assert code == 2 and "no measured run" in err
    code, _, err = phidias("calibrate", f"rows={table(tmp_path, {})}")
    assert code == 2 and "out=my_configs" in err
