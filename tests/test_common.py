import math
import os
from argparse import Namespace

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from cli import write_csv
from common import (
    FaceDataset,
    MultitaskResNet18,
    UserError,
    age_contrastive_loss,
    build_param_groups,
    contrastive_augmentation,
    infer,
    mask_loss,
    mask_overlap,
    nt_xent_loss,
    rank_contrastive_loss,
    save_checkpoint,
    seed_augmentation,
    supervised_augmentation,
    to_input,
)
from conftest import noise_pairs, write_pair
from training import to_device, train_loader
from utkface import AGE_GROUPS

CPU = torch.device("cpu")


# Model


@pytest.mark.parametrize("multitask", [True, False])
@pytest.mark.parametrize("height, width", [(64, 64), (96, 128)])
def test_model_shapes(multitask, height, width):
    model = MultitaskResNet18(num_groups=6, multitask=multitask)
    logits, mask_logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 6)
    assert mask_logits.shape == (2, 1, height, width) if multitask else mask_logits is None


def test_masks_are_smooth_to_the_pixel():
    sides = zip((64, 64, 128, 256, 512), (32, 16, 8, 4, 2))
    logits = common.MaskDecoder().eval()([torch.randn(1, count, side, side) for count, side in sides])
    assert logits.shape == (1, 1, 64, 64)
    assert not torch.equal(logits[..., ::2, ::2], logits[..., 1::2, 1::2])


def test_model_size():
    assert sum(parameter.numel() for parameter in MultitaskResNet18().parameters()) <= 12_300_000


def test_the_model_sees_what_the_backbone_alone_does():
    torch.manual_seed(0)
    model, images = MultitaskResNet18().eval(), torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images)[0], model.head(model.backbone(images)), atol=1e-5)


def test_model_refuses_other_sides():
    with pytest.raises(ValueError, match="multiples of 32"):
        MultitaskResNet18()(torch.randn(1, 3, 64, 80))


def test_every_parameter_learns():
    model = MultitaskResNet18()
    logits, mask_logits = model(torch.randn(4, 3, 64, 64))
    mask = (torch.rand(4, 1, 64, 64) > 0.5).float()
    (F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])) + mask_loss(mask_logits, mask)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Losses


def textbook_nt_xent(z, ages, temperature):
    """Rows 2k and 2k + 1 are the views of one face."""
    z, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        terms = torch.stack([z[i] @ z[k] / temperature for k in range(len(z)) if k != i])
        losses.append(terms.logsumexp(dim=0) - z[i] @ z[i ^ 1] / temperature)
    return torch.stack(losses).mean()


def textbook_age(z, ages, temperature, sigma=0.5):
    z, losses = z / z.norm(dim=1, keepdim=True), []
    s = z @ z.T / temperature
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and ages[p] == ages[i]]
        others = [k for k in range(len(z)) if ages[k] != ages[i]]
        weighted = sum(
            ((ages[k] - ages[i]).abs().double() / (50 * sigma)).exp() * s[i, k].exp() for k in others
        )
        terms = [-(s[i, p].exp() / (s[i, p].exp() + weighted)).log() for p in positives]
        losses += [torch.stack(terms).mean()] if terms else []
    return torch.stack(losses).mean()


def textbook_rank(z, ages, temperature):
    losses, count = [], len(z)
    for i in range(count):
        s = [-(z[i] - z[k]).norm() / temperature if k != i else None for k in range(count)]
        for j in set(range(count)) - {i}:
            at_least = [
                k for k in range(count) if k != i and abs(ages[i] - ages[k]) >= abs(ages[i] - ages[j])
            ]
            losses.append(torch.stack([s[k] for k in at_least]).logsumexp(dim=0) - s[j])
    return torch.stack(losses).mean()


LOSSES = {
    "view": (lambda z, ages, t: nt_xent_loss(z[0::2], z[1::2], t), textbook_nt_xent),
    "age": (age_contrastive_loss, textbook_age),
    "rank": (rank_contrastive_loss, textbook_rank),
}


