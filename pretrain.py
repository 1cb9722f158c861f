"""Pretrains the backbone by contrast: views of one face (or faces of one age) attract, all others repel.

    python pretrain.py --epochs 100
    python pretrain.py --positives age --init imagenet
    torchrun --nproc-per-node=8 pretrain.py --batch-size 2048

Writes the backbone alone (the projection head has done its work) to --out, and beside it a history CSV,
curves, and `.last.pt` for --resume.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

from torch import nn
from torchvision.models import resnet18

from common import (
    CONTRASTIVE_VIEW,
    FaceDataset,
    add_training_flags,
    age_contrastive_loss,
    build_param_groups,
    check_batch_size,
    choose_device,
    choose_precision,
    finish_epoch,
    init_backbone,
    join_processes,
    list_pairs,
    nt_xent_loss,
    number,
    open_run,
    plot_history,
    rank,
    run,
    save_checkpoint,
    script_parser,
    set_seed,
    start_training,
    train_one_epoch,
    write_csv,
)


class ContrastiveResNet18(nn.Module):
    """The backbone and a 2-layer projection head (Chen et al. 2020, section 4.2): (B, 3, H, W) → (B, 128)."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection = nn.Sequential(
            nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
        )

    def forward(self, images):
        return self.projection(self.backbone(images))  # B×512 → B×128


def contrastive_loss(model, batch, args):
    """The loss, in nats, of a batch of two views in a row of each face: (1,)."""
    z = model(batch["image"])  # 2B×3×H×W → 2B×128
    if args.positives == "view":
        loss = nt_xent_loss(z[0::2], z[1::2], args.temperature)
    else:
        loss = age_contrastive_loss(z, batch["age"], args.temperature, args.sigma)
    return loss[None]


def warn_of_odd_start(first_loss, batch_size):
    """At random weights no pair stands out yet, so NT-Xent starts near log(2N−1), or is miswired."""
    expected = math.log(2 * batch_size - 1)
    if abs(first_loss - expected) > 0.25 * expected:
        print(
            f"warning: the first loss, {first_loss:.2f}, is more than 25 % off log(2N-1) = {expected:.2f}: "
            "check the augmentation and --temperature",
            file=sys.stderr,
        )


def get_parser():
    parser = script_parser("pretrain", __doc__)
    add_training_flags(
        parser, "contrastive.pt", "random", epochs=100, batch_size=256, lr=1e-3, image_size=128
    )
    parser.add_argument(
        "--positives",
        choices=["view", "age"],
        default="view",
        help="what attracts: two views of a face (SimCLR), or all faces of one age",
    )
    parser.add_argument(
        "--temperature", type=number(float, above=0), default=0.07, help="of the contrastive loss"
    )
    parser.add_argument(
        "--sigma",
        type=number(float, above=0),
        default=0.5,
        help="for --positives age: negatives weigh e^(years apart / 50 sigma)",
    )
    return parser


def main(args):
    device = join_processes(choose_device(args.device))
    choose_precision(args.precision, device)
    state = open_run(args, "contrastive")
    train = Path(args.data) / "train"
    check_batch_size(args.batch_size, len(list_pairs(train, need_masks=False)))

    set_seed(args.seed)
    model = ContrastiveResNet18()
    start = None if state else init_backbone(model.backbone, args.init)
    dataset = FaceDataset(
        train, args.image_size, CONTRASTIVE_VIEW, views=2, with_masks=False,
        seed=args.seed, workers=args.workers, on_device=device.type == "cuda",
    )  # fmt: skip
    groups = build_param_groups(model, args.lr, weight_decay=args.weight_decay)
    training = start_training(args, "contrastive", model, groups, dataset, device, state, start)

    for epoch in range(training.epoch, args.epochs):
        began, begun = time.perf_counter(), training.step
        losses = train_one_epoch(training, partial(contrastive_loss, args=args))[:, 0]
        if epoch == 0 and args.positives == "view" and args.init == "random":
            warn_of_odd_start(losses[0].item(), args.batch_size)
        loss, lr = losses.mean().item(), training.schedule.get_last_lr()[0]
        seconds = time.perf_counter() - began
        speed = (len(losses) - begun) * args.batch_size / seconds
        print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, {seconds:.0f} s, {speed:.0f} faces/s")
        finish_epoch(training, {"epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": round(seconds, 1)})

    if rank():
        return
    weights = {f"backbone.{key}": value.cpu() for key, value in model.backbone.state_dict().items()}
    save_checkpoint(
        args.out, "contrastive", args,
        weights=weights, train_hashes=training.seen, pretraining=training.pretraining,
    )  # fmt: skip
    write_csv(Path(args.out).with_suffix(".csv"), training.history)
    panels = {"contrastive loss": ["loss"], "learning rate": ["lr"]}
    plot_history(Path(args.out).with_suffix(".png"), training.history, panels)
    print(
        f"{args.out} written: backbone after {args.epochs} epochs on {len(dataset)} faces "
        f"at {args.image_size} px, loss {training.history[-1]['loss']:.4f}"
    )


if __name__ == "__main__":
    run(main, get_parser())
