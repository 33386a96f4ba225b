"""Tokens per second and GPU, and MFU: by hand, of a run, of a plan, and where they are shown."""

from __future__ import annotations

import pytest
import torch
from support.observed import observe

from megatron_taopd.config.schema import Config, RolloutSection, ServersSection, TeacherSection
from megatron_taopd.monitoring.accounting import ModelCost, Work, step_operations
from megatron_taopd.monitoring.charts import charts_of
from megatron_taopd.monitoring.progress import ProgressLine
from megatron_taopd.monitoring.summary import summarize
from megatron_taopd.monitoring.throughput import Devices, device_peak, throughput

RECORD = {
    "time/step": 10.0,
    "time/rollout": 1.0,  # what was waited; the engine took 4 s
    "rollout/tokens_per_second": 1000.0,
    "time/teacher": 2.0,
    "time/scoring": 0.5,
    "time/training": 1.0,
    "valid_rows": 4000,
    "tokens_rolled_out": 6000,
    "tokens_read": 6400,
    "tokens_scored": 5900,
    "tokens_trained": 3000,
    "flops/rollout": 8e12,
    "flops/teacher": 12e12,
    "flops/scoring": 3e12,
    "flops/training": 10e12,
    "flops/recomputed": 2e12,
}


def test_each_phase_by_hand():
    """Four ranks and two more devices that generate; 100 TFLOPS each."""
    assert throughput(RECORD, Devices(ranks=4, rollout=2, teacher=4, apart=2), 100.0) == {
        "perf/tokens_per_second_per_gpu": 6000 / 10 / 6,
        "perf/tokens_per_second_per_gpu_rollout": 4000 / 4 / 2,
        "perf/tokens_per_second_per_gpu_teacher": 6400 / 2 / 4,
        "perf/tokens_per_second_per_gpu_scoring": 5900 / 0.5 / 4,
        "perf/tokens_per_second_per_gpu_training": 3000 / 1 / 4,
        "perf/mfu": pytest.approx((8 + 12 + 3 + 10 - 2) / 10 / 6 / 100),
        "perf/mfu_rollout": pytest.approx(8 / 4 / 2 / 100),
        "perf/mfu_teacher": pytest.approx(12 / 2 / 4 / 100),
        "perf/mfu_scoring": pytest.approx(3 / 0.5 / 4 / 100),
        "perf/mfu_training": pytest.approx((10 - 2) / 1 / 4 / 100),
    }


def test_what_is_not_known_is_absent():
    devices = Devices(1, 1, 1)
    assert not [key for key in throughput(RECORD, devices, None) if "mfu" in key]
    assert throughput({"time/step": 2.0}, devices, 100.0) == {}  # a step that was skipped
    without = {k: v for k, v in RECORD.items() if k != "rollout/tokens_per_second"}
    found = throughput(without, devices, 100.0)
    assert "perf/mfu" in found and "perf/mfu_rollout" not in found


def test_a_served_teacher_is_measured_by_what_it_took_itself():
    """It reads answers while others are generated, so that hardly anything is waited for."""
    record = RECORD | {"teacher/tokens_per_second": 800.0}
    found = throughput(record, Devices(4, 4, 3), 100.0)
    assert found["perf/mfu_teacher"] == pytest.approx(12 / (6400 / 800) / 3 / 100)


def test_what_is_recomputed_does_not_count():
    cost, lengths = ModelCost(per_token=10, per_pair=1, per_row=5), torch.tensor([4, 2])
    pairs = (1 + 2 + 3 + 4) + (1 + 2)
    for recompute, twice in (("none", 0), ("selective", pairs), ("full", 60 + pairs)):
        work = Work(lengths, lengths, lengths, 3, 2, False, recompute, lengths)
        found = step_operations(cost, cost, work)
        assert found["flops/recomputed"] == twice
        assert found["flops/training"] - twice == 3 * (60 + pairs) + 2 * (3 * 5 + 5)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("a CPU", None),
        ("NVIDIA GeForce RTX 5090", None),
    ],
)
def test_peaks_of_devices(name, bf16):
    assert device_peak(name, "bf16") == bf16
    assert (device_peak(name, "fp32") is None) == (bf16 is None)


