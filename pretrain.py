"""Pretrains the backbone by contrast on the train split.

    python pretrain.py --epochs 100
    python pretrain.py --positives view --init imagenet
    torchrun --nproc-per-node=8 pretrain.py --batch-size 2048

--positives rank orders faces by age (Rank-N-Contrast), age attracts faces of one age, view attracts two views
of one face (SimCLR). Writes the backbone alone to --out, and beside it a history CSV, curves, and `.last.pt`
for --resume.
"""

from functools import partial

import torch
from torch import nn
from torchvision.models import resnet18

import cli
import common
import training
from devices import rank
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
        self.projection = nn.Identity()
        if projects:
            self.projection = nn.Sequential(
                nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
            )

    def forward(self, images):
        return self.projection(self.backbone(images))  # B×512 → B×128 or B×512


def contrastive_loss(model, batch, args):
    """The loss, in nats, of a batch of two views in a row of each face: (1,)."""
    z, ages = model(batch["image"]), batch["age"]  # 2B×3×H×W → 2B×128 or 2B×512; 2B
    temperature = args.temperature or TEMPERATURES[args.positives]
    if args.positives == "view":
        loss = common.nt_xent_loss(z[0::2], z[1::2], temperature)
    elif args.positives == "age":
        loss = common.age_contrastive_loss(z, ages.round(), temperature, args.sigma)
    else:
        loss = common.rank_contrastive_loss(z, ages, temperature)
    return loss[None]


def get_parser():
    defaults = {"out": "contrastive.pt", "init": "random", "epochs": 100, "batch_size": 256}
    parser = training.training_parser("pretrain", __doc__, **defaults)
    # fmt: off
    add, above_zero = parser.add_argument, cli.number(float, above=0)
    add("--positives", choices=["rank", "age", "view"], default="rank", help="what attracts, see above")
    add("--temperature", metavar="T", type=above_zero, help="of the loss; by default 2 for rank, else 0.07")
    add("--sigma", type=above_zero, default=0.5, help="for age: negatives weigh e^(years apart / 50 sigma)")
    # fmt: on
    return parser


def main(args):
    training.join_processes(args)
    state = training.open_run(args, "contrastive")
    folders = training.learned_folders(args)
    faces = sum(len(list_pairs(folder, need_masks=False)) for folder in folders)
    training.check_batch_size(args.batch_size, faces)

    options = {"views": 2, "with_masks": False, "seed": args.seed, "workers": args.workers}
    dataset = common.FaceDataset(folders, args.image_size, common.contrastive_augmentation, **options)
    torch.manual_seed(args.seed)
    model = ContrastiveResNet18(projects=args.positives != "rank")
    groups = common.build_param_groups(model, args.lr, weight_decay=args.weight_decay)
    run = training.begin_training(args, "contrastive", model, groups, dataset, state)

    while run.epoch < args.epochs:
        losses = training.train_one_epoch(run, partial(contrastive_loss, args=args))  # steps×1
        training.finish_epoch(run, {"loss": losses[:, 0].mean().item()})

    if not rank():
        weights = {f"backbone.{key}": value.cpu() for key, value in model.backbone.state_dict().items()}
        provenance = training.provenance(run)
        common.save_checkpoint(args.out, "contrastive", args, weights=weights, **provenance)
        print(
            f"{args.out} written: backbone after {args.epochs} epochs on {faces} faces "
            f"at {args.image_size} px, loss {run.history[-1]['loss']:.4f}"
        )
    training.finish_run(run, ["loss", "lr"])


if __name__ == "__main__":
    cli.run(main, get_parser())
