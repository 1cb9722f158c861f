"""What UTKFace is on disk: names and groups, and one decoder for every picture."""

import errno
import io
import os
import struct
import zlib
from unittest.mock import Mock
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, features

from cli import UserError
from conftest import noise_pairs, write_pair
from drawing import is_own
from inputs import make_stem
from utkface import (
    AGE_GROUPS,
    GENDERS,
    GROUP_NAMES,
    RACES,
    age_to_group,
    central_square,
    decode_image,
    flatten,
    list_pairs,
    page_count,
    parse_name,
    parse_stem,
    pixel_hash,
    read_image,
    read_pair,
    resize,
    split_settings,
    walk_files,
)

# Names and groups


def test_age_groups():
    assert list(AGE_GROUPS) == ["Infant", "Child", "Youth", "Young Adult", "Middle-aged", "Older Adult"]
    assert list(AGE_GROUPS) == GROUP_NAMES
    bounds = [0, 4, 5, 14, 15, 24, 25, 44, 45, 64, 65, 99, 100, 116]
    assert age_to_group(bounds).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    assert age_to_group([4.49, 4.5, 24.4, 24.5, 64.99]).tolist() == [0, 1, 2, 3, 5] and age_to_group(64) == 4


def test_labels_are_in_the_order_of_utkface():
    assert GENDERS == ("male", "female") and RACES == ("White", "Black", "Asian", "Indian", "Others")