def test_devices_of_servers():
    """Eight ranks of two nodes; servers on two of their devices, on two of their own, or found."""
    own = ServersSection(replicas=2, tp=2, gpus=(6, 7, 8, 9))
    found = ServersSection(urls=("http://a:1", "http://b:1", "http://c:1"), tp=4)
    config = Config(rollout=RolloutSection(engine="sglang", servers=own))
    assert Devices.of(config, 16, 8) == Devices(ranks=16, rollout=4, teacher=16, apart=2)
    config = Config(
        rollout=RolloutSection(engine="sglang", servers=ServersSection(tp=4)),
        teacher=TeacherSection(engine="sglang", servers=found),
    )
    assert Devices.of(config, 16, 8) == Devices(ranks=16, rollout=4, teacher=12, apart=12)


def test_a_run_is_measured_against_a_peak(tmp_path):
    """Whose value stands in the configuration; without one there is no MFU on a CPU."""
    options = ["train={steps: 2, recompute: full}", "log.peak_tflops=0.25"]
    seen = observe([f"run.dir={tmp_path}/given", *options])
    peak = 0.25e12
    for record, generated in zip(seen.steps, seen.generated, strict=True):
        spent = {name: record[f"flops/{name}"] for name in ("rollout", "teacher", "scoring")}
        spent["training"] = record["flops/training"] - record["flops/recomputed"]
        assert 0 < record["flops/recomputed"] < spent["training"]
        took = {name: record[f"time/{name}"] for name in ("teacher", "scoring", "training")}
        took["rollout"] = record["valid_rows"] / record["rollout/tokens_per_second"]
        for name, operations in spent.items():
            assert record[f"perf/mfu_{name}"] == pytest.approx(operations / took[name] / peak)
        assert record["perf/mfu"] == pytest.approx(sum(spent.values()) / record["time/step"] / peak)
        batch = generated.batch
        assert record["perf/tokens_per_second_per_gpu"] == pytest.approx(
            len(batch.tokens) / record["time/step"]
        )
        read = len(batch.tokens) - batch.num_sequences  # the last token of each predicts nothing
        assert record["tokens_read"] == record["tokens_scored"] == read
        for name in ("teacher", "scoring"):
            rate = record[f"perf/tokens_per_second_per_gpu_{name}"]
            assert rate == pytest.approx(read / took[name])
    assert "tokens/s/GPU  MFU " in seen.printed

    (record,) = observe([f"run.dir={tmp_path}/absent"]).steps
    assert not [key for key in record if "mfu" in key]
    assert record["perf/tokens_per_second_per_gpu_training"] > 0


def test_the_line_the_summary_and_the_report_show_them():
    perf = {"perf/tokens_per_second_per_gpu": 12_345.0, "perf/mfu": 0.321, "perf/mfu_teacher": 0.4}
    records = [{"step": step, "loss": 1.0, "time/step": 2.0, **perf} for step in (1, 2)]
    assert ProgressLine.text(records[0]).endswith("2 s/step  12.3k tokens/s/GPU  MFU 32.1 %")
    assert "MFU" not in ProgressLine.text({"step": 1, "time/step": 2.0})
    summary = summarize(records)
    assert (summary["tokens_per_gpu"], summary["mfu"]) == (12_345.0, 0.321)
    charts = {chart["title"]: chart for chart in charts_of(records, {}, "")}
    assert "per device 12.3k at step 1" in charts["Tokens per second"]["words"]
    shown = charts["Model FLOPs utilization"]
    assert [label for _, label in shown["legend"]] == ["step", "teacher"]
    assert "Model FLOPs utilization" not in [c["title"] for c in charts_of([{"step": 1}], {}, "")]
