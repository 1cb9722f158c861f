"""Nothing is lost to kills, full disks and numbers gone wrong; nothing from outside is trusted.

`make soak` sets KILLS to kill each stage more often than the suite does.
"""

import csv
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import inputs
import training
from cli import usable_cores
from common import FaceDataset, load_checkpoint
from conftest import FAST, ROOT, noise_pairs, script_path
from training import to_device, train_loader
from utkface import decode_image

KILLS = int(os.environ.get("KILLS", 1))  # of each training stage, half as many of the others
TRAINING = [*FAST, "--init", "random"]


@pytest.fixture
def train(drawn, tmp_path, cli, small_model):
    """Runs finetune.py, small, on the drawn faces into tmp_path/m.pt: (exit code, stdout, stderr)."""
    flags = ["--data", drawn / "dataset/processed_split", *TRAINING, "--out", tmp_path / "m.pt"]
    return lambda *more: cli("finetune", *flags, *more)


def run_until(event, script, *flags, cwd):
    """Runs a script in a process of its own, killed at an event (0: never): (exit code, stdout)."""
    command = [sys.executable, Path(__file__).with_name("kill_at.py"), event, script_path(script), *flags]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "name, code, line", [("SIGINT", 130, "stopped"), ("SIGTERM", 143, "stopped by SIGTERM")]
)
def test_a_signal_to_all_processes_ends_them_with_one_line(drawn, tmp_path, name, code, line):
    """As Ctrl-C and `timeout` send it: to the main process and to its workers."""
    flags = ["--data", drawn / "dataset/processed_split", *TRAINING, "--out", "o.pt", "--workers", 2]
    command = [sys.executable, ROOT / "tests/kill_at.py", 9, ROOT / "finetune.py", *flags]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "KILL_GROUP_BY": name},
    )  # fmt: skip
    assert process.communicate()[1] == f"finetune.py: {line}\n" and process.returncode == code
    with pytest.raises(ProcessLookupError):  # nobody is left of it
        os.killpg(process.pid, 0)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plan(total, kills, seed):
    """Seeded events to kill at, so few apart that none of the runs ends before its kill."""
    return [random.Random(seed + kill).randrange(1, total // (kills + 1)) for kill in range(kills)]


@pytest.mark.parametrize("script, kind", [("pretrain", "contrastive"), ("finetune", "model")])
def test_killed_training_ends_with_the_same_weights(drawn, tmp_path, script, kind):
    """Killed at any moment and resumed, with other workers, a run of the recipe ends bit for bit the same."""
    flags = ["--data", drawn / "dataset/processed_split", *TRAINING, "--out", "o.pt", "--epochs", 2]
    flags += ["--multitask"] if script == "finetune" else []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    total = int(run_until(0, script, *flags, cwd=whole)[1].splitlines()[-1])
    draw = random.Random(len(script))
    for kill in range(KILLS):  # the first in the middle, which is in the second epoch, the others soon after
        event = (
            draw.randrange(total * 9 // 20, total * 3 // 5) if kill == 0 else draw.randrange(1, total // 5)
        )
        assert run_until(event, script, *flags, "--resume", cwd=cut)[0] == -signal.SIGKILL
        assert load_checkpoint(cut / "o.last.pt", f"{kind}.last")["epoch"] == 1
        for path in cut.glob("o*.pt"):
            load_checkpoint(path, kind, f"{kind}.last")  # whole
    code, printed = run_until(0, script, *flags, "--resume", "--workers", 1, cwd=cut)
    assert code == 0 and "resumed o.last.pt at epoch 1" in printed
    ours, theirs = (load_checkpoint(folder / "o.pt", kind)["weights"] for folder in (whole, cut))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [list(csv.DictReader((folder / "o.csv").read_text().splitlines())) for folder in (whole, cut)]
    assert [{**row, "seconds": ""} for row in rows[0]] == [{**row, "seconds": ""} for row in rows[1]]
    assert files(cut).keys() == files(whole).keys()


@pytest.mark.parametrize("script", ["masks", "split"])
def test_killed_files_are_taken_up(drawn, tmp_path, cli, script):
    source = drawn / ("dataset/raw" if script == "masks" else "dataset/processed")
    flags = ["--input", source, "--workers", 1, "--output"]
    total = int(run_until(0, script, *flags, "whole", cwd=tmp_path)[1].splitlines()[-1])
    for event in plan(total, max(KILLS // 2, 1), seed=5):
        assert run_until(event, script, *flags, "cut/out", cwd=tmp_path)[0] == -signal.SIGKILL
    for leftover in (tmp_path / "cut").rglob(".tmp-*"):  # an hour later
        os.utime(leftover, (0, 0))
    assert cli(script, *flags, "cut/out", cwd=tmp_path)[0] == 0
    assert files(tmp_path / "cut/out") == files(tmp_path / "whole")
    assert os.listdir(tmp_path / "cut") == ["out"]


def test_sigterm_ends_at_once_and_keeps_the_last_epoch(train, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # of 6 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    code, _, err = train("--epochs", 2)
    assert code == 143 and err == "finetune.py: stopped by SIGTERM\n" and len(calls) == 9
    assert load_checkpoint(tmp_path / "m.last.pt", "model.last")["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["m.csv", "m.last.pt", "m.pt"]


def test_a_full_disk_leaves_the_last_good_files(train, tmp_path, monkeypatch):
    train_one_epoch, calls, before = training.train_one_epoch, [], {}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(*args):
        calls.append(1)
        if len(calls) == 2:
            before.update(files(tmp_path))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file above a mebibyte
        return train_one_epoch(*args)

    monkeypatch.setattr(training, "train_one_epoch", fills)
    try:
        code, _, err = train("--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.count("\n") == 1 and "m.last.pt cannot be written" in err
    assert files(tmp_path) == before
    monkeypatch.setattr(training, "train_one_epoch", train_one_epoch)
    assert train("--epochs", 2, "--resume")[0] == 0


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_numbers_gone_wrong_stop_the_run_and_keep_the_checkpoint(train, tmp_path, monkeypatch, what):
    losses, calls, before = finetune.multitask_losses, [], {}

    def breaks(model, batch, **options):
        calls.append(1)
        if len(calls) == (8 if what == "loss" else 12):
            before.update(files(tmp_path))
            return losses(model, batch, **options) * torch.tensor([float("nan"), 1, 1])
        return losses(model, batch, **options)

    def weights_break(model, batch, **options):
        found = breaks(model, batch, **options)
        return found if found[0].isfinite() else torch.stack([_Silent.apply(found[1]), *found[1:]])

    monkeypatch.setattr(finetune, "multitask_losses", breaks if what == "loss" else weights_break)
    code, _, err = train("--epochs", 3)
    assert code == 2 and err.count("\n") == 1 and "lower --lr" in err
    assert ("epoch 2, step 2" if what == "loss" else "weights became infinite or NaN in epoch 2") in err
    assert files(tmp_path) == before


class _Silent(torch.autograd.Function):
    """A loss that is finite, with a gradient that is not."""

    @staticmethod
    def forward(_, loss):
        return loss.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * float("nan")


def test_batches_need_no_shared_memory(drawn):
    """Docker gives 64 MB of it, and a tensor that a worker shares takes an open file."""
    dataset = FaceDataset(drawn / "dataset/processed_split/val", 64)
    loader = train_loader(dataset, 8, 0, 1, torch.device("cpu"))
    loader.timeout = 30  # seconds, since the failure to be noticed is to wait for ever
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # which holds for shared memory as well
    try:
        assert all(to_device(batch, torch.device("cpu"))["image"].shape == (8, 3, 64, 64) for batch in loader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("DataLoader worker is killed")])
def test_workers_that_do_not_live_end_the_run(train, monkeypatch, error):
    def fails(_):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fails)
    code, _, err = train("--epochs", 1, "--workers", 1)
    assert code == 2 and err.count("\n") == 1
    assert all(word in err for word in (str(error), "--shm-size", "--workers 0")), err


def test_no_room_for_a_semaphore_is_one_line(train, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.ThreadPool", full)
    code, _, err = train("--epochs", 1)
    assert code == 2 and err.count("\n") == 1 and "--shm-size" in err, err


@pytest.mark.parametrize("text, share", [("", 1), ("0", 1), ("x", 1), ("2", 2)])
def test_an_environment_that_is_not_torchruns(monkeypatch, cli, refuse, text, share):
    cores = usable_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert usable_cores() == max(1, cores // share)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, text)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refuse("finetune", "--data", "nowhere", words=["WORLD_SIZE", "RANK"] if text == "2" else ["nowhere"])


@pytest.mark.parametrize("own", ["2", "x", "-1"])
def test_a_rank_that_is_none_is_refused_at_once(monkeypatch, refuse, own):
    settings = {"WORLD_SIZE": "2", "RANK": own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    refuse("finetune", "--data", "nowhere", words=["WORLD_SIZE is 2", "RANK below 2"])


# Files from outside


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures():
    """Files by name: those that must give a pair, and those that must not, with a word of the reason."""
    rng = np.random.default_rng(0)
    face = Image.fromarray(cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (60, 80)))
    jpeg, turned = encoded(face, "JPEG"), Image.Exif()
    turned[0x0112] = 6  # to be turned by 90°
    huge = Image.new("1", (20_000, 20_000))
    deep = cv2.imencode(".png", (np.asarray(face).astype(np.uint16) * 257)[..., ::-1])[1].tobytes()
    good = {
        "grey.jpg": encoded(face.convert("L"), "JPEG"),
        "rgba.png": encoded(face.convert("RGBA"), "PNG"),
        "16-bit.png": deep,
        "cmyk.jpg": encoded(face.convert("CMYK"), "JPEG"),
        "palette.png": encoded(face.convert("P"), "PNG"),
        "exif.jpg": encoded(face, "JPEG", exif=turned),
        "appended.jpg": jpeg + bytes(2000),  # as phones do with the film of a live photograph
        "lossless.webp": encoded(face, "WEBP", lossless=True),
    }
    bad = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (good["rgba.png"][: len(good["rgba.png"]) // 2], "truncated"),
        "empty.jpg": (b"", "unreadable"),
        "1x1.png": (encoded(face.resize((1, 1)), "PNG"), "below 16"),
        "huge.png": (encoded(huge, "PNG"), "above 50 million"),
        "text.jpg": (b"I am no picture", "unreadable"),
        "bomb.bmp": (bytes(65 * 2**20), "larger than 64 MiB"),
    }
    stem = lambda i: f"{30 + i}_0_0_{20170000000000000 + i}"  # noqa: E731
    named = {f"{stem(i)}.{name.rsplit('.')[-1]}": data for i, (name, data) in enumerate(good.items())}
    refused = {f"{stem(i + 20)}.{name.rsplit('.')[-1]}": pair for i, (name, pair) in enumerate(bad.items())}
    for name in ("лицо.jpg", "30_0_0_2017\n0000.jpg", "../../etc/30_0_0.jpg", "30_0_0_1.jpg.exe"):
        refused[name] = (jpeg, "malformed name")
    return named, refused


@pytest.mark.parametrize("form", ["folder", "tar.gz", "zip"])
def test_bad_pictures_are_skipped_with_a_reason(tmp_path, cli, form):
    good, bad = pictures()
    contents = good | {name: data for name, (data, _) in bad.items()}
    source = tmp_path / "in" / f"a.{form}"
    source.parent.mkdir()
    if form == "folder":
        del contents["../../etc/30_0_0.jpg"], bad["../../etc/30_0_0.jpg"]
        source.mkdir()
        for name, data in contents.items():
            (source / name).write_bytes(data)
    elif form == "zip":
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in contents.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(source, "w:gz", compresslevel=1) as packed:
            for name, data in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                packed.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("99_0_0_20170000000000099.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            packed.addfile(link)
            contents[link.name], bad[link.name] = b"", (b"", "neither a file nor a link to one")
    out = tmp_path / "out"
    code, printed, err = cli("masks", "--input", source, "--output", out, "--workers", 2)
    assert code == 0 and "pictures that are not square" in err and f": {len(good)}, such as" in err
    assert f"{len(contents)} files: {len(good)} pairs written" in printed and f"{len(bad)} skipped" in printed
    with open(out / "skipped.csv", newline="", encoding="utf-8") as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == bad.keys() and all(bad[name][1] in reason for name, reason in reasons.items())
    for name in good:
        image, mask = (
            cv2.imread(str(out / f"{name.split('.')[0]}_{part}.png"), -1) for part in ("image", "mask")
        )
        side = (60, 80) if image.shape[0] == 60 else (80, 60)  # the one that EXIF turns
        assert image.shape == (*side, 3) and mask.shape == side and image.std() > 10
    assert sum(cv2.imread(str(path)).shape[0] == 60 for path in out.glob("*_image.png")) == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_one_damaged_member_of_a_zip_does_not_stop_the_others(tmp_path, cli):
    contents = list(pictures()[0].items())[:3]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for name, data in contents:
            packed.writestr(name, data)
    whole = (tmp_path / "a.zip").read_bytes()
    middle = whole.index(contents[1][1]) + len(contents[1][1]) // 2
    (tmp_path / "a.zip").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    code, printed, _ = cli("masks", "--input", tmp_path / "a.zip", "--output", tmp_path / "out")
    assert code == 0 and "3 files: 2 pairs written" in printed and "1 skipped" in printed
    assert f"{contents[1][0]},cannot be read: Bad CRC" in (tmp_path / "out/skipped.csv").read_text()
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in contents:
            packed.writestr(name, data)
    raw, name = bytearray((tmp_path / "b.zip").read_bytes()), contents[1][0].encode()
    raw[raw.index(name) + len(name)] = 255  # no block of deflate begins so
    (tmp_path / "b.zip").write_bytes(raw)
    code, printed, _ = cli("masks", "--input", tmp_path / "b.zip", "--output", tmp_path / "b")
    assert code == 0 and "3 files: 2 pairs written" in printed and "1 skipped" in printed


def test_members_that_are_packed_strangely_do_not_stop_the_others(tmp_path, cli):
    """By bzip2, which unpacks to any size at once; more, and less, than the archive says."""
    (name, good), *_ = pictures()[0].items()
    for i, (kind, said) in enumerate([("BZIP2", 0), ("DEFLATED", -1000), ("STORED", 10**6)]):
        with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as packed:
            packed.writestr(name, good)
            other = zipfile.ZipInfo("1_1_1_20170000000000001.jpg")
            other.compress_type = getattr(zipfile, f"ZIP_{kind}")
            packed.writestr(other, bytes(10**6))
            other.file_size += said
            other.compress_size += max(said, 0)
        code, printed, err = cli("masks", "--input", tmp_path / f"{i}.zip", "--output", tmp_path / f"{i}")
        assert code == 0 and "1 pairs written" in printed and "1 skipped" in printed, err
        skipped = (tmp_path / f"{i}/skipped.csv").read_text()
        assert ("another way than deflate" in skipped) == (kind == "BZIP2"), skipped


def test_no_more_is_unpacked_than_a_zip_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("a.jpg", bytes(50_000_000), zipfile.ZIP_DEFLATED)
        packed.infolist()[0].file_size = 1000  # as its directory has it
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        [member] = packed.infolist()
        tracemalloc.start()
        with pytest.raises(zipfile.BadZipFile):
            inputs.read_member(packed, member)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert member.file_size == 1000 and peak < 10_000_000


@pytest.mark.parametrize("kind", ["xz", "zip"])
def test_archives_that_python_cannot_read_are_named(tmp_path, refuse, kind):
    """Damage within .xz, and a name that is said to be UTF-8 and is none."""
    source, name = tmp_path / f"a.{kind}", "30_0_0_20170000000000001é.jpg"
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as packed:
            packed.writestr(name, b"a")
        source.write_bytes(source.read_bytes().replace("é".encode(), b"\xff\xff"))
    else:
        with tarfile.open(source, "w:xz") as packed:
            member = tarfile.TarInfo(name)
            member.size = 100_000
            packed.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
        whole = source.read_bytes()
        source.write_bytes(whole[:50_000] + bytes(200) + whole[50_200:])
    refuse("masks", "--input", source, "--output", tmp_path / "out", words=[source.name, "a whole .tar.gz"])


def test_names_that_control_a_terminal_are_shown_as_digits(tmp_path, cli, refuse):
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in/a\x1b[2J.png")
    (tmp_path / "a.csv").write_text("file,age\na\x1b[2J.png,30\n/b\0.png,30\n")
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "a.csv", "--output", tmp_path / "out"]
    code, _, err = cli("masks", *flags)
    assert code == 0 and "such as a\\x1b[2J.png" in err and "\x1b" not in err
    refuse("masks", "--input", tmp_path / "\x1b[2J", words=["\\x1b[2J does not exist"])


@pytest.mark.parametrize("text", ["seed: 2024-13-45", "[" * 2000, "seed: \xff"])
def test_a_config_that_is_no_yaml_is_named(tmp_path, refuse, text):
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    refuse("split", "--config", tmp_path / "c.yaml", words=["c.yaml", "cannot be read"])


def test_no_stage_decodes_a_huge_picture(tmp_path, refuse):
    stem = noise_pairs(tmp_path / "d/train", [30, 50] * 8)[0]
    Image.new("1", (20_000, 20_000)).save(tmp_path / f"d/train/{stem}_image.png")
    flags = ["--data", tmp_path / "d", *TRAINING, "--out", tmp_path / "o.pt"]
    refuse("pretrain", *flags, words=[stem, "above 50 million"])
    refuse(
        "split", "--input", tmp_path / "d/train", "--output", tmp_path / "s", words=[stem, "above 50 million"]
    )
    with pytest.raises(ValueError, match="pixels"):
        decode_image((tmp_path / f"d/train/{stem}_image.png").read_bytes())


def test_damaged_checkpoints_are_named(drawn, train, tmp_path, refuse):
    data = ["--data", drawn / "dataset/processed_split"]
    good = tmp_path / "m.pt"
    assert train("--epochs", 1)[0] == 0
    content = torch.load(good, weights_only=True)
    for key, value in (
        ("weights", {"head.weight": 3}),
        ("weights", {"head.weight": torch.zeros(2, 2)}),
        ("weights", {3: torch.zeros(1)}),
        ("weights", None),
        ("config", [1]),
        ("preprocessing", {"image_size": 33}),
        ("preprocessing", {"image_size": 64.0}),
        ("train_hashes", "none"),
        ("train_hashes", torch.zeros(2, dtype=torch.bfloat16)),
        ("val_hashes", torch.zeros(2)),
    ):
        torch.save(content | {key: value}, tmp_path / "bad.pt")
        refuse("evaluate", tmp_path / "bad.pt", *data, "--out", tmp_path / "r", words=["bad.pt is damaged"])
    torch.save(content | {"format_version": torch.tensor([2, 2])}, tmp_path / "bad.pt")
    refuse("evaluate", tmp_path / "bad.pt", *data, "--out", tmp_path / "r", words=["format version"])
    for name in ("head.bias", "backbone.bn1.running_var"):
        weights = content["weights"] | {name: content["weights"][name] * float("nan")}
        torch.save(content | {"weights": weights}, tmp_path / "bad.pt")
        refuse("evaluate", tmp_path / "bad.pt", *data, "--out", tmp_path / "r", words=["infinite or NaN"])
    state = torch.load(tmp_path / "m.last.pt", weights_only=True)
    flags = [*data, *TRAINING, "--epochs", 1, "--out", good]
    damaged = [state | {"model": {"head.weight": torch.zeros(1)}}]
    damaged += [{key: value for key, value in state.items() if key != "best"}]
    for content in damaged:
        torch.save(content, tmp_path / "m.last.pt")
        refuse("finetune", *flags, "--resume", words=["m.last.pt does not fit"])


def test_a_run_that_was_being_overwritten_does_not_come_back(train, tmp_path, monkeypatch):
    assert train("--epochs", 1)[0] == 0
    code, _, err = train("--epochs", 1, "--overwrite", "--init", "nowhere.pt")
    assert code == 2 and "nowhere.pt" in err and (tmp_path / "m.last.pt").exists()  # nothing is lost yet

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_one_epoch", killed)
        assert train("--epochs", 1, "--overwrite")[0] == 130
    assert not any((tmp_path / f"m{suffix}").exists() for suffix in (".last.pt", ".csv", ".png"))


def test_wrong_use_is_seen_before_any_work(drawn, tmp_path, refuse, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr("common.FaceDataset", worked)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dir.pt").mkdir()
    data = ["--data", drawn / "dataset/processed_split"]
    for script in ("pretrain", "finetune"):
        out = ["--out", tmp_path / "o.pt"]
        for flag, value in (
            ("--epochs", -3), ("--epochs", 0), ("--image-size", 100), ("--batch-size", 1), ("--lr", 0),
            ("--batch-size", 10**6), ("--lr", "inf"), ("--weight-decay", -1), ("--workers", -1),
            ("--device", "cuda:77"), ("--device", "toaster"), ("--precision", "fp8"), ("--seed", -1),
            ("--precision", "fp16"),
        ):  # fmt: skip
            refuse(script, *data, *TRAINING, *out, flag, value, words=[flag])
        refuse(script, *data, *TRAINING, "--out", tmp_path / "file/o.pt", words=["--out", "file"])
        refuse(script, *data, *TRAINING, "--out", tmp_path / "dir.pt", words=["--out", "is a folder"])
    refuse("pretrain", *data, "--temperature", 0, words=["--temperature"])
    for script, flag in (("masks", "--output"), ("split", "--output"), ("synthesize", "--output")):
        refuse(script, flag, tmp_path / "file/x", words=[flag, "file"])
    refuse("evaluate", *data, "--out", tmp_path / "file/x", words=["--out", "file"])
    assert sorted(os.listdir(tmp_path)) == ["dir.pt", "file"]
