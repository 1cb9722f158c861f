import json

import pytest
import torch

import table
from common import load_checkpoint, run

FLAGS = ["--device", "cpu", "--workers", 0]
CONFIG = """
pretrain: {epochs: 1, image-size: 32, batch-size: 16}
finetune: {epochs: 1, image-size: 32, batch-size: 16}
"""


@pytest.fixture
def calls(monkeypatch):
    """Runs the stages in this process, where each would cost seconds of imports; collects their names."""
    made = []

    def call(script, *flags):
        module = __import__(script)
        made.append((script, module.get_parser().parse_args([str(flag) for flag in flags]).out))
        try:
            run(module.main, module.get_parser(), [str(flag) for flag in flags])
        except SystemExit:
            return f"{script}.py: error: it failed"

    monkeypatch.setattr(table, "call", call)
    return made


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


def test_trains_a_row_for_each_choice_and_reports_what_fails(drawn, tmp_path, cli, calls, no_network):
    (tmp_path / "c.yaml").write_text(CONFIG)
    flags = ["--data", drawn / "dataset/processed_split", "--config", tmp_path / "c.yaml", *FLAGS]
    flags += ["--weights", "imagenet", "age", "--lr-strategies", "differentiated", "--seeds", 3]
    code, out, _ = cli("table", *flags, cwd=tmp_path)
    assert code == 0 and "2 models, 2 not trained" in out.splitlines()[-1]
    assert [script for script, _ in calls] == ["pretrain", *["finetune"] * 4, "evaluate"]
    text = (tmp_path / "results/table.md").read_text()
    for row in ("| differentiated | classification | contrastive (age) |", "| differentiated | multitask |"):
        assert row in text
    names = [f"{task}-imagenet-differentiated-seed3" for task in ("classification", "multitask")]
    assert f"Not trained: {', '.join(names)} (finetune.py: error: it failed)" in text
    pretrained = load_checkpoint(tmp_path / "table/contrastive-age-seed3.pt", "contrastive")
    for task in ("classification", "multitask"):
        checkpoint = load_checkpoint(tmp_path / f"table/{task}-age-differentiated-seed3.pt", "model")
        assert checkpoint["pretraining"] == pretrained["config"]
        assert (checkpoint["config"]["seed"], checkpoint["config"]["epochs"]) == (3, 1)
        assert (checkpoint["config"]["multitask"], checkpoint["config"]["lr_strategy"]) == (
            task == "multitask",
            "differentiated",
        )
        assert json.loads((tmp_path / f"results/{task}-age-differentiated-seed3/metrics.json").read_text())

    before = {
        path: torch.load(path, weights_only=True)["weights"] for path in (tmp_path / "table").glob("m*3.pt")
    }
    code, out, _ = cli("table", *flags, "--tasks", "multitask", cwd=tmp_path)  # done: nothing is trained
    assert code == 0 and "resumed" in out and "epoch 1/1" not in out
    assert len(before) == 1
    for path, weights in before.items():
        after = torch.load(path, weights_only=True)["weights"]
        assert all(torch.equal(weights[key], after[key]) for key in weights)


def test_a_failed_pretraining_takes_its_rows_with_it(tmp_path, cli, calls, refuse):
    code, _, err = cli("table", "--data", tmp_path / "none", "--seeds", 0, *FLAGS, cwd=tmp_path)
    assert code == 2 and err.splitlines()[-1].startswith("table.py: error: no row was trained")
    assert [script for script, _ in calls] == ["pretrain", "pretrain", *["finetune"] * 8]
    refuse("table", "--weights", "view", "none", words=["--weights"], cwd=tmp_path)
    refuse("table", "--seeds", -1, words=["--seeds"], cwd=tmp_path)


def test_call_returns_the_error_of_a_script(capfd):
    error = table.call("split", "--input", "nowhere", "--fractions", 1, 1, 1)
    assert error.startswith("split.py: error: --fractions sum to 3")
    printed = capfd.readouterr()
    assert "$ python split.py --input nowhere --fractions 1 1 1" in printed.out and error in printed.err
