"""Trains every row of the results table, skipping what is done, and scores them together.

    python table.py
    python table.py --config configs/table_small.yaml
    python table.py --weights random view --tasks multitask --seeds 0 1 2

Runs pretrain.py and finetune.py for each row and seed, then evaluate.py on all of them, each as you would by
hand; the `pretrain:` and `finetune:` sections of --config are theirs. What was stopped is taken up where it
stood. A row that cannot be trained, such as one whose ImageNet weights cannot be downloaded, is reported, and
the rest goes on. Writes checkpoints to --out, and to --results what evaluate.py writes, table.md among it.
"""

import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError, add_device_flags, atomic_path, check_writable, number, run, script_parser

WEIGHTS = ("random", "imagenet", "view", "age")
TASKS = ("classification", "multitask")
LR_STRATEGIES = ("uniform", "differentiated")


def call(script, *flags):
    """Runs a script in a process of its own; returns the last line of its errors, or None if it succeeded."""
    flags = [str(flag) for flag in flags]
    print(f"\n$ python {script}.py {shlex.join(flags)}", flush=True)
    path, last = Path(__file__).resolve().parent / f"{script}.py", ""
    process = subprocess.Popen([sys.executable, path, *flags], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
    except BaseException:  # this script is stopped, so the other must be
        process.terminate()
        process.wait()
        raise
    if code in (130, 143):
        raise KeyboardInterrupt
    return (last or f"{script}.py ended with exit code {code}") if code else None


def get_parser():
    parser = script_parser("table", __doc__)
    parser.add_argument("--data", default="dataset/processed_split", help="folder written by split.py")
    parser.add_argument("--out", default="table", help="folder for the checkpoints")
    parser.add_argument("--results", default="results", help="folder for the scores")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS,
        help="where backbones start; view and age are contrastive pretraining by these positives",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="with the mask or without")
    parser.add_argument(
        "--lr-strategies", nargs="+", choices=LR_STRATEGIES, default=LR_STRATEGIES, help="learning rates"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=number(int, low=0), default=[0, 1, 2],
        help="seeds of both kinds of training; --seed is that of the bootstrap",
    )  # fmt: skip
    add_device_flags(parser)
    return parser


def main(args):
    out, results = Path(args.out), Path(args.results)
    check_writable("--out", out)
    check_writable("--results", results)
    places = ["--data", args.data, "--workers", args.workers]
    places += ["--device", args.device, "--precision", args.precision]
    places += ["--config", args.config] if args.config else []
    training = [*places, "--overwrite" if args.overwrite else "--resume"]
    models, failed = [], {}
    for seed in args.seeds:
        starts = {}
        for weights in dict.fromkeys(args.weights):
            starts[weights] = weights
            if weights in ("view", "age"):
                starts[weights] = out / f"contrastive-{weights}-seed{seed}.pt"
                flags = ["--positives", weights, "--seed", seed, "--out", starts[weights]]
                error = call("pretrain", *training, *flags)
                if error:
                    failed.setdefault(error, []).append(starts[weights].stem)
                    del starts[weights]
        rows = product(starts, dict.fromkeys(args.tasks), dict.fromkeys(args.lr_strategies))
        for weights, task, strategy in rows:
            path = out / f"{task}-{weights}-{strategy}-seed{seed}.pt"
            flags = ["--multitask" if task == "multitask" else "--no-multitask", "--lr-strategy", strategy]
            flags += ["--init", starts[weights], "--seed", seed, "--out", path]
            error = call("finetune", *training, *flags)
            if error:
                failed.setdefault(error, []).append(path.stem)
            else:
                models.append(path)
    if not models:
        raise UserError(f"no row was trained: {next(iter(failed))}")
    error = call("evaluate", *places, "--seed", args.seed, "--out", results, *models)
    if error:
        raise UserError(error)
    report = "".join(f"\nNot trained: {', '.join(names)} ({error})\n" for error, names in failed.items())
    table = results / "table.md"
    if report and len(models) > 1:
        with atomic_path(table, sync=True) as temporary:
            temporary.write_text(table.read_text(encoding="utf-8") + report, encoding="utf-8")
    print(report + f"{results} written: {len(models)} models, {sum(map(len, failed.values()))} not trained")


if __name__ == "__main__":
    run(main, get_parser())
