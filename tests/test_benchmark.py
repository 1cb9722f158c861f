import json
import math
import tarfile

import pytest
import torch

import benchmark
from benchmark import masked_nt_xent
from common import nt_xent_loss

FAST = [
    "--image-size",
    32,
    "--batch-size",
    16,
    "--faces",
    32,
    "--repeats",
    1,
    "--workers",
    2,
    "--device",
    "cpu",
]


def test_every_part_is_measured(tmp_path, cli):
    code, printed, _ = cli("benchmark", *FAST, "--json", tmp_path / "b.json")
    assert code == 0 and "| pretrain  | end to end" in printed
    rows = json.loads((tmp_path / "b.json").read_text())
    assert {row["part"] for row in rows} == {"pretrain", "finetune", "loss", "masks", "split", "evaluate"}
    assert all(math.isfinite(row["rate"]) and row["rate"] > 0 for row in rows)
    rates = {(row["part"], row["name"]): row["rate"] for row in rows}
    for row in rows:
        if row.get("of") == "model":  # with one repeat a ratio of medians is the median of ratios
            assert row["ratio"] == pytest.approx(row["rate"] / rates[row["part"], "model"])


def test_growth_takes_part_of_the_faces_and_all(drawn, tmp_path, cli, refuse, monkeypatch):
    path, calls = tmp_path / "faces.tar.gz", []
    with tarfile.open(path, "w:gz") as packed:
        packed.add(drawn / "dataset/raw", "UTKFace")

    def run_stage(script, *flags, cwd):
        calls.append((script, len(list((cwd / "dataset/raw").iterdir()))))
        return 2.0, 0.5

    monkeypatch.setattr(benchmark, "run_stage", run_stage)
    monkeypatch.setattr(benchmark, "GROWTH", (40, 10**6))
    code, printed, _ = cli("benchmark", "--only", "growth", "--data", path, *FAST)
    stages = ["masks", "split", "pretrain", "finetune", "evaluate"]
    assert code == 0 and calls == [(stage, count) for count in (40, 150) for stage in stages]
    assert printed.count("2.0 s") == 10
    refuse("benchmark", "--only", "growth", *FAST, words=["--data"])


def test_a_stage_is_measured_or_named(tmp_path):
    taken, memory = benchmark.run_stage("synthesize", "--count", 3, cwd=tmp_path)
    assert 0.1 < taken < 600 and 0.05 < memory < 16
    assert len(list((tmp_path / "dataset/raw").iterdir())) == 3
    with pytest.raises(benchmark.UserError, match=r"split\.py"):
        benchmark.run_stage("split", "--input", "nowhere", cwd=tmp_path)


def test_the_straightforward_loss_is_the_same():
    z1, z2 = torch.randn(2, 9, 16)
    assert masked_nt_xent(z1, z2, 0.2).item() == pytest.approx(nt_xent_loss(z1, z2, 0.2).item(), abs=1e-5)
