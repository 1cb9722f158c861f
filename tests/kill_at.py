"""Runs a script and kills it, by SIGKILL, at its N-th event: `python kill_at.py N script.py …`.

An event is the moment before or after a training step, a file reaching the disk, taking its place, or being
linked. With N = 0 nothing is killed and the last line printed is the number of events. KILL_GROUP_BY=SIGINT
in the environment sends that to the whole process group instead, as a terminal does.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
at, events = int(sys.argv[1]), 0


def happen():
    global events
    events += 1
    if events == at:
        if "KILL_GROUP_BY" in os.environ:
            os.killpg(0, signal.Signals[os.environ["KILL_GROUP_BY"]])
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def watch(owner, name):
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        happen()
        result = original(*args, **kwargs)
        happen()
        return result

    setattr(owner, name, watched)


for owner, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "rename")):
    watch(owner, name)
sys.argv = sys.argv[2:]
script = Path(sys.argv[0])
sys.path.insert(0, str(script.parent))
if script.stem in ("pretrain", "finetune"):
    import torch

    import common
    from small_model import small_backbone

    common.resnet18 = small_backbone
    watch(torch.optim.AdamW, "step")
runpy.run_path(str(script), run_name="__main__")
print(events)
