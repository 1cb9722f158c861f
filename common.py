"""What a reader looks for first: data set, augmentation, model, losses, optimizer groups, checkpoints.

The rooms, in order, are marked by banner comments. How training runs is in training.py.
"""

import argparse
import io
import math
import os
import random
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import looks for updates, on the network

import albumentations as A
import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import ResNet18_Weights, resnet18

import utkface
from cli import MAX_SIDE, UserError, atomic_path, progress, settings_of, shipped
from devices import autocast, copy_to, gather_rows, merge_ranks, rank, world_size

# ------------------------------------------------------------------------------------------------------------
# Augmentation: image and mask move together
# ------------------------------------------------------------------------------------------------------------

LINEAR = cv2.INTER_LINEAR


def contrastive_augmentation(image_size: int) -> A.Compose:
    """SimCLR's (Chen et al. 2020, appendix A), its crops mild enough to keep most of a face."""
    light = (0.6, 1.4)
    return A.Compose(
        [
            A.RandomResizedCrop(
                (image_size, image_size), (0.5, 1), (3 / 4, 4 / 3), mask_interpolation=LINEAR
            ),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(light, light, light, hue=(-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.5), p=0.3),
        ]
    )


def supervised_augmentation(image_size: int) -> A.Compose:
    """Leaves the signs of age alone, but erases a part of half the faces at random (Zhong et al. 2020)."""
    light, box = (0.7, 1.3), (0.15, 0.45)  # factors; shares of each side
    return A.Compose(
        [
            A.Rotate(12, border_mode=cv2.BORDER_REFLECT, mask_interpolation=LINEAR, p=0.5),
            A.RandomResizedCrop((image_size, image_size), (0.7, 1), (0.9, 1.1), mask_interpolation=LINEAR),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(light, light, light, hue=(-0.03, 0.03), p=0.8),
            A.ToGray(p=0.1),
            A.CoarseDropout((1, 1), box, box, fill="random", p=0.5),  # the mask stays whole
        ]
    )


def seed_augmentation(augment: A.Compose, *key: int):
    """Makes the next draws of a pipeline depend on `key` alone.

    One generator is shared by all transforms: `Compose.set_random_seed` would give each its own copy of the
    same stream, so that a picture would be turned grey only when it is also flipped.
    """
    generator = np.random.default_rng(key)
    augment.set_random_state(generator, random.Random(int(generator.integers(2**63))))


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------

ATTRIBUTES = {"gender": len(utkface.GENDERS), "race": len(utkface.RACES)}  # in the order of their logits


