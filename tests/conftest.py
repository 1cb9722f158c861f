"""What the tests share: the scripts' command lines, and a few drawn faces taken through masks and split."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads cost time where pictures are as small as here

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from cli import TOOLS, run
from small_model import small_backbone

# Training at its smallest.
FAST = ["--image-size", 32, "--batch-size", 16, "--workers", 0, "--device", "cpu"]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Calls a script as its command line would, in this process: (exit code, stdout, stderr)."""

    def call(script, *arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        module = importlib.import_module(script)
        capsys.readouterr()
        try:
            run(module.main, module.get_parser(), [str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(cli):
    """Checks that a command line ends with exit code 2 and one line on stderr that says all of `words`."""

    def call(script, *arguments, words, cwd=None):
        code, _, err = cli(script, *arguments, cwd=cwd)
        assert code == 2
        assert err.startswith(f"{script}.py: error: ") and err.count("\n") == 1
        for word in words:
            assert word in err, err

    return call


@pytest.fixture
def small_model(monkeypatch):
    """A model that trains in no time, where what is learned does not matter."""
    for module in ("common", "pretrain"):
        monkeypatch.setattr(f"{module}.resnet18", small_backbone)


def script_path(script):
    """Where `<script>.py` lies."""
    return ROOT / ("tools" if script in TOOLS else "") / f"{script}.py"


def shell(script, *arguments, cwd):
    """Runs a script as a user does, in a process of its own."""
    command = [sys.executable, str(script_path(script)), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


COMMAND = re.compile(r"(?:\bpython|\btorchrun[^\n`]*?) (?:(?:\.\./)*(?:tools/)?|/\S*/)(\w+)\.py\b([^\n`#|]*)")


def commands(text):
    """(script, arguments) of each command line in a text."""
    for script, rest in COMMAND.findall(text.replace("\\\n", " ")):
        yield script, shlex.split(rest.strip().rstrip(",.;:)"))


def section(title):
    """A section of the README, from its heading to the next of any level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ )", text, re.DOTALL | re.MULTILINE)
    return found


def write_pair(folder, stem, image, mask=None):
    """Writes an image uint8 (H, W, 3) and its mask (all face by default) as masks.py would."""
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / f"{stem}_image.png"), image)
    cv2.imwrite(
        str(folder / f"{stem}_mask.png"), np.full(image.shape[:2], 255, np.uint8) if mask is None else mask
    )


def noise_pairs(folder, ages, seed=0, side=40):
    """Writes a pair of smooth noise, unlike any other, for each age; returns the stems."""
    rng = np.random.default_rng(seed)
    stems = [f"{age}_{i % 2}_{i % 5}_{20170000000000000 + i}" for i, age in enumerate(ages)]
    for stem in stems:
        write_pair(folder, stem, cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (side, side)))
    return stems


def write_model(path, **settings):
    """A checkpoint with random weights: what it says is of no matter here."""
    import torch  # here, since most tests do without

    from common import make_model, save_checkpoint

    torch.manual_seed(0)
    settings = {"multitask": True, "age_sigma": 2.0, "flip_averaging": True, "image_size": 64} | settings
    network = make_model(settings)
    for module in network.modules():  # statistics other than those a fresh network has
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    save_checkpoint(
        path, "model", Namespace(**settings), weights=network.state_dict(), epoch=1, val={},
        train_hashes=torch.zeros(0, dtype=torch.int64), pretraining={},
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model of years and masks with random weights, 64 pixels a side."""
    return write_model(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """An ONNX file that finds the faces of `test_faces.photograph`."""
    from test_faces import stand_in_detector

    return stand_in_detector(tmp_path_factory.mktemp("detector") / "yunet.onnx")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with dataset/raw, raw_masks, processed and processed_split of 150 drawn faces."""
    folder = tmp_path_factory.mktemp("drawn")
    for script, arguments in (
        ("synthesize", ["--output", folder / "dataset/raw", "--count", 150]),
        ("masks", ["--input", folder / "dataset/raw", "--output", folder / "dataset/processed"]),
        ("split", ["--input", folder / "dataset/processed", "--output", folder / "dataset/processed_split"]),
    ):
        module = importlib.import_module(script)
        run(module.main, module.get_parser(), [str(argument) for argument in arguments])
    return folder
