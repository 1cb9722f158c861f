"""What the scripts' command lines share: flags, YAML, errors in one line, files whole or absent."""

import argparse
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

import cli as command_line
from cli import (
    UserError,
    atomic_path,
    beside,
    check_output,
    check_writable,
    checkpoint_path,
    number,
    parse_args,
    remove_leftovers,
    run,
    script_parser,
    settings_of,
    shipped,
    usable_cores,
    write_csv,
)
from conftest import ROOT, shell


def python(code, *arguments, **options):
    """Runs a piece of Python in a process of its own, with the project on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment, **options)


def test_all_that_controls_a_terminal_becomes_digits():
    for code in (*range(0x20), *range(0x7F, 0xA0), 0xD800, 0xDFFF):
        shown = command_line.as_text(f"a{chr(code)}b")
        assert shown.isascii() and shown.isprintable(), hex(code)
    assert command_line.as_text("a b~é家") == "a b~é家"


# Flags and configuration


def parse(*argv):
    parser = script_parser("split", "test")
    parser.add_argument("--near-duplicate", type=number(float, low=0, high=1), default=0.98)
    parser.add_argument("--fractions", type=float, nargs=3, default=[0.7, 0.1, 0.2])
    parser.add_argument("--plain", action="store_true", help="a switch")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    return parse_args(parser, [str(argument) for argument in argv])


def test_a_scripts_own_section_beats_the_top(tmp_path):
    (tmp_path / "c.yaml").write_text("split: {seed: 5}\nseed: 4\n")
    assert parse("--config", tmp_path / "c.yaml").seed == 5


def test_configs_that_ship_are_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = script_parser("synthesize", "test")
    parser.add_argument("--count", type=int, default=7)
    assert parse_args(parser, ["--config", "configs/quickstart.yaml"]).count == 2000


def test_a_flag_that_may_stand_alone_does_so_in_yaml(tmp_path):
    parser = script_parser("masks", "test")
    parser.add_argument("--detect", nargs="?", choices=["single", "largest"], const="single")
    for text, detect in (("true", "single"), ("false", None), ("largest", "largest")):
        (tmp_path / "c.yaml").write_text(f"detect: {text}\n")
        assert parse_args(parser, ["--config", str(tmp_path / "c.yaml")]).detect == detect


@pytest.mark.parametrize("text", ["", "# seed: 3\n", "split:\n  # seed: 3\n", "split:\nmasks:\n"])
def test_what_is_commented_out_is_not_there(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", tmp_path / "c.yaml").seed == 0


def test_flags_beat_config_beats_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "seed: 4\nsplit:\n  near_duplicate: 0.5\n  fractions: [0, 0, 1]\n  plain: true\n  flip: false\n"
        "pretrain: {lr: 9}\n"
    )
    args = parse("--config", path)
    assert (args.seed, args.near_duplicate, args.fractions) == (4, 0.5, [0, 0, 1])
    assert args.plain and not args.flip
    args = parse("--config", path, "--seed", 7, "--flip")
    assert (args.seed, args.near_duplicate, args.flip, args.overwrite) == (7, 0.5, True, False)
    assert parse().near_duplicate == 0.98


@pytest.mark.parametrize(
    "text, words",
    [
        ("lerning-rate: 1", ["lerning-rate"]),
        ("split: {epochs: 3}", ["epochs"]),
        ("near-duplicate: 1.5", ["--near-duplicate", "at most 1"]),
        ("near-duplicate: true", ["--near-duplicate"]),
        ("plain: 3", ["plain"]),
        ("- 3", ["flag: value"]),
        ("split: 3", ["split"]),
        ("masks: 3", ["unknown key 'masks'"]),
        ("near-duplicate:", ["near-duplicate has no value"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_bad_config(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_bad_flags():
    wrong = ["--near-duplicate", "nan"], ["--nonsense"], ["--seed", "-1"], ["--seed", str(2**64)], ["--pl"]
    for argv in (*wrong, ["--seed", "9" * 400], ["--config", "nowhere.yaml"], ["--workers", "1.5"]):
        with pytest.raises(UserError):
            parse(*argv)


def test_numbers_say_their_bounds():
    kind = number(float, low=0, high=1, above=0)
    assert kind("0.5") == 0.5 and number(int, low=2)("2") == 2
    for text in ("0", "1.01", "nan", "inf", "-inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 0 and above 0 and at most 1"):
            kind(text)
    with pytest.raises(argparse.ArgumentTypeError, match="must be finite, not inf"):
        number(float)("inf")


def test_what_defines_a_run(tmp_path):
    args = parse("--seed", 3)
    args.resume, args.out, args.device, args.precision = False, "o.pt", "cpu", "fp32"
    assert vars(args).keys() - settings_of(args).keys() == {
        "config", "workers", "overwrite", "resume", "out", "device"
    }  # fmt: skip


def test_files_beside_a_checkpoint_keep_its_dots():
    assert checkpoint_path("runs/lr0.01.pt") == "runs/lr0.01.pt"
    for text in ("lr0.01", "model.csv", ".pt", "runs/.pt", "runs/"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must end in \.pt"):
            checkpoint_path(text)
    assert str(beside("runs/lr0.01.pt", ".last.pt")) == os.path.join("runs", "lr0.01.last.pt")
    assert str(beside("a.pt.pt", ".csv")) == "a.pt.csv"


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cores() == parse().workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_cores() == parse().workers == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert usable_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert usable_cores() == 1


def test_light_scripts_do_not_load_torch():
    code = (
        "import sys; sys.path.insert(0, 'tools'); import split, masks, synthesize\n"
        "for script in (split, masks, synthesize): assert '--output' in script.get_parser().format_help()\n"
        "print(sorted({'torch', 'torchvision', 'albumentations', 'matplotlib'} & set(sys.modules)))"
    )
    done = python(code, cwd=ROOT)
    assert done.stdout.split() == [b"[]"], done.stderr
    done = shell("split", "-h", cwd=ROOT)
    assert done.returncode == 0 and "--near-duplicate" in done.stdout and "(default: 0)" in done.stdout


# A script's course


@pytest.mark.parametrize(
    "happens, code, line",
    [
        (lambda: (_ for _ in ()).throw(UserError("two\nlines")), 2, "split.py: error: two lines\n"),
        (lambda: os.rmdir("/no"), 2, "split.py: error: [Errno 2] No such file or directory: '/no'\n"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130, "split.py: stopped\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "split.py: stopped by SIGTERM\n"),
    ],
)
def test_exit_codes(capsys, happens, code, line):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(lambda _: happens(), script_parser("split", "test"), [])
    assert stop.value.code == code and capsys.readouterr() == ("", line)
    assert signal.getsignal(signal.SIGTERM) == before


def test_letters_that_a_terminal_lacks_do_not_stop_a_run(tmp_path):
    code = "from cli import *; run(lambda args: print(args.config), script_parser('split', 'test'))"
    (tmp_path / "лицо.yaml").write_text("seed: 1")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = python(code, "--config", "лицо.yaml", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0 and done.stdout == b"\\u043b\\u0438\\u0446\\u043e.yaml\n", done.stderr


# Files, whole or absent


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(UserError, match=r"a\.txt cannot be written \(No space left\)"), atomic_path(path):
        raise OSError(28, "No space left")
    with atomic_path(path, sync=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("there", [True, False])
def test_links_are_written_through(tmp_path, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/table.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("far/table.csv")
    check_output("--csv", tmp_path / "link.csv")
    write_csv(tmp_path / "link.csv", [{"a": 1}])
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "far/table.csv").read_text() == "a\n1\n"
    assert sorted(os.listdir(tmp_path / "far")) == ["table.csv"]


def test_pipes_and_devices_are_written_straight_into(tmp_path):
    fifo, heard = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: heard.append(fifo.read_text()), daemon=True)
    reader.start()
    check_output("--csv", fifo)
    write_csv_at = "import sys; from cli import write_csv; write_csv(sys.argv[1], [{'a': 1}, {'a': 2}])"
    done = python(write_csv_at, fifo)
    reader.join(timeout=60)
    assert done.returncode == 0 and heard == ["a\n1\n2\n"], done.stderr
    assert fifo.is_fifo() and os.listdir(tmp_path) == ["fifo"]
    done = python(write_csv_at, "/dev/stdout")
    assert done.returncode == 0 and done.stdout == b"a\n1\n2\n", done.stderr
    (tmp_path / "null").symlink_to(os.devnull)
    with atomic_path(tmp_path / "null") as path:
        assert path == tmp_path / "null"
    assert not os.path.isfile(os.devnull) and (tmp_path / "null").is_symlink()


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    check_writable("--out", tmp_path / "new/folder")
    for check in (check_writable, check_output):
        with pytest.raises(UserError, match=r"--out: .*file is no folder"):
            check("--out", tmp_path / "file/x/y")
    check_writable("--out", tmp_path / ("long" * 99) / "x")  # which the system refuses to look for
    check_output("--out", tmp_path / ("long" * 99))
    with pytest.raises(UserError, match=r"--out .* is a folder"):
        check_output("--out", tmp_path)
    with pytest.raises(UserError, match="cannot be written"), atomic_path(tmp_path / "file/x"):
        pass


def test_csv_of_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"gr\xfc\xdfe.jpg")
    write_csv(tmp_path / "a.csv", [{"file": name, "reason": "a, b"}])
    assert (tmp_path / "a.csv").read_bytes() == b'file,reason\ngr\\udcfc\\udcdfe.jpg,"a, b"\n'
    write_csv(tmp_path / "a.csv", [], ["file", "reason"])
    assert (tmp_path / "a.csv").read_text() == "file,reason\n"


def test_leftovers_of_killed_runs_go_but_not_those_of_living_ones(tmp_path, monkeypatch):
    for name in (".tmp-old.png", ".tmp-young.png", "face.png"):
        (tmp_path / name).write_text("")
    (tmp_path / ".tmp-folder/new").mkdir(parents=True)
    for name in (".tmp-old.png", ".tmp-folder", "face.png"):
        os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp-young.png", "face.png"]
    remove_leftovers(tmp_path / "nowhere")
    os.utime(tmp_path / ".tmp-young.png", (0, 0))
    monkeypatch.setattr(type(tmp_path), "unlink", Mock(side_effect=PermissionError))
    remove_leftovers(tmp_path)  # tidying up stops no run


def test_a_run_of_half_an_hour_is_still_living(tmp_path):
    (tmp_path / ".tmp-at-work").touch()
    os.utime(tmp_path / ".tmp-at-work", (time.time() - 1800,) * 2)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".tmp-at-work"]


def test_files_that_ship_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/quickstart.yaml").is_file()
    assert str(shipped("configs/none.yaml")) == os.path.join("configs", "none.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").write_text("synthesize: {count: 7}")
    assert shipped("configs/quickstart.yaml").read_text() == "synthesize: {count: 7}"


def test_nothing_else_in_the_clone_is_found(tmp_path, monkeypatch, refuse):
    """A model.pt there is of another run, wherever the scripts are called from."""
    clone, here = tmp_path / "clone", tmp_path / "here"
    for name in ("model.pt", "contrastive.pt", "runs/model.pt", "weights/model.pt", "weights/deep/model.pt"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(b"")
    here.mkdir()
    monkeypatch.setattr(command_line, "ROOT", clone)
    monkeypatch.chdir(here)
    for name in (
        "model.pt",
        "./contrastive.pt",
        "runs/model.pt",
        "weights/../model.pt",
        "weights/deep/model.pt",
    ):
        assert not shipped(name).exists()
    assert shipped("weights/model.pt") == shipped("./weights/model.pt") == clone / "weights/model.pt"
    refuse("evaluate", "--device", "cpu", words=["model.pt is not there"])


CHATTY = """
import sys, time
from pathlib import Path
from cli import progress, run, script_parser
def main(args):
    for step in progress(range(3)):
        print("x" * 100_000, flush=True)
        print("warning", file=sys.stderr)
    Path("done").write_text("all of it")
run(main, script_parser("split", ""), [])
"""


@pytest.mark.parametrize(
    "end", ["| head -c 1", "2>&1 | head -c 1", ">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full"]
)
def test_a_closed_stdout_or_stderr_ends_nothing(tmp_path, end):
    script = tmp_path / "chatty.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CHATTY}")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} {end}"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr + done.stdout, done.stderr
    assert b"ignored" not in done.stderr and (tmp_path / "done").read_text() == "all of it"


def test_a_script_runs_in_a_thread_that_gets_no_signals():
    found = []
    thread = threading.Thread(target=lambda: run(found.append, script_parser("split", ""), ["--seed", "3"]))
    thread.start()
    thread.join()
    assert found[0].seed == 3


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library")
def test_memory_of_tensors_is_kept_for_those_that_follow():
    """After a few, until places fit, each takes pages of those before: the system need not clear others."""
    code = """
import resource, torch, cli
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cli.own_process()
found = [faults() for _ in range(30)]
assert sum(found[10:]) < found[0] / 10, found
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