class FaceDataset(Dataset):
    """Faces of one split folder or several, decoded once and kept in memory as uint8 for all workers.

    A batch is a dict of tensors: `image` uint8 (B, H, W, 3) RGB; `mask` uint8 (B, H, W) in {0, 1}, with
    `with_masks`; `age` (B,) in years, and `spread` (B,), the years to each side if it is a range; `group`
    (B,) 0–5, `gender` (B,) 0–1 and `race` (B,) 0–4, -1 where unknown. `augmentation` draws `views` of each
    face, in a row, from (seed, epoch, index) alone. An index is an int or the pair (epoch, index).

    `.faces` lists what the names say, `.labels` holds the above of all faces, `.images` and `.masks` (0–255)
    are their pictures, and `.hashes` int64 (N,) names their pixels. Raises UserError for a missing or empty
    folder, an unreadable image, or a mask that is missing or of another size.
    """

    def __init__(self, folders, image_size, augmentation=None, views=1, with_masks=True, seed=0, workers=1):
        folders = [folders] if isinstance(folders, str | Path) else folders
        places = [(folder, face) for folder in folders for face in utkface.list_pairs(folder, with_masks)]
        self.faces = [face for _, face in places]
        names = ("age", "spread", "group", *ATTRIBUTES)
        self.labels = {name: torch.tensor([getattr(face, name) for face in self.faces]) for name in names}
        self.ages, self.groups = self.labels["age"].numpy(), self.labels["group"].numpy()
        self.views, self.seed = views, seed
        self.augment = augmentation(image_size) if augmentation else None
        # A random crop is enlarged to the output's side: a quarter more pixels than that keep it sharp.
        side = image_size * 5 // 4 if augmentation else image_size
        # Tensors, because where workers are not forked those are shared with them, and arrays copied.
        shape = len(self), side, side
        try:
            self.images = torch.empty((*shape, 3), dtype=torch.uint8)
            self.masks = torch.empty(shape, dtype=torch.uint8) if with_masks else None
        except RuntimeError:  # torch's word for too little memory
            needed = f"{math.prod(shape) * (3 + with_masks) / 1e9:.1f} GB of memory at {image_size} px"
            raise UserError(f"{len(self)} faces need {needed}: take fewer, or train at fewer px") from None
        self.hashes = torch.empty(len(self), dtype=torch.int64)

        def load(index):
            folder, face = places[index]
            if with_masks:
                image, mask = utkface.read_pair(folder, face.stem)
                self.masks[index] = torch.from_numpy(utkface.resize(mask, side))
            else:
                image = utkface.read_image(Path(folder) / f"{face.stem}_image.png")
            self.hashes[index] = utkface.pixel_hash(image)
            image = cv2.cvtColor(utkface.resize(image, side), cv2.COLOR_BGR2RGB)
            self.images[index] = torch.from_numpy(image)

        with ThreadPool(max(workers, 1)) as pool:
            loading = pool.imap_unordered(load, range(len(self)), chunksize=16)
            for _ in progress(loading, f"read {Path(folders[0]).name}", len(self), unit="face"):
                pass

    def __len__(self):
        return len(self.faces)

    def __getitems__(self, keys):
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        rows = torch.tensor([index for _, index in keys]).repeat_interleave(self.views)
        batch = {name: values[rows] for name, values in self.labels.items()}
        drawn = [view for key in keys for view in self.draw(*key)]
        batch["image"] = torch.from_numpy(np.stack([view["image"] for view in drawn]))
        if self.masks is not None:
            masks = torch.from_numpy(np.stack([view["mask"] for view in drawn]))
            batch["mask"] = (masks > 127).to(torch.uint8)
        return batch

    def draw(self, epoch, index):
        """The `views` of a face in an epoch: dicts of `image` uint8 (H, W, 3) and `mask` uint8 (H, W)."""
        pixels = {"image": self.images[index].numpy()}
        if self.masks is not None:
            pixels["mask"] = self.masks[index].numpy()
        if self.augment is None:
            return [pixels] * self.views
        seed_augmentation(self.augment, self.seed, epoch, index)
        return [self.augment(**pixels) for _ in range(self.views)]

    def __getitem__(self, key):
        batch = self.__getitems__([key])
        return batch if self.views > 1 else {name: values[0] for name, values in batch.items()}


