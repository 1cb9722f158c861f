"""Pretrains the backbone by contrast on the train split.

    python pretrain.py --epochs 100
    python pretrain.py --positives view --init imagenet
    torchrun --nproc-per-node=8 pretrain.py --batch-size 2048

--positives rank orders faces by age (Rank-N-Contrast), age attracts faces of one age, view attracts two views
of one face (SimCLR). Writes the backbone alone to --out, and beside it a history CSV, curves, and `.last.pt`
for --resume.
"""

import time
from functools import partial
from pathlib import Path

from torch import nn
from torchvision.models import resnet18

from cli import beside, number, run, write_csv
from common import (
    FaceDataset,
    age_contrastive_loss,
    build_param_groups,
    contrastive_augmentation,
    init_backbone,
    nt_xent_loss,
    rank_contrastive_loss,
    save_checkpoint,
)
from devices import rank, set_seed
from training import (
    begin_training,
    check_batch_size,
    finish_epoch,
    join_processes,
    leave_processes,
    open_run,
    plot_history,
    provenance,
    train_one_epoch,
    training_parser,
)
from utkface import list_pairs

TEMPERATURES = {"rank": 2.0, "age": 0.07, "view": 0.07}


class ContrastiveResNet18(nn.Module):
    """The backbone and, if `projects`, a 2-layer projection head (Chen et al. 2020, section 4.2).

    Images (B, 3, H, W) → (B, 128), or the backbone's own features (B, 512).
    """

    def __init__(self, projects: bool = True):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection = nn.Sequential(
            nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
        )
        if not projects:
            self.projection = nn.Identity()

    def forward(self, images):
        return self.projection(self.backbone(images))  # B×512 → B×128 or B×512


def contrastive_loss(model, batch, args):
    """The loss, in nats, of a batch of two views in a row of each face: (1,)."""
    z, ages = model(batch["image"]), batch["age"]  # 2B×3×H×W → 2B×128 or 2B×512; 2B
    temperature = args.temperature or TEMPERATURES[args.positives]
    if args.positives == "view":
        loss = nt_xent_loss(z[0::2], z[1::2], temperature)
    elif args.positives == "age":
        loss = age_contrastive_loss(z, ages.round(), temperature, args.sigma)
    else:
        loss = rank_contrastive_loss(z, ages, temperature)
    return loss[None]


def get_parser():
    parser = training_parser(
        "pretrain", __doc__, out="contrastive.pt", init="random", epochs=100, batch_size=256
    )
    # fmt: off
    add, above_zero = parser.add_argument, number(float, above=0)
    add("--positives", choices=["rank", "age", "view"], default="rank", help="what attracts, see above")
    add("--temperature", metavar="T", type=above_zero, help="of the loss; by default 2 for rank, else 0.07")
    add("--sigma", type=above_zero, default=0.5, help="for age: negatives weigh e^(years apart / 50 sigma)")
    # fmt: on
    return parser


def main(args):
    device, dtype = join_processes(args.device, args.precision)
    state = open_run(args, "contrastive")
    folders = [Path(args.data) / name for name in ("train", "val")[: 1 + args.final]]
    check_batch_size(args.batch_size, sum(len(list_pairs(folder, need_masks=False)) for folder in folders))

    options = {"views": 2, "with_masks": False, "seed": args.seed, "workers": args.workers}
    dataset = FaceDataset(folders, args.image_size, contrastive_augmentation, **options)
    set_seed(args.seed)
    model = ContrastiveResNet18(projects=args.positives != "rank")
    start = None if state else init_backbone(model.backbone, args.init)
    groups = build_param_groups(model, args.lr, weight_decay=args.weight_decay)
    training = begin_training(args, "contrastive", model, groups, dataset, device, dtype, state, start)

    for epoch in range(training.epoch, args.epochs):
        start = time.perf_counter()
        losses = train_one_epoch(training, partial(contrastive_loss, args=args))[:, 0]
        seconds = time.perf_counter() - start
        loss, lr = losses.mean().item(), training.scheduler.get_last_lr()[0]
        speed = len(losses) * args.batch_size / seconds
        print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, {seconds:.0f} s, {speed:.0f} faces/s")
        finish_epoch(training, {"epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": round(seconds, 1)})

    if not rank():
        weights = {f"backbone.{key}": value.cpu() for key, value in model.backbone.state_dict().items()}
        save_checkpoint(args.out, "contrastive", args, weights=weights, **provenance(training))
        write_csv(beside(args.out, ".csv"), training.history)
        panels = {"contrastive loss": ["loss"], "learning rate": ["lr"]}
        plot_history(beside(args.out, ".png"), training.history, panels)
        print(
            f"{args.out} written: backbone after {args.epochs} epochs on {len(dataset)} faces "
            f"at {args.image_size} px, loss {training.history[-1]['loss']:.4f}"
        )
    leave_processes()


if __name__ == "__main__":
    run(main, get_parser())
