"""What every script's command line shares: flags, YAML, errors in one line, progress, files written whole.

Nothing here loads torch, so `split.py -h` answers at once.
"""

import argparse
import csv
import ctypes
import errno
import io
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import yaml
from tqdm import tqdm

STAGES = ("masks", "split", "pretrain", "finetune", "evaluate", "predict")
TOOLS = ("table", "benchmark", "synthesize", "export", "page")
ROOT = Path(__file__).resolve().parent
MAX_SIDE = 4096  # pixels of a picture that a model takes


class UserError(Exception):
    """A mistake that a user can mend: one line that names the file or flag and the remedy."""


# ------------------------------------------------------------------------------------------------------------
# Flags and configuration
# ------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, and the description as it is written."""

    def _get_help_string(self, action):
        without = action.default is None or action.default is False  # not 0, which is worth showing
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s, so that they too end in one line."""

    def error(self, message):
        raise UserError(message)


def number(kind: type, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float with low <= value <= high and value > above."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value > above and abs(value) < math.inf):
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
            bounds += [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def image_side(text: str) -> int:
    """An argparse type: pixels, a multiple of 32 (the backbone's stride) from 32 to `MAX_SIDE`."""
    side = int(text)
    if side not in range(32, MAX_SIDE + 1, 32):
        raise argparse.ArgumentTypeError(f"must be a multiple of 32 from 32 to {MAX_SIDE}, not {text}")
    return side


def checkpoint_path(text: str) -> str:
    """An argparse type: a file name that ends in .pt, since other files are named after it."""
    if not Path(text).name.removesuffix(".pt") or not text.endswith(".pt"):
        raise argparse.ArgumentTypeError(f"must end in .pt, as {text}.pt does, not {text}")
    return text


def beside(out: str | Path, suffix: str) -> Path:
    """A file named after a checkpoint: `runs/lr0.01.pt`, `.csv` → `runs/lr0.01.csv`."""
    return Path(out).with_name(Path(out).name.removesuffix(".pt") + suffix)


def usable_cores() -> int:
    """Cores that this process may use, an equal share of them under torchrun; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (environment_number("LOCAL_WORLD_SIZE") or 1))


def environment_number(name: str) -> int | None:
    """A whole number that torchrun sets in the environment; None if it is missing, empty or none."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def script_parser(script: str, description: str) -> Parser:
    """A parser for `<script>.py` that already holds the flags that all scripts share."""
    formatter = partial(HelpFormatter, max_help_position=34, width=110)
    parser = Parser(
        f"{script}.py", usage=argparse.SUPPRESS, description=description, formatter_class=formatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument
    add("--config", metavar="FILE.yaml", help="YAML file with defaults for these flags")
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help="seed of everything random")
    add("--workers", metavar="N", type=number(int, low=0), default=usable_cores(),
        help="parallel workers (cores)")
    add("--overwrite", action="store_true",
        help="replace what an earlier run has written, which for results and predictions needs no flag")
    # fmt: on
    return parser


def add_device_flags(parser: Parser, precision: str = "fp32"):
    """Adds the flags that say where and in what arithmetic a model runs."""
    # fmt: off
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default=precision,
        help="arithmetic; auto is bf16 where the device has it, else fp16 on CUDA and fp32 elsewhere")
    # fmt: on