@cache  # made once: a step must not wait while they travel to the device
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) of pixels with values 0–255."""
    mean = torch.tensor(utkface.PIXEL_MEAN, device=device).view(3, 1, 1) * 255
    std = torch.tensor(utkface.PIXEL_STD, device=device).view(3, 1, 1) * 255
    return mean, std


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 RGB (B, H, W, 3) to normalised float32 (B, 3, H, W) on `device`, in channels-last memory."""
    images = copy_to(device, images).permute(0, 3, 1, 2)  # B×3×H×W
    mean, std = pixel_statistics(images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class MaskDecoder(nn.Module):
    """Top-down decoder from the backbone's five maps to mask logits, after FPN (Lin et al. 2017)."""

    def __init__(self, channels=(64, 64, 128, 256, 512), width=32):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in channels[1:]
        )
        self.predict = nn.Conv2d(width, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps at strides 2, 4, 8, 16, 32, (B, C_i, H/stride, W/stride) each → logits (B, 1, H, W)."""
        x = self.laterals[-1](maps[-1])  # B×width×H/32×W/32
        for lateral, smooth, finer in list(zip(self.laterals, self.smooths, maps))[::-1]:
            x = smooth(F.interpolate(x, scale_factor=2.0, mode="nearest") + lateral(finer))  # twice the sides
        return F.interpolate(self.predict(x), scale_factor=2.0, mode="bilinear")  # B×1×H×W


class Heads(NamedTuple):
    """What the heads say of B images; None for a head that is not there."""

    age_logits: Tensor  # B×YEARS from a model `by_year`, else B×6
    mask_logits: Tensor | None  # B×1×H×W
    attribute_logits: dict[str, Tensor] | None  # B×2 of gender, B×5 of race


class MultitaskResNet18(nn.Module):
    """ResNet18 (torchvision) with a head for age groups and, if `multitask`, a decoder for the face mask.

    by_year: the head tells `YEARS` single years, which sum into the groups. attributes: further heads for
    gender and race, for training alone. flip_averaging: `infer` averages over a face and its mirror image.
    """

    def __init__(self, num_groups=6, multitask=True, by_year=False, flip_averaging=False, attributes=False):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # the backbone alone gives B×512 features
        self.head = nn.Linear(512, YEARS if by_year else num_groups)
        self.decoder = MaskDecoder() if multitask else None
        self.attributes = nn.Linear(512, sum(ATTRIBUTES.values())) if attributes else None
        self.by_year, self.flip_averaging = by_year, flip_averaging

    def forward(self, images: Tensor, heads: bool = False) -> tuple[Tensor, Tensor | None] | Heads:
        """Normalised images (B, 3, H, W) → group logits (B, 6), mask logits (B, 1, H, W) or None.

        heads: returns what each head says instead, as training needs it. Raises ValueError if there is a
        decoder and H or W is no multiple of 32.
        """
        if self.decoder is not None and (images.shape[-2] % 32 or images.shape[-1] % 32):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(images.shape[-2:])}")
        net = self.backbone
        maps = [net.relu(net.bn1(net.conv1(images)))]  # B×64×H/2×W/2
        x = net.maxpool(maps[0])  # B×64×H/4×W/4
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)  # strides 4, 8, 16, 32 with 64, 128, 256, 512 channels
        features = net.avgpool(x).flatten(1)  # B×512
        age_logits = self.head(features)  # B×6 or B×YEARS
        mask_logits = None if self.decoder is None else self.decoder(maps)  # B×1×H×W
        if not heads:
            return group_logits(age_logits) if self.by_year else age_logits, mask_logits
        attribute_logits = None
        if self.attributes is not None:
            parts = self.attributes(features).split(list(ATTRIBUTES.values()), dim=1)  # B×2, B×5
            attribute_logits = dict(zip(ATTRIBUTES, parts))
        return Heads(age_logits, mask_logits, attribute_logits)


def make_model(settings: dict, training: bool = False) -> MultitaskResNet18:
    """The untrained model that finetune.py's settings ask for; its attribute heads in `training` alone."""
    return MultitaskResNet18(
        multitask=bool(settings.get("multitask")),
        by_year=bool(settings.get("age_sigma")),
        flip_averaging=bool(settings.get("flip_averaging")),
        attributes=training and bool(settings.get("attribute_weight")),
    )


def init_backbone(backbone: nn.Module, init: str) -> dict:
    """Loads `init` (random, imagenet, or a checkpoint file) into a backbone, and prints what was loaded.

    Returns the provenance of the weights: `train_hashes` int64 (M,), of the faces that they have learned
    from; `val_hashes`, of those that an epoch was selected on; `pretraining`, the settings that they were
    trained with, {} for no checkpoint. Raises UserError if the ImageNet weights cannot be had, or if the file
    is no checkpoint or nothing in it fits.
    """
    none = torch.empty(0, dtype=torch.int64)
    provenance = {"train_hashes": none, "val_hashes": none, "pretraining": {}}
    if init == "random":
        print("backbone starts from random weights")
        return provenance
    if init == "imagenet":
        try:
            weights = ResNet18_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, no space, a damaged file
            place = f"put {ResNet18_Weights.DEFAULT.url} into {Path(torch.hub.get_dir(), 'checkpoints')}"
            raise UserError(
                f"--init imagenet: torchvision could not download or read the weights ({error}): {place}, "
                "or use --init random, or a checkpoint such as --init contrastive.pt"
            ) from None
    else:
        checkpoint = load_checkpoint(init, "contrastive", "model")
        weights = {key.removeprefix("backbone."): value for key, value in checkpoint["weights"].items()}
        provenance = {key: checkpoint[key] for key in provenance}
        # Whoever asks what the weights have seen need not follow the chain: a --final before this one counts.
        final = checkpoint["config"].get("final") or checkpoint["pretraining"].get("final", False)
        provenance["pretraining"] = checkpoint["config"] | {"final": final}
    own = backbone.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UserError(f"--init {init} holds no weight that fits the ResNet18 backbone")
    backbone.load_state_dict(fitting, strict=False)
    print(f"backbone: {len(fitting)} of {len(own)} tensors loaded from {init}; heads start fresh")
    return provenance


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------


def unit_rows(z: Tensor) -> Tensor:
    """(N, D) → (N, D) with rows of length one, in at least float32."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def own_columns(z: Tensor) -> Tensor:
    """Where the rows of z (N, D) stand in `gather_rows(z)` (NW, D): int64 (N, 1)."""
    return torch.arange(len(z), device=z.device)[:, None] + rank() * len(z)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.07) -> Tensor:
    """NT-Xent over the 2N views of N faces (Chen et al. 2020, equation 1).

    z1, z2: (N, D) embeddings of two views, row by row of the same face; any scale, half precision allowed.
    Returns a scalar in nats; log(2N−1) when all embeddings coincide. Under torchrun the negatives are the
    faces of all W processes, with gradient; the processes' mean is the whole batch's.
    """
    z = torch.stack([unit_rows(z1), unit_rows(z2)], dim=1).flatten(0, 1)  # 2N×D, views of a face in a row
    everything = gather_rows(z)  # 2NW×D
    with torch.autocast(z.device.type, enabled=False):  # 1/temperature would overflow half precision's range
        logits = z @ everything.T / temperature  # 2N×2NW
    own = own_columns(z)  # 2N×1; the other view of a face is its neighbour
    return F.cross_entropy(logits.scatter(1, own, -torch.inf), own[:, 0] ^ 1)


def age_contrastive_loss(z: Tensor, ages: Tensor, temperature: float = 0.07, sigma: float = 0.5) -> Tensor:
    """Supervised InfoNCE: faces of one age attract, others repel the more, the further apart in age.

    z: (N, D) embeddings; ages: (N,) years. Returns a scalar in nats, zero if no two rows share an age. With s
    the cosine similarity, τ the temperature and P(i) the other rows of i's age, it is the mean over i with
    non-empty P(i) of −1/|P(i)| Σ_{p∈P(i)} log[ e^{s_ip/τ} / (e^{s_ip/τ} + Σ_{age_k≠age_i}
    e^{|age_i−age_k|/(50σ)} e^{s_ik/τ}) ]: SupCon (Khosla et al. 2020) with one positive a term, negatives
    weighted by their distance in age. Under torchrun k and p run over the faces of all W processes, with
    gradient; the processes' mean is that of the whole batch where each row has a positive.
    """
    z = unit_rows(z)  # N×D
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ gather_rows(z).T / temperature  # N×NW
    gaps = (ages[:, None] - gather_rows(ages)[None, :]).abs().to(logits.dtype)  # N×NW
    same = gaps == 0
    # The lowest finite number, not −inf: a row without negatives then has a zero gradient instead of NaN.
    weighted = (logits + gaps / (50 * sigma)).masked_fill(same, torch.finfo(logits.dtype).min)
    negatives = weighted.logsumexp(dim=1, keepdim=True)  # N×1
    log_ratios = F.logsigmoid(logits - negatives)  # N×NW
    positives = same.scatter(1, own_columns(z), False)
    counts = positives.sum(dim=1)  # N
    losses = -(log_ratios * positives).sum(dim=1) / counts.clamp(min=1)  # N
    return losses.sum() / (counts > 0).sum().clamp(min=1)


def rank_contrastive_loss(z: Tensor, ages: Tensor, temperature: float = 2.0) -> Tensor:
    """Rank-N-Contrast: of two faces, the one nearer in age must lie nearer (Zha et al. 2023, equation 2).

    z: (N, D) features, not normalised, any precision; ages: (N,) years. With s_ij = −‖z_i − z_j‖₂/τ it is the
    mean over ordered pairs i ≠ j of −log[ e^{s_ij} / Σ_{k≠i, |a_i−a_k| ≥ |a_i−a_j|} e^{s_ik} ], a scalar in
    nats. It costs O(N² log N): each row is sorted by years apart, and summed from the far end. Under torchrun
    j and k run over the faces of all W processes, with gradient; the processes' mean is the whole batch's.
    """
    z = z if z.dtype == torch.float64 else z.float()
    everything = gather_rows(z)  # NW×D
    centre = everything.detach().mean(dim=0)  # D; about it distances lose least to rounding
    with torch.autocast(z.device.type, enabled=False):
        logits = -torch.cdist(z - centre, everything - centre) / temperature  # N×NW
    own = own_columns(z)  # N×1
    logits = logits.scatter(1, own, torch.finfo(logits.dtype).min)  # a row is no pair with itself
    apart = (ages[:, None] - gather_rows(ages)[None, :]).abs()  # N×NW
    apart, order = apart.sort(dim=1, descending=True)  # the farthest first
    logits = logits.gather(1, order)
    last_of_tie = torch.searchsorted(-apart, -apart, right=True) - 1  # N×NW
    denominators = logits.logcumsumexp(dim=1).gather(1, last_of_tie)  # N×NW
    losses = (denominators - logits).masked_fill(order == own, 0.0)  # N×NW
    return losses.sum() / (len(z) * (len(everything) - 1))


YEARS = 101  # 0 to 99 and "100 or more"
GROUP_SIZES = [min(last, YEARS - 1) + 1 - first for first, last in utkface.AGE_GROUPS.values()]


def group_logits(logits: Tensor) -> Tensor:
    """Logits of years (B, YEARS) → of the age groups (B, 6), so that a group has its years' probability."""
    return torch.stack([part.logsumexp(dim=1) for part in logits.float().split(GROUP_SIZES, dim=1)], dim=1)


def age_quantiles(logits: Tensor) -> Tensor:
    """Logits of years (B, YEARS) → years below which 50, 10 and 90 % of the probability lie, float (B, 3).

    The first is the median, whose mean absolute error on val is smaller than that of the expectation; the
    others are the ends of the central 80 %.
    """
    below = logits.float().softmax(dim=1).cumsum(dim=1)  # B×YEARS
    return torch.stack([(below < share).float().sum(dim=1) for share in (0.5, 0.1, 0.9)], dim=1)


def soft_age_labels(ages: Tensor, sigma: float, spread: Tensor | float = 0) -> Tensor:
    """Ages (B,) in years → probabilities (B, YEARS), a normal bell of `sigma` years around each.

    Soft labels as in Gao et al. 2018, section 3.1; what lies beyond 0 or 100 years is left out of the sum.
    spread (B,): years to each side of the age that are as likely as it, for ages known as a range.
    """
    years = torch.arange(YEARS, device=ages.device)
    first, last = ((ages + side).clamp(max=YEARS - 1)[:, None] for side in (-spread, spread))  # B×1 each
    distance = torch.maximum(first - years, years - last).clamp(min=0)  # B×YEARS
    return (-((distance / sigma) ** 2) / 2).softmax(dim=1)


def known_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C), a mean over the faces whose class (B,) is known, not -1; 0 of none."""
    losses = F.cross_entropy(logits.float(), classes, ignore_index=-1, reduction="sum")
    return losses / (classes >= 0).sum().clamp(min=1)


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice (per image, then mean) for a one-channel mask.

    logits, mask: (B, 1, H, W), the mask in [0, 1] of any dtype. Returns a scalar, zero in the limit of a
    perfect mask. Raises ValueError if the shapes differ.
    """
    if logits.shape != mask.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)} differ in shape")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    mask = mask.to(logits.dtype)
    probability = logits.sigmoid()
    overlap = (probability * mask).sum(dim=(1, 2, 3))  # B
    total = (probability + mask).sum(dim=(1, 2, 3))  # B
    dice = (2 * overlap + 1) / (total + 1)  # the 1 makes an empty mask that is predicted empty perfect
    return F.binary_cross_entropy_with_logits(logits, mask) + (1 - dice).mean()