@pytest.mark.parametrize("ages", [[3, 3, 20, 41, 3, 77], [5] * 6, [1, 1], [1, 9.5, 30, 50.25, 70, 116]])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_textbook_loop(name, ages):
    """In value and in gradient."""
    if name == "age" and len(set(ages)) in (1, len(ages)):
        pytest.skip("no negatives, or no positives: see below")
    z = torch.randn(len(ages), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, ages = z.requires_grad_(), torch.tensor(ages)
    (loss, slope), (expected, expected_slope) = (
        (value, torch.autograd.grad(value, z)[0]) for value in (f(z, ages, 0.7) for f in LOSSES[name])
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert torch.allclose(slope, expected_slope, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_half_precision(name, dtype):
    """Finite and near float32's, also for features far apart, as the backbone's own may be."""
    ages = torch.randint(0, 90, (32,)).repeat_interleave(2)
    for scale in (1, 300):
        z = scale * torch.randn(64, 128)
        small = z.to(dtype).requires_grad_()
        loss = LOSSES[name][0](small, ages, 0.1)
        loss.backward()
        assert small.grad.isfinite().all()
        assert loss.item() == pytest.approx(LOSSES[name][0](z, ages, 0.1).item(), rel=0.05)


@pytest.mark.parametrize("spread, temperature", [(1, 2), (20, 0.07), (300, 2)])
def test_rank_loss_of_faces_far_apart(spread, temperature):
    """Beside the nearest face the far ones underflow float32, where faces lie in the order of their ages."""
    ages = torch.arange(0, 64, 2)
    z = spread * torch.stack([ages / 64, torch.rand(32, generator=torch.Generator().manual_seed(0)) / 50], 1)
    ours, truth = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, expected = rank_contrastive_loss(ours, ages, temperature), textbook_rank(truth, ages, temperature)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert F.cosine_similarity(ours.grad.double().flatten(), truth.grad.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_on_the_device_of_the_embeddings(name):
    with FakeTensorMode():  # devices are checked, nothing is computed
        z, ages = torch.randn(4, 8, device="cuda"), torch.zeros(4, device="cuda")
        assert LOSSES[name][0](z, ages, 0.1).device.type == "cuda"


def test_rank_loss_knows_the_order():
    """Zero gradient nowhere, least where distances follow the ages."""
    ages = torch.tensor([1, 20, 40, 80])
    ordered, shuffled = 5 * ages[:, None].double() / 10, 5 * ages[[2, 0, 3, 1], None].double() / 10
    assert rank_contrastive_loss(ordered, ages) < 0.2 < rank_contrastive_loss(shuffled, ages)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_nt_xent_of_coinciding_embeddings(count):
    z = torch.randn(1, 8).expand(count, 8)
    assert nt_xent_loss(z, 3 * z, 0.07).item() == pytest.approx(math.log(2 * count - 1), abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_under_autocast_equal_float32(name):
    torch.manual_seed(0)
    z, ages = torch.randn(32, 32), torch.arange(16).repeat_interleave(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name][0](z, ages, 0.05)
    assert inside.item() == pytest.approx(LOSSES[name][0](z, ages, 0.05).item(), rel=1e-6)


@pytest.mark.parametrize("ages", [[1, 2, 3, 4], [30, 30, 30, 30]])
def test_age_contrastive_without_positives_or_negatives(ages):
    z = torch.randn(4, 8, requires_grad=True)
    loss = age_contrastive_loss(z, torch.tensor(ages), 0.07, 0.5)
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


def test_mask_loss_has_a_gradient():
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    loss = mask_loss(logits, mask)
    # p = 1/2 everywhere: cross-entropy log 2; Dice (2·4 + 1) / (16 + 1)
    assert loss.item() == pytest.approx(math.log(2) + 1 - 9 / 17, abs=1e-6)
    loss.backward()
    assert (logits.grad[:, :, :2] < 0).all() and (logits.grad[:, :, 2:] > 0).all()


@pytest.mark.parametrize("rows", [0, 3, 8])
def test_mask_loss_vanishes_for_a_perfect_mask(rows):
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :rows] = 1
    assert mask_loss((2 * mask - 1) * 50, mask).item() == pytest.approx(0, abs=1e-6)
    assert mask_loss((1 - 2 * mask) * 50, mask).item() > 10


def test_mask_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        mask_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


def test_mask_overlap():
    predicted = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]).bool()
    truth = torch.tensor([[[1, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]).bool()
    iou, dice = mask_overlap(predicted, truth).T
    assert iou.tolist() == pytest.approx([1 / 3, 1, 0]) and dice.tolist() == pytest.approx([1 / 2, 1, 0])


# Optimisation


@pytest.mark.parametrize("strategy, backbone_lr", [("uniform", 0.01), ("differentiated", 0.002)])
def test_param_groups(strategy, backbone_lr):
    model = MultitaskResNet18()
    groups = build_param_groups(model, 0.01, strategy, backbone_lr_scale=0.2, weight_decay=0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(backbone_lr if name.startswith("backbone.") else 0.01)
        assert group["weight_decay"] == (0 if parameter.ndim == 1 else 0.05), name


def test_param_groups_refuse_another_strategy():
    with pytest.raises(ValueError, match="strategy"):
        build_param_groups(MultitaskResNet18(), 0.01, "layerwise")


# Data and augmentation


def half_face(folder, side=120):
    """A pair whose mask is the bright part of its image, off centre and off axis."""
    y, x = np.mgrid[:side, :side] / side
    mask = np.where(((x - 0.42) / 0.25) ** 2 + ((y - 0.55 + 0.3 * x) / 0.3) ** 2 < 1, 255, 0).astype(np.uint8)
    write_pair(folder, "30_0_0_20170000000000000", np.repeat(mask[..., None], 3, axis=2), mask)


@pytest.mark.parametrize("augmentation", [contrastive_augmentation, supervised_augmentation])
def test_image_and_mask_move_together(tmp_path, augmentation):
    half_face(tmp_path)
    dataset = FaceDataset(tmp_path, 64, augmentation)
    steps = [step for step in dataset.augment if not isinstance(step, A.CoarseDropout)]
    dataset.augment = A.Compose(steps)  # a box that is erased would look like another half
    batch = dataset.__getitems__([(epoch, 0) for epoch in range(200)])
    batch = to_device(batch, CPU)
    assert batch["image"].shape == (200, 3, 64, 64) and batch["mask"].shape == (200, 1, 64, 64)
    masks = []
    for image, mask in zip(batch["image"].mean(dim=1).numpy(), batch["mask"][:, 0].numpy()):
        assert set(np.unique(mask)) <= {0, 1}
        mask = mask.astype(bool)
        threshold = (image.max() + image.min()) / 2  # light and contrast may have changed
        bright = image > threshold
        assert (bright & mask).sum() / (bright | mask).sum() > 0.93
        masks.append(mask)
    assert len({mask.tobytes() for mask in masks}) > 150  # they did move


def test_augmentations_draw_independently():
    """Flipped and grey must not go together, as they do when every transform is given the same seed."""
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.ToGray(p=0.5)])
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = (200, 30, 30)
    seen = {}
    for index in range(400):
        seed_augmentation(pipeline, 0, 0, index)
        out = pipeline(image=image)["image"]
        key = (bool(out[0, 3].any()), bool((out[..., 0] == out[..., 1]).all()))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 4 and min(seen.values()) > 60  # 100 expected of each


CHANCES = {  # of each step; and the share of the area that a crop keeps at least
    contrastive_augmentation: {
        "RandomResizedCrop": 1, "HorizontalFlip": 0.5, "ColorJitter": 0.8, "ToGray": 0.2, "GaussianBlur": 0.3
    },
    supervised_augmentation: {
        "Rotate": 0.5, "RandomResizedCrop": 1, "HorizontalFlip": 0.5, "ColorJitter": 0.8, "ToGray": 0.1,
        "CoarseDropout": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "augmentation, least", [(contrastive_augmentation, 0.5), (supervised_augmentation, 0.7)]
)
def test_augmentations_hold_what_they_name(drawn, augmentation, least):
    """Of one face, step by step: how many draws are grey, erased, coloured otherwise, blurred."""
    pipeline, draws = augmentation(80), {}
    assert {type(step).__name__: step.p for step in pipeline} == CHANCES[augmentation]
    [crop] = [step for step in pipeline if isinstance(step, A.RandomResizedCrop)]
    assert crop.scale == (least, 1) and crop.size == (80, 80)
    face = FaceDataset(drawn / "dataset/processed", 80, with_masks=False).images[40].numpy()
    for step in pipeline:
        alone = A.Compose([step])
        for index in range(200):
            seed_augmentation(alone, 0, 0, index)
            draws.setdefault(type(step).__name__, []).append(alone(image=face)["image"].astype(int))
    for name in draws.keys() - {"RandomResizedCrop"}:
        changed = np.mean([(x != face).any() for x in draws[name]])
        assert changed == pytest.approx(CHANCES[augmentation][name], abs=0.1), name
    assert all(np.ptp(x, axis=2).max() == 0 for x in draws["ToGray"] if (x != face).any())
    assert all((x == face[:, ::-1]).all() for x in draws["HorizontalFlip"] if (x != face).any())
    holes = [(x != face).any(axis=2).mean() for x in draws.get("CoarseDropout", []) if (x != face).any()]
    assert all(0.15**2 * 0.8 < hole < 0.45**2 * 1.1 for hole in holes)
    assert len({x.tobytes() for x in draws["RandomResizedCrop"]}) > 190


def test_erasing_leaves_the_mask_whole_and_turning_no_black_corner():
    face, mask = np.full((64, 64, 3), 255, np.uint8), np.full((64, 64), 255, np.uint8)
    for step in supervised_augmentation(64):
        if isinstance(step, A.CoarseDropout | A.Rotate):
            alone, least = A.Compose([step]), []
            for index in range(60):
                seed_augmentation(alone, index)
                drawn = alone(image=face, mask=mask)
                least.append(drawn["image"].min())
                assert drawn["mask"].min() == 255
            assert (min(least) < 255) == isinstance(step, A.CoarseDropout)


def drawn_by(kind, face, count=100):
    """What the step of this kind, of the augmentation for fine-tuning, makes of a face."""
    [step] = [step for step in supervised_augmentation(len(face)) if isinstance(step, kind)]
    alone = A.Compose([step])
    for index in range(count):
        seed_augmentation(alone, index)
        yield alone(image=face)["image"].astype(int)


def test_faces_are_turned_a_little():
    face = np.zeros((96, 96, 3), np.uint8)
    face[:48] = 200
    for turned in drawn_by(A.Rotate, face):
        assert turned[10, 30:66].min() > 100 > turned[85, 30:66].max()  # up stays up
        left, right = ((turned[:, column, 0] > 100).sum() for column in (28, 68))
        assert abs(left - right) <= 10  # 8.5 at 12°


def test_faces_are_stretched_a_little():
    y, x = np.mgrid[:96, :96] - 48
    disc = np.repeat(np.where(x**2 + y**2 < 19**2, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    for cropped in drawn_by(A.RandomResizedCrop, disc):
        height, width = map(np.ptp, np.nonzero(cropped[..., 0] > 127))
        assert 0.83 < width / height < 1.2


def test_skin_stays_of_the_colour_of_skin():
    for jittered in drawn_by(A.ColorJitter, np.full((32, 32, 3), (200, 150, 120), np.uint8)):
        red, green, blue = jittered[0, 0]
        assert red >= green >= blue - 3


def test_faces_and_seeds_draw_differently(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for i in range(2):
        write_pair(tmp_path, f"30_0_0_{i}", image)
    datasets = [FaceDataset(tmp_path, 32, supervised_augmentation, seed=seed) for seed in (0, 1)]
    drawn = {data[(5, index)]["image"].numpy().tobytes() for data in datasets for index in (0, 1)}
    assert len(drawn) == 4


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    noise_pairs(tmp_path, [1, 10, 20, 30, 50, 70, 80, 90])
    batches = {}
    for workers in (0, 2):
        dataset = FaceDataset(tmp_path, 32, contrastive_augmentation, views=2, with_masks=True, seed=3)
        loader = train_loader(dataset, 4, 3, workers, CPU)
        loader.batch_sampler.epoch = 5
        batches[workers] = list(loader)
    for serial, parallel in zip(batches[0], batches[2]):
        assert serial["image"].shape == (8, 32, 32, 3) and serial["mask"].shape == (8, 32, 32)
        assert all(np.array_equal(serial[key], parallel[key]) for key in serial)
    image = dataset[(5, 0)]["image"]
    assert not torch.equal(image[0], image[1])
    assert not torch.equal(image, dataset[(6, 0)]["image"])
    dataset[(9, 3)]
    assert torch.equal(image, dataset[(5, 0)]["image"])


def test_dataset_without_augmentation(tmp_path):
    half_face(tmp_path)
    dataset = FaceDataset(tmp_path, 64)
    sample = dataset[0]
    assert sample["image"].shape == (64, 64, 3) and sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (64, 64) and set(np.unique(sample["mask"])) == {0, 1}
    assert sample["age"] == 30 and sample["group"] == 3
    assert "mask" not in FaceDataset(tmp_path, 64, with_masks=False)[0]


def test_pictures_are_kept_a_quarter_larger_than_what_is_cropped_of_them(tmp_path):
    half_face(tmp_path)
    for augmentation, side in ((supervised_augmentation, 80), (None, 64)):
        dataset = FaceDataset(tmp_path, 64, augmentation)
        assert dataset.images.shape == (1, side, side, 3) and dataset.masks.shape == (1, side, side)
        assert dataset[0]["image"].shape == (64, 64, 3)


def test_labels_that_are_unknown_or_a_range(tmp_path):
    for stem in ("20-29_x_3_a", "31.5_1_x_b", "50-54_0_0_c"):
        write_pair(tmp_path, stem, np.zeros((40, 40, 3), np.uint8))
    batch = FaceDataset(tmp_path, 32).__getitems__([0, 1, 2])
    assert batch["age"].tolist() == [24.5, 31.5, 52] and batch["spread"].tolist() == [4.5, 0, 2]
    assert batch["group"].tolist() == [-1, 3, 4]
    assert batch["gender"].tolist() == [-1, 1, 0] and batch["race"].tolist() == [3, -1, 0]


def test_dataset_gives_what_the_names_say(tmp_path):
    noise_pairs(tmp_path, [30, 4, 70])
    for augmentation in (None, supervised_augmentation):
        dataset = FaceDataset(tmp_path, 32, augmentation)
        batch = dataset.__getitems__([2, 0])
        for name in ("age", "gender", "race"):
            assert batch[name].tolist() == [getattr(dataset.faces[index], name) for index in (2, 0)]


def test_views_of_a_face_share_its_labels(tmp_path):
    noise_pairs(tmp_path, [30, 4, 70])
    dataset = FaceDataset(tmp_path, 32, contrastive_augmentation, views=2)
    assert dataset.__getitems__([2, 0])["age"].tolist() == [dataset.ages[i] for i in (2, 2, 0, 0)]


class ColourModel(torch.nn.Module):
    """Tells the brightness as the first group's logit, and red pixels as the mask."""

    by_year = flip_averaging = False

    def forward(self, images, heads):
        logits = F.pad(images.mean(dim=(1, 2, 3))[:, None], (0, 5))
        return logits, (images[:, :1] - 0.1) / 100, None


def test_scores_of_a_dataset_come_in_its_order(tmp_path):
    for i, red in enumerate((10, 200, 120, 250, 60)):
        image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        image[:16, :, 2], mask[: 4 * i + 4] = red, 255
        write_pair(tmp_path, f"30_0_0_{i}", image, mask)
    dataset = FaceDataset(tmp_path, 32)
    logits, years, overlaps = common.score_dataset(ColourModel(), dataset, CPU, batch_size=2)
    expected = to_input(dataset.images, CPU)
    assert torch.allclose(logits[:, 0], expected.mean(dim=(1, 2, 3)), atol=1e-6)
    rows = (expected[:, 0] > 0.1).sum(dim=(1, 2)) / 32  # that are red enough: 16 or none
    truth = torch.tensor([4, 8, 12, 16, 20])
    iou = torch.minimum(rows, truth) / torch.maximum(rows, truth)
    assert torch.allclose(overlaps[:, 0], iou.double()) and len(iou.unique()) > 2
    assert years is None


@pytest.mark.parametrize("side, expected", [(128, [4, 3]), (256, [1] * 7), (512, [1] * 7)])
def test_large_pictures_are_scored_fewer_at_a_time_and_in_the_precision_asked_for(side, expected):
    """Else a model whose training fits the memory could not be validated."""
    found = []

    class Recorder(ColourModel):
        def forward(self, images, heads):
            found.append((len(images), torch.is_autocast_enabled("cpu")))
            return super().forward(images, heads)

    dataset = Namespace(images=torch.zeros(7, side, side, 3, dtype=torch.uint8), masks=None)
    for dtype in (torch.float32, torch.bfloat16):
        found.clear()
        assert len(common.score_dataset(Recorder(), dataset, CPU, dtype, batch_size=4)[0]) == 7
        assert found == [(count, dtype == torch.bfloat16) for count in expected]


def test_a_process_without_faces_has_scores_of_none():
    """Under torchrun, where val holds fewer faces than there are processes."""
    dataset = Namespace(images=torch.zeros(0, 32, 32, 3, dtype=torch.uint8), masks=None)
    assert common.score_dataset(ColourModel(), dataset, CPU)[0].shape == (0, 6)


def test_scores_are_computed_on_the_device(small_model, monkeypatch):
    """A fake one, which computes nothing."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(common, "pixel_statistics", common.pixel_statistics.__wrapped__)  # keeps nothing
    double = torch.Tensor.double

    def double_on_cpu(values):
        assert values.device == CPU  # Apple's GPU has no float64
        return double(values)

    monkeypatch.setattr(torch.Tensor, "double", double_on_cpu)
    with FakeTensorMode():
        with cuda:
            model = common.make_model({"multitask": True, "age_sigma": 2, "flip_averaging": True})
        pictures = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
        dataset = Namespace(images=pictures, masks=pictures[..., 0])
        assert {part.device for part in common.score_dataset(model, dataset, cuda)} == {CPU}


def test_a_model_is_loaded_onto_its_device(model):
    network, _ = common.load_model(model, torch.device("meta"))
    assert all(values.is_meta for values in network.state_dict().values()) and not network.training


def test_pixels_that_are_less_than_half_face_are_none(tmp_path):
    mask = np.zeros((96, 96), np.uint8)
    mask[:, 0] = 255  # a third of the first column of 32
    write_pair(tmp_path, "30_0_0_1", np.zeros((96, 96, 3), np.uint8), mask)
    overlaps = common.score_dataset(ColourModel(), FaceDataset(tmp_path, 32), CPU)[2]
    assert overlaps.tolist() == [[1, 1]]  # none is predicted either


def test_dataset_is_rgb(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 2] = 255  # red, as OpenCV writes it
    write_pair(tmp_path, "30_0_0_1", image)
    assert FaceDataset(tmp_path, 32)[0]["image"][0, 0].tolist() == [255, 0, 0]


def test_to_input():
    images = torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8)  # 1×1×1×3
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    out = to_input(images, CPU)
    assert out.shape == (1, 3, 1, 1) and out.flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda folder, stem: (folder / f"{stem}_mask.png").unlink(), "_mask.png"),
        (lambda folder, stem: (folder / f"{stem}_image.png").write_text("no image"), "readable"),
        (
            lambda folder, stem: write_pair(
                folder, stem, np.zeros((19, 19, 3), np.uint8), np.zeros((18, 18), np.uint8)
            ),
            "size",
        ),
    ],
)
def test_broken_pairs(tmp_path, break_it, word):
    stem = noise_pairs(tmp_path, [30])[0]
    break_it(tmp_path, stem)
    with pytest.raises(UserError, match=word):
        FaceDataset(tmp_path, 32)


def test_faces_that_do_not_fit_into_memory_are_told_in_one_line(tmp_path, monkeypatch):
    noise_pairs(tmp_path, [30])

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(common.torch, "empty", full)
    with pytest.raises(UserError, match=r"1 faces need 0\.0 GB of memory at 32 px"):
        FaceDataset(tmp_path, 32)


def test_missing_and_empty_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(folder)):
            FaceDataset(folder, 32)


# Checkpoints


class Malice:
    def __reduce__(self):
        return print, ("code from a checkpoint",)


def test_checkpoints_that_are_refused(tmp_path, capsys):
    path = tmp_path / "a.pt"
    for content in (
        {"kind": "model", "x": Malice()},
        [1, 2],
        {"kind": "other"},
        {"kind": "model", "format_version": 99},
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"a\.pt"):
            common.load_checkpoint(path, "model")
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read"):
        common.load_checkpoint(path, "model")
    torch.save({"kind": "model", "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])  # as of a download that broke off
    with pytest.raises(UserError, match="cannot be read"):
        common.load_checkpoint(path, "model")
    assert "code from a checkpoint" not in capsys.readouterr().out


def test_a_checkpoint_says_how_to_preprocess(tmp_path):
    save_checkpoint(tmp_path / "m.last.pt", "model.last", Namespace(image_size=32))
    said = common.load_checkpoint(tmp_path / "m.last.pt", "model.last")["preprocessing"]
    color = torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8)
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor(said["mean"])) / torch.tensor(said["std"])
    assert said["channels"] == "RGB" and torch.allclose(to_input(color, CPU).flatten(), expected, atol=1e-5)


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        args, weights = Namespace(image_size=32), {"w": torch.ones(2)}
        save_checkpoint(tmp_path / "m.last.pt", "model.last", args, model=weights)
    assert common.load_checkpoint(tmp_path / "m.last.pt", "model.last")["model"]["w"].device == CPU


def test_imagenet_without_network_names_the_other_choices(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"resnet18-\w+\.pth into .*checkpoints.*--init random"):
        common.init_backbone(MultitaskResNet18().backbone, "imagenet")


@pytest.mark.parametrize("content", [b"", b"<html>sign in</html>"])
def test_a_damaged_file_of_imagenet_weights_is_named(tmp_path, monkeypatch, content):
    """As a proxy's page that was saved in its place: what is in the cache is not checked again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / os.path.basename(common.ResNet18_Weights.DEFAULT.url)
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    with pytest.raises(UserError, match=f"{place.parent}.*--init random"):
        common.init_backbone(MultitaskResNet18().backbone, "imagenet")


def test_years_sum_into_groups():
    probabilities = torch.rand(5, common.YEARS).softmax(dim=1)
    groups = common.group_logits(probabilities.log()).softmax(dim=1)
    for group, (first, last) in enumerate(AGE_GROUPS.values()):
        assert torch.allclose(groups[:, group], probabilities[:, first : last + 1].sum(dim=1))
    assert sum(common.GROUP_SIZES) == common.YEARS


def test_soft_age_labels_by_hand():
    labels = common.soft_age_labels(torch.tensor([0, 30, 116]), 2.0)
    assert labels.shape == (3, 101) and torch.allclose(labels.sum(dim=1), torch.ones(3))
    assert labels.argmax(dim=1).tolist() == [0, 30, 100]
    assert labels[1, 32] / labels[1, 30] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert labels[1, 28] == pytest.approx(labels[1, 32].item())


def test_soft_labels_of_a_range_are_flat_on_it():
    labels = common.soft_age_labels(torch.tensor([24.5, 30]), 2.0, torch.tensor([4.5, 0]))
    assert torch.equal(labels[1], common.soft_age_labels(torch.tensor([30]), 2.0)[0])
    beyond = common.soft_age_labels(torch.tensor([105.0]), 2.0, torch.tensor([10.0]))[0]
    assert torch.allclose(beyond[95:], beyond[95:96]) and beyond[94] < 0.9 * beyond[95]  # of 95 to 115
    flat = labels[0, 20:30]
    assert torch.allclose(flat, flat[:1]) and labels[0, 31] / flat[0] == pytest.approx(
        math.exp(-0.5), rel=1e-5
    )


def test_cross_entropy_of_known_classes_alone():
    logits, classes = torch.randn(4, 6), torch.tensor([2, -1, 0, -1])
    expected = F.cross_entropy(logits[[0, 2]], classes[[0, 2]])
    assert common.known_cross_entropy(logits, classes).item() == pytest.approx(expected.item(), rel=1e-6)
    assert common.known_cross_entropy(logits, classes.fill_(-1)).item() == 0


def test_quantiles_of_years_by_hand():
    """Half on 20, a quarter each on 30 and 40: the median is 20 until it has less than a half."""
    p = torch.full((2, common.YEARS), 1e-9)
    p[0, [10, 30, 50]] = torch.tensor([0.15, 0.6, 0.25])
    p[1, [5, 42, 43, 90]] = torch.tensor([0.05, 0.44, 0.46, 0.05])
    assert common.age_quantiles(p.log()).tolist() == [[30, 10, 50], [43, 42, 43]]


@pytest.mark.parametrize("sigma", [0, 2])
def test_flip_averaging_is_blind_to_mirroring(sigma):
    torch.manual_seed(0)
    model = common.make_model({"multitask": True, "age_sigma": sigma, "flip_averaging": True})
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    logits, _, masks = infer(model, images)
    mirrored, _, mirrored_masks = infer(model, images.flip(-1))
    assert torch.allclose(logits, mirrored, atol=1e-5)
    assert torch.allclose(masks, mirrored_masks.flip(-1), atol=1e-5)
    mean = (model(images)[0].softmax(dim=1) + model(images.flip(-1))[0].softmax(dim=1)) / 2
    assert torch.allclose(logits.softmax(dim=1), mean, atol=1e-6)
    model.flip_averaging = False
    assert torch.allclose(infer(model, images)[0], model(images)[0])


class OneSided(torch.nn.Module):
    """Sees only the left: 20 years where it is bright, else 60."""

    by_year = flip_averaging = True

    def forward(self, images, heads):
        years = torch.where(images[:, 0, 0, 0] > 0, 20, 60)
        return 50 * F.one_hot(years, common.YEARS).float(), images[:, :1], None


def test_flip_averaging_averages_years_and_masks():
    images = torch.ones(1, 3, 32, 32)
    images[..., 16:] = -2
    logits, years, masks = infer(OneSided(), images)
    assert logits.softmax(dim=1)[0, [2, 4]].tolist() == pytest.approx([0.5, 0.5])
    assert years[0, 1:].tolist() == [20, 60] and torch.equal(masks, images[:, :1])


def test_heads_say_what_they_learn():
    model = common.make_model({"age_sigma": 2, "attribute_weight": 0.3}, training=True)
    images = torch.randn(2, 3, 64, 64)
    age_logits, mask_logits, attribute_logits = model(images, heads=True)
    assert age_logits.shape == (2, 101) and mask_logits is None
    shapes = {name: logits.shape for name, logits in attribute_logits.items()}
    assert shapes == {"gender": (2, 2), "race": (2, 5)}
    assert model(images)[0].shape == (2, 6)
    assert common.make_model({"attribute_weight": 0.3})(images, heads=True)[2] is None


def test_provenance_travels_along_the_chain(tmp_path):
    """What the weights have learned from, and were selected on, two stages ago."""
    backbone, args = MultitaskResNet18().backbone, Namespace(image_size=32, final=False)
    weights = {f"backbone.{name}": values for name, values in backbone.state_dict().items()}
    hashes = {"train_hashes": torch.tensor([1, 2]), "val_hashes": torch.tensor([3])}
    for before, final in (({}, False), ({"final": True}, True)):
        save_checkpoint(tmp_path / "a.pt", "model", args, weights=weights, pretraining=before, **hashes)
        found = common.init_backbone(backbone, str(tmp_path / "a.pt"))
        assert found["train_hashes"].tolist() == [1, 2] and found["val_hashes"].tolist() == [3]
        assert found["pretraining"] == {"image_size": 32, "final": final}


def test_a_final_checkpoint_counts_wherever_it_stands(tmp_path):
    backbone, none = MultitaskResNet18().backbone, torch.empty(0, dtype=torch.int64)
    weights = {f"backbone.{name}": values for name, values in backbone.state_dict().items()}
    for own, before in ((True, {}), (True, {"final": False}), (False, {"final": True})):
        held = {"weights": weights, "pretraining": before, "train_hashes": none}
        save_checkpoint(tmp_path / "a.pt", "model", Namespace(image_size=32, final=own), **held)
        assert common.init_backbone(backbone, str(tmp_path / "a.pt"))["pretraining"]["final"] is True


def test_checkpoints_are_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: order.append(name) or real(*args))
    save_checkpoint(tmp_path / "a.pt", "model", Namespace(image_size=32))
    write_csv(tmp_path / "a.csv", [{"a": 1}])
    assert order == ["fsync", "replace"] * 2


def test_imagenet_weights_are_loaded(monkeypatch, capsys):
    """A stand-in of the download's form: everything but ImageNet's own head must arrive."""
    weights, asked = common.resnet18().state_dict(), []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda *_, **options: asked.append(options) or weights,
    )
    backbone = MultitaskResNet18().backbone
    origin = common.init_backbone(backbone, "imagenet")
    line = capsys.readouterr().out
    assert torch.equal(backbone.conv1.weight, weights["conv1.weight"]) and asked[0]["check_hash"]
    assert "120 of 120" in line and len(origin["train_hashes"]) == 0 and origin["pretraining"] == {}