def read_config(path: str, parser: Parser) -> list[str]:
    """The command-line arguments that say the same as a YAML file, for argparse to check.

    Top-level keys are this script's flags, or sections named after scripts, of which only this script's own
    is read.
    """
    try:
        settings = yaml.safe_load(shipped(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"it cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError("it must hold `flag: value` lines")
    script = parser.prog.removesuffix(".py")
    own = settings.pop(script, None) or {}
    if not isinstance(own, dict):
        raise UserError(f"section {script} must hold `flag: value` lines")
    for name in STAGES + TOOLS:
        if isinstance(settings.get(name, ""), dict | None):  # --split is a flag, too
            settings.pop(name)
    known, arguments = parser._option_string_actions, []
    for key, value in (settings | own).items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in known or flag in ("--config", "--help"):
            raise UserError(f"unknown key {key!r}; see {parser.prog} -h for the flags")
        if value is None:
            raise UserError(f"{key} has no value: give one, or leave the line out")
        if isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is True and known[flag].nargs in (0, "?"):  # a switch, or a flag that may stand alone
            arguments.append(flag)
        elif value is False and known[flag].nargs in (0, "?"):
            arguments += [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in known else []
        elif known[flag].nargs == 0:
            raise UserError(f"{key} must be true or false, not {value!r}")
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line over those of `--config` over the defaults."""
    path = parser.parse_args(argv).config
    try:
        defaults = parser.parse_args(read_config(path, parser)) if path else None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return parser.parse_args(argv, defaults)


# Flags that change where and how a run happens, not what comes out.
NOT_SETTINGS = ("config", "data", "workers", "overwrite", "resume", "out", "device")


def settings_of(args: argparse.Namespace) -> dict:
    """The arguments that define a run's result, for checkpoints to carry and --resume to compare."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


# ------------------------------------------------------------------------------------------------------------
# A script's course
# ------------------------------------------------------------------------------------------------------------


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as glibc's malloc.h has them
NO_ROOM = (errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EAGAIN)
NO_WORKER = re.compile("DataLoader worker|can't start new thread")


class Terminated(BaseException):
    """SIGTERM, as cluster schedulers send it."""


def terminate(*_):
    """A signal handler that ends the script as Ctrl-C does, what was being written undone."""
    raise Terminated


def run(main, parser: Parser, argv: list[str] | None = None):
    """Calls `main(args)`; exits with 2 and one line for a UserError, 130 for Ctrl-C, 143 for SIGTERM."""
    own_process()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Unbreakable, streams)
    in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        main(parse_args(parser, argv))
    except (UserError, OSError, RuntimeError) as error:
        message = str(error)
        if getattr(error, "errno", None) in NO_ROOM or NO_WORKER.search(message):
            message += ": make room (disk, memory, docker's --shm-size, ulimit -n), or give --workers 0"
        elif not isinstance(error, UserError) and not getattr(error, "errno", None):  # the system's refusals
            raise
        print(f"{parser.prog}: error: {as_text(' '.join(message.split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print(f"{parser.prog}: stopped by SIGTERM", file=sys.stderr)
        sys.exit(143)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
        sys.stdout, sys.stderr = streams


class Unbreakable:
    """A text stream that drops what nobody can read any more: a closed pipe or a full disk ends no run."""

    def __init__(self, stream):
        # None is a stream that was closed before the start.
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what is still in its buffer goes nowhere, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def as_text(path) -> str:
    """A path, with what in it is no text, or controls a terminal or a table, as backslashes and digits."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: ascii(c[0])[1:-1], str(path))


def own_process():
    """What a script may set for its whole process, and a module that is imported may not."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter must not stop a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # what is too large or damaged is refused and named
    if "cv2" in sys.modules:
        cv2 = sys.modules["cv2"]
        cv2.setNumThreads(1)  # the pictures are small: work is spread over faces, never within one
        # What cannot be decoded is reported by the script: the decoder need not complain as well.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if "torch" in sys.modules:
        keep_freed_memory()


def keep_freed_memory():
    """Has glibc keep the memory of tensors that are freed, for those of the next layer and step.

    Else large ones go back to the system at once, which clears every page of those that follow.
    """
    with suppress(TypeError, AttributeError):  # Windows, and systems with another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def progress(*args, **options) -> tqdm:
    """A progress bar, silent where output is no terminal (a log), and for what is over within a second."""
    first = os.environ.get("RANK", "0") == "0"
    return tqdm(*args, leave=False, delay=1, disable=None if first else True, **options)


# ------------------------------------------------------------------------------------------------------------
# Files, whole or absent
# ------------------------------------------------------------------------------------------------------------


def shipped(path: str | Path) -> Path:
    """`path`, or for what ships with the project (`weights/`, `configs/`) the file beside the scripts.

    The working directory goes first. Nothing else in the scripts' folder is found so: it may be of another
    run.
    """
    path = Path(path)
    ours = ROOT / path
    ships = str(path.parent) in ("weights", "configs")
    return ours if ships and ours.is_file() and not path.exists() else path


def is_special(path: Path) -> bool:
    """Whether a path leads to a pipe or a device, which can be written but not replaced."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def is_stdout(path: str | Path) -> bool:
    """Whether a path leads to where standard output goes."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(1))
    return False


@contextmanager
def atomic_path(path: str | Path, sync: bool = False):
    """Yields a temporary path that takes `path`'s place on success and vanishes on failure.

    It lies beside, and ends as `path` does. `sync` has it on the disk before the old file goes, for what took
    long. A link is followed, and what is no regular file (a pipe, /dev/stdout) is yielded itself. Raises
    UserError if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        if is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        name = os.fsencode(target.name)[-200:].decode(errors="ignore")  # a long one must not become too long
        temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{name}")
        temporary.touch()
        try:
            yield temporary
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}): make room, or name another place") from None


def remove_leftovers(folder: Path, pattern: str = ".tmp-*", age: float = 3600):
    """Removes what killed runs left in `folder`; what is younger than `age` seconds may be a living run's."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another run was quicker, or is somebody else's
            if time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(flag: str, folder: str | Path):
    """UserError unless `folder`, or the nearest folder above it that exists, takes new files."""
    nearest = Path(folder).absolute()
    while not os.path.exists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # asking for permissions would not do: root has them all
    except OSError as error:
        why = f"is no folder that can be written ({error.strerror})"
        raise UserError(f"{flag}: {nearest} {why}: name another place") from None


def check_output(flag: str, path: str | Path):
    """UserError unless a file can be written at `path`; a link counts by where it leads."""
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: name a file in it")
    if is_stdout(path) and not is_special(path):  # it would be replaced under what is printed
        raise UserError(f"{flag} {path} is the file that standard output goes to: give its name")
    if not is_special(path):
        check_writable(flag, Path(os.path.realpath(path)).parent)


def read_table(path: str | Path) -> csv.DictReader:
    """The rows of a CSV as spreadsheets save it: by comma, semicolon or tab, behind a byte order mark.

    Raises OSError, ValueError or csv.Error for what is no CSV in UTF-8.
    """
    text = Path(path).read_text(encoding="utf-8-sig").replace("\0", "")  # csv refuses it before 3.11
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")


def write_csv(path: str | Path, rows: list[dict], columns: list[str] | None = None):
    """Writes rows (dicts with the same keys) as CSV; `columns` names the header when there may be no rows.

    What a file name holds that is no text is written as backslashes and digits.
    """
    with (
        atomic_path(path, sync=True) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        # QUOTE_MINIMAL does not quote a carriage return, as in macOS' "Icon\r", before Python 3.13.
        returns = any("\r" in str(value) for row in rows for value in row.values())
        quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