@pytest.mark.parametrize("ending", [".jpg.chip.jpg", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG"])
def test_good_names(ending):
    face = parse_name("26_1_3_20170116184751593" + ending)
    assert face == ("26_1_3_20170116184751593", 26, 1, 3, 0) and isinstance(face.age, int)
    assert (face.stem, face.age, face.gender, face.race, face.spread) == face and face.group == 3
    assert parse_name("116_0_0_20170116184751593" + ending).age == 116


@pytest.mark.parametrize(
    "labels, stem, face",
    [
        ((31, 31, 1, 4, "a.jpg"), "31_1_4_a.jpg", (31, 1, 4, 0)),
        ((31.456, 31.456, 0, -1, "a b.jpg"), "31.46_0_x_a b.jpg", (31.46, 0, -1, 0)),
        ((20, 29, -1, 0, "b/c_image.png"), "20-29_x_0_b%2Fc_image.png", (24.5, -1, 0, 4.5)),
        ((0, 2, -1, -1, 'a\n:\\%"\udcff.jpg'), "0-2_x_x_a%0A%3A%5C%25%22%FF.jpg", (1, -1, -1, 1)),
    ],
)
def test_names_of_own_faces(labels, stem, face):
    assert make_stem(*labels) == stem
    assert parse_stem(stem) == (stem, *face)
    assert unquote(stem, errors="surrogateescape").endswith(labels[-1])


def test_long_paths_are_cut_and_stay_apart():
    stems = [make_stem(1, 1, 0, 0, "面" * 80 + f"/{i}.jpg") for i in range(3)]
    assert len(set(stems)) == 3 and all(len(f"{stem}_image.png".encode()) < 255 for stem in stems)
    assert all(parse_stem(stem).stem == stem for stem in stems)


@pytest.mark.parametrize(
    "years, group",
    [("4", 0), ("4.6", 1), ("0-4", 0), ("3-9", -1), ("25-44", 3), ("25-45", -1), ("65-100", 5)],
)
def test_a_range_has_a_group_where_it_lies_within_one(years, group):
    assert parse_stem(f"{years}_x_x_a").group == group


@pytest.mark.parametrize(
    "stem",
    ["", "face", "29-20_0_0_a", "-3_0_0_a", "3_2_0_a", "3_0_5_a", "3_0_0_", "3_0_a", "x_0_0_a", "3-_0_0_a"],
)
def test_malformed_stems(stem):
    assert parse_stem(stem) is None


@pytest.mark.parametrize(
    "name",
    [
        "31_x_x_20170116184751593.jpg",
        "39_1_20170116174525125.jpg.chip.jpg",
        "24_0_1_20170116220224657 .jpg.chip.jpg",
        "55_0_0_20170116232725357jpg.chip.jpg",
        "26_2_0_20170116184751593.jpg",
        "26_1_5_20170116184751593.jpg",
        "٢٦_1_0_20170116184751593.jpg",
        "26_1_0_20170116184751593.jpg\n",
        "notes.txt",
    ],
)
def test_malformed_names(name):
    assert parse_name(name) is None


def test_pairs_are_listed_in_order_and_checked(tmp_path):
    stems = noise_pairs(tmp_path, [30, 4, 80])
    (tmp_path / ".tmp-0a1b2c3d-26_1_0_1_image.png").touch()  # of a run that was killed
    assert list_pairs(tmp_path) == [parse_name(f"{stem}.png") for stem in sorted(stems)]
    (tmp_path / f"{stems[0]}_mask.png").unlink()
    assert len(list_pairs(tmp_path, need_masks=False)) == 3
    with pytest.raises(UserError, match=f"{stems[0]}_mask.png"):
        list_pairs(tmp_path)
    (tmp_path / "face_image.png").write_text("")
    with pytest.raises(UserError, match=r"face_image\.png"):
        list_pairs(tmp_path, need_masks=False)


def test_links_are_followed_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    top, other = tmp_path / "top", tmp_path / "other"
    for path in (top / "z/1.jpg", top / "z/@eaDir/1.jpg/thumb.jpg", top / "out/2.jpg", other / "deep/3.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    for link, target in (
        ("a", "z"), ("z/loop", ".."), ("b", other), ("c", other), ("4.jpg", other / "deep/3.jpg"),
        ("gone.jpg", "nowhere"), ("self.jpg", "self.jpg"),
    ):  # fmt: skip
        (top / link).symlink_to(target)
    os.mkfifo(top / "pipe.jpg")
    scandir, locked = os.scandir, other / "locked"
    locked.mkdir()

    def refuse(path):
        if os.path.realpath(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    files, unreadable = walk_files(top, [top / "out"])
    assert files == [top / name for name in ("4.jpg", "b/deep/3.jpg", "z/1.jpg")]
    assert {path.relative_to(top).as_posix(): reason for path, reason in unreadable.items()} == {
        "b/locked": "Permission denied",
        **dict.fromkeys(("gone.jpg", "self.jpg", "pipe.jpg"), "not a file that can be read"),
    }


def test_how_a_split_was_made(tmp_path):
    assert split_settings(tmp_path) == {}
    (tmp_path / "split.yaml").write_text("seed: 3\nrandom: true\n")
    assert split_settings(tmp_path) == {"seed": 3, "random": True}
    (tmp_path / "split.yaml").write_text("seed: 3\nmade: 2024-05-01\n")  # a date is nothing for a checkpoint
    assert split_settings(tmp_path) == {"seed": 3}
    (tmp_path / "split.yaml").write_text("seed: 2024-05-01\nfractions: [0.7, 0.1, 0.2]\n")
    assert split_settings(tmp_path) == {"fractions": [0.7, 0.1, 0.2]}
    for broken in ("seed: [", "", "a word", "made: 2024-13-45", "[" * 2000):
        (tmp_path / "split.yaml").write_text(broken)
        with pytest.raises(UserError, match=r"split\.yaml cannot be read.*--overwrite"):
            split_settings(tmp_path)


# Pictures


def face(width=60, height=80):
    """A smooth RGB picture without symmetry."""
    small = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data):
    """What decode_image gives, as int RGB."""
    return decode_image(data)[..., ::-1].astype(int)


@pytest.mark.parametrize(
    "shape, square", [((5, 8), np.s_[:, 1:6]), ((9, 4, 3), np.s_[2:6]), ((7, 7), np.s_[:])]
)
def test_central_square(shape, square):
    image = np.arange(np.prod(shape)).reshape(shape)
    assert np.array_equal(central_square(image), image[square])


def test_resizing_cuts_first_and_averages():
    image = np.random.default_rng(0).integers(0, 256, (280, 200, 3), np.uint8)
    assert np.array_equal(resize(image, 50), resize(image[40:240], 50))
    exact = image[40:240].reshape(50, 4, 50, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, 50) - exact).max() <= 0.51
    assert resize(image[..., 0], 32).shape == (32, 32)


@pytest.mark.parametrize(
    "form, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
)
def test_transparent_pixels_lie_on_mid_grey(form, options):
    picture, noise = np.asarray(face()), np.random.default_rng(1).integers(0, 256, (80, 60, 3), np.uint8)
    alpha = np.zeros((80, 60), np.uint8)
    alpha[20:60], alpha[60:70] = 255, 128
    results = []
    for under in (np.zeros_like(noise), noise):
        rgb = np.where(alpha[..., None] > 0, picture, under)
        results.append(decoded(encoded(Image.fromarray(np.dstack([rgb, alpha])), form, **options)))
    assert np.array_equal(*results)
    assert (results[0][:20] == 128).all() and (results[0][70:] == 128).all()
    assert np.array_equal(results[0][20:60], picture[20:60])
    assert np.abs(results[0][60:70] - (picture[60:70].astype(int) + 128) / 2).max() < 2


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_a_transparent_colour_of_a_palette_lies_on_mid_grey(form):
    indices = np.random.default_rng(1).integers(1, 9, (40, 40)).astype(np.uint8)
    indices[:10] = 0
    results = []
    for under in ((0, 0, 0), (250, 10, 200)):
        picture = Image.fromarray(indices)
        picture.putpalette([*under, *range(10, 34)])
        results.append(decoded(encoded(picture, form, transparency=0)))
    assert np.array_equal(*results) and (results[0][:10] == 128).all()
    assert results[0][10:].tolist() == [
        [[7 + 3 * i, 8 + 3 * i, 9 + 3 * i] for i in row] for row in indices[10:].tolist()
    ]


def test_grey_with_alpha_and_in_grey():
    grey = np.random.default_rng(2).integers(0, 256, (30, 30), np.uint8)
    alpha = np.where(np.arange(30) < 10, 0, 255).astype(np.uint8) * np.ones((30, 1), np.uint8)
    data = encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG")
    for found in (decode_image(data, cv2.IMREAD_GRAYSCALE), decode_image(data)[..., 1]):
        assert found.shape == (30, 30) and (found[:, :10] == 128).all()
        assert np.array_equal(found[:, 10:], grey[:, 10:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    exif, picture = Image.Exif(), face()
    exif[0x0112] = orientation
    for form in [*["AVIF"] * features.check("avif"), "JPEG"]:
        opaque = encoded(picture, form, quality=95, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(opaque)))).astype(int)
        assert decoded(opaque).shape == expected.shape and np.abs(decoded(opaque) - expected).mean() < 2
    clear = encoded(picture.convert("RGBA"), "PNG", exif=exif)  # by the other way through the decoder
    assert np.abs(decoded(clear) - expected).mean() < 4
    assert np.array_equal(decode_image(clear), flatten(Image.open(io.BytesIO(clear))))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%transparency: 1\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF", "GIF"])
def test_formats_without_loss_are_read(form):
    picture = face().quantize().convert("RGB")  # as few colours as a GIF takes
    assert np.array_equal(decoded(encoded(picture.quantize() if form == "GIF" else picture, form)), picture)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever the file is named."""
    run = Mock()
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    Image.open(io.BytesIO(POSTSCRIPT)).load()  # this is one
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match="unreadable"):
        decode_image(POSTSCRIPT)
    assert not is_own(tmp_path / "a.jpg") and page_count(POSTSCRIPT) == 1
    assert run.call_count == 1


def png_header(width, height):
    """As much of a PNG as tells its size, of pixels that it does not hold."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
@pytest.mark.parametrize("width, height", [(7072, 7072), (16, 2**23), (2**30, 2**30)])
def test_huge_pictures_are_refused_before_they_are_decoded(width, height):
    with pytest.raises(ValueError, match="above 50 million"):
        decode_image(png_header(width, height))
    with pytest.raises(ValueError, match="unreadable|truncated" if width == height == 7072 else "above 100"):
        decode_image(png_header(width, height), max_pixels=100_000_000)


def test_what_opencv_refuses_is_unreadable():
    with pytest.raises(ValueError, match="unreadable"):
        decode_image(encoded(Image.new("1", (2**21, 16)), "BMP"))  # wider than OpenCV takes


def test_16_bits_are_scaled_and_not_clipped():
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 32, axis=0)
    grey = flatten(Image.fromarray(ramp))
    assert np.array_equal(grey, decode_image(encoded(Image.fromarray(ramp), "PNG")))
    assert grey[0, :, 0].tolist() == (ramp[0] >> 8).tolist()