# ------------------------------------------------------------------------------------------------------------
# Optimizer groups
# ------------------------------------------------------------------------------------------------------------


def build_param_groups(
    model: nn.Module, lr: float, strategy: str = "uniform", backbone_lr_scale=0.3, weight_decay=0.0
) -> list[dict]:
    """Optimizer groups: every parameter in exactly one, no decay for biases and norms.

    strategy: "uniform" (one rate) or "differentiated" (parameters under `model.backbone` at lr ×
    backbone_lr_scale). Raises ValueError for another strategy.
    """
    if strategy not in ("uniform", "differentiated"):
        raise ValueError(f"strategy must be uniform or differentiated, not {strategy}")
    rates = {"heads": lr, "backbone": lr * (backbone_lr_scale if strategy == "differentiated" else 1)}
    groups = {}
    for name, parameter in model.named_parameters():
        part = "backbone" if name.startswith("backbone.") else "heads"
        decays = parameter.ndim > 1  # biases and the scales of norms are vectors
        group = {"name": part if decays else f"{part}, no decay", "params": []}
        group |= {"lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault(group["name"], group)["params"].append(parameter)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------
# Scoring a data set
# ------------------------------------------------------------------------------------------------------------


def infer(model: MultitaskResNet18, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a model in eval mode says of normalised images (B, 3, H, W); None for what it has not learned.

    Returns group logits float32 (B, 6), years (B, 3) as `age_quantiles` gives them, and mask logits
    (B, 1, H, W). With `model.flip_averaging` each face is averaged with its mirror image.
    """
    age_logits, mask_logits, _ = model(images, heads=True)  # B×YEARS or B×6, B×1×H×W
    if model.flip_averaging:
        mirrored, mirrored_mask, _ = model(images.flip(-1), heads=True)
        probabilities = (age_logits.float().softmax(dim=1) + mirrored.float().softmax(dim=1)) / 2
        age_logits = probabilities.clamp(min=1e-12).log()
        if mask_logits is not None:
            mask_logits = (mask_logits + mirrored_mask.flip(-1)) / 2
    if model.by_year:
        return group_logits(age_logits), age_quantiles(age_logits), mask_logits
    return age_logits.float(), None, mask_logits


def faces_at_once(most: int, side: int) -> int:
    """`most` faces of sides up to 128 pixels, of larger ones fewer, lest memory grow with the pictures."""
    return max(1, min(most, most * 128**2 // side**2))


@torch.inference_mode()
def score_dataset(model, dataset: FaceDataset, device, dtype=torch.float32, batch_size: int = 256) -> tuple:
    """Scores every face of a dataset that has no augmentation, in order; processes take every W-th each.

    batch_size: as `faces_at_once` takes it.
    Returns group logits float32 (N, 6), years (N, 3) as `age_quantiles` gives them, and IoU and Dice of the
    masks float64 (N, 2), on the CPU; None for what the model has not learned or the dataset lacks.
    """
    model.eval()
    if world_size() > 1:  # batch statistics may differ between CPU processes
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    own = slice(rank(), None, world_size())
    images, masks = dataset.images[own], None if dataset.masks is None else dataset.masks[own]
    batch_size = faces_at_once(batch_size, images.shape[1])
    batches = []
    for start in range(0, max(len(images), 1), batch_size):
        batch = to_input(images[start : start + batch_size], device)
        with autocast(device, dtype):
            logits, years, mask_logits = infer(model, batch)
        overlap = None
        if mask_logits is not None and masks is not None:
            truth = masks[start : start + batch_size].to(device) > 127  # B×H×W
            overlap = mask_overlap(mask_logits[:, 0] > 0, truth)  # B×2
        batches.append((logits, years, overlap))
    return tuple(None if part[0] is None else merge_ranks(torch.cat(part)) for part in zip(*batches))


def mask_overlap(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU and Dice of boolean masks (B, H, W) each: float64 (B, 2) on the CPU; two empty masks agree."""
    both = (predicted & truth).sum(dim=(1, 2)).cpu().double()
    either = (predicted | truth).sum(dim=(1, 2)).cpu().double()
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return torch.stack([iou, 2 * iou / (1 + iou)], dim=1)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 2


def save_checkpoint(path: str | Path, kind: str, args: argparse.Namespace, **content):
    """Writes a checkpoint: tensors and builtins with kind, version, config, preprocessing, `content`."""
    pixels = {"mean": utkface.PIXEL_MEAN, "std": utkface.PIXEL_STD, "channels": "RGB"}
    header = {"kind": kind, "format_version": FORMAT_VERSION, "config": settings_of(args)}
    header["preprocessing"] = {"image_size": args.image_size, **pixels}
    buffer = io.BytesIO()  # given a path, torch.save raises RuntimeError where the disk is full
    torch.save(header | content, buffer)
    with atomic_path(path, sync=True) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path, *kinds: str) -> dict:
    """Reads a checkpoint of one of `kinds` onto the CPU; UserError if it is missing or anything else.

    Those that ship with the project are found from any working directory.
    """
    path = shipped(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: run the stage that writes it, or name another file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or hostile file raises depends on where it breaks
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    kind = checkpoint.get("kind", "foreign") if isinstance(checkpoint, dict) else "foreign"
    if kind not in kinds:
        raise UserError(f"{path} is a {kind} checkpoint, where a {' or '.join(kinds)} one is needed")
    version = checkpoint.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, not {FORMAT_VERSION}: train again")
    types = {"config": dict, "preprocessing": dict}
    if not kind.endswith(".last"):
        checkpoint.setdefault("val_hashes", torch.empty(0, dtype=torch.int64))  # older ones lack it
        types |= {"weights": dict, "train_hashes": Tensor, "val_hashes": Tensor, "pretraining": dict}
    sound = all(isinstance(checkpoint.get(key), expected) for key, expected in types.items())
    size = checkpoint["preprocessing"].get("image_size") if sound else None
    sound = isinstance(size, int) and size in range(32, MAX_SIDE + 1, 32)
    if sound and "weights" in types:
        pairs = checkpoint["weights"].items()
        sound = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs)
        hashes = checkpoint["train_hashes"], checkpoint["val_hashes"]
        sound = sound and all(part.dtype == torch.int64 for part in hashes)
    if not sound:
        raise UserError(f"{path} is damaged: train again")
    return checkpoint


def load_model(path: str | Path, device: torch.device) -> tuple[MultitaskResNet18, dict]:
    """The model of a checkpoint that finetune.py wrote, in eval mode on `device`, and the checkpoint.

    Raises UserError if the file is missing or anything else, or if its weights do not fit or are not finite.
    """
    checkpoint = load_checkpoint(path, "model")
    model = make_model(checkpoint["config"])
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError:
        raise UserError(f"{path} is damaged: its weights do not fit the model; train again") from None
    if not all_finite(model):
        raise UserError(f"{path} holds weights that are infinite or NaN: train again")
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def all_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics of a model are finite numbers."""
    return all(bool(values.isfinite().all()) for values in model.state_dict().values())