def test_small_pictures_are_refused():
    assert decoded(encoded(face(16, 16), "PNG")).shape == (16, 16, 3)
    for size in ((15, 80), (80, 15), (1, 1)):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels, below 16"):
            decode_image(encoded(face(*size), "PNG"))


def test_what_is_cut_or_no_picture_is_refused():
    jpeg, clear = encoded(face(), "JPEG"), encoded(face().convert("RGBA"), "PNG")
    preview = encoded(face(), "JPEG", comment=b"\xff\xd9")  # the mark of an end, as of a preview within
    whole = [
        (jpeg, "truncated"),
        (preview, "truncated"),
        (encoded(face(), "PNG"), "truncated"),
        (clear, "truncated"),
    ]
    for data, word in (
        *whole,
        (encoded(face(), "WEBP"), "unreadable"),
        (encoded(face(), "GIF"), "unreadable"),
    ):
        decode_image(data)
        with pytest.raises(ValueError, match=word):  # OpenCV 4 would fill what is missing with grey
            decode_image(data[: len(data) * 9 // 10])
    for data in (b"", b"I am no picture", jpeg[:20]):
        with pytest.raises(ValueError, match="unreadable"):
            decode_image(data)
    phones = encoded(face(400, 400), "MPO", save_all=True, append_images=[face(400, 400)])
    assert decode_image(phones).shape == (400, 400, 3)
    with pytest.raises(ValueError, match="truncated"):
        decode_image(phones[: len(phones) * 3 // 10])
    # as phones append the film of a live photograph
    assert np.array_equal(decode_image(jpeg + bytes(5000)), decode_image(jpeg))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("text.png", "unreadable"), ("nowhere.png", "No such file"), ("", "directory")):
        with pytest.raises(UserError, match=rf"{tmp_path / name}.*{reason}.*run the stage"):
            read_image(tmp_path / name)
    write_pair(tmp_path, "30_0_0_1", np.zeros((20, 20, 3), np.uint8), np.zeros((20, 21), np.uint8))
    with pytest.raises(UserError, match=r"30_0_0_1_mask\.png is not of its image's size"):
        read_pair(tmp_path, "30_0_0_1")


def test_pixel_hashes():
    picture = np.asarray(face())
    again = decode_image(encoded(Image.fromarray(picture[..., ::-1]), "PNG", compress_level=9))
    assert pixel_hash(again) == pixel_hash(picture.copy())
    changed = picture.copy()
    changed[3, 4, 1] ^= 1
    assert len({pixel_hash(image) for image in (picture, changed, picture.reshape(60, 80, 3))}) == 3
    hashes = [pixel_hash(np.full((20, 20), grey, np.uint8)) for grey in range(20)]
    assert -(2**63) <= min(hashes) < 0 < max(hashes) < 2**63  # as torch keeps them
    known = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert pixel_hash(known) == 7580658050685744798  # as in the checkpoints that exist
