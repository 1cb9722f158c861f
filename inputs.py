"""What masks.py is given: pictures in a folder or an archive, and a table of labels. No torch."""

import csv
import hashlib
import lzma
import os
import posixpath
import re
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import cli
from cli import UserError
from utkface import AGE_GROUPS, walk_files

SPELLINGS = {  # of each column, as APPA-REAL and FairFace have them, too; of several the first counts
    "file": ("file", "file_name", "filename", "img_name", "image", "path"),
    "age": ("age", "real_age", "apparent_age_avg"),
    "gender": ("gender", "sex"),
    "race": ("race", "ethnicity"),
}
WORDS = {  # for each index
    "gender": [("male", "m", "man"), ("female", "f", "woman")],
    "race": [
        ("white", "caucasian"), ("black", "afroamerican"), ("asian", "east asian", "southeast asian"),
        ("indian",), ("others", "other", "middle eastern", "latino_hispanic"),
    ],
}  # fmt: skip
UNKNOWN = ("", "x", "-", "-1", "?", "na", "n/a", "nan", "none", "null", "unknown")
OLDEST = 100  # where a range without an end stops, such as "more than 70"
NUMBER = r"(-?\d+(?:[.,]\d+)?)"
AGE = re.compile(NUMBER)
RANGE = re.compile(rf"\(?{NUMBER}\s*(?:-|–|to|,)\s*{NUMBER}\)?")
OPEN_RANGE = re.compile(rf"(?:more than|over|>=?)\s*{NUMBER}|{NUMBER}\s*(?:\+|and over|or more)")
CROP_ENDING = "_face.jpg"  # APPA-REAL has a crop beside each photograph
UNSAFE = re.compile(r'[%/\\:*?"<>|\x00-\x1f\x7f\udc80-\udcff]')  # what a file name cannot hold everywhere


DAMAGE = (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)


@contextmanager
def open_files(source: Path, output: Path) -> Iterator[tuple[list, list]]:
    """Yields (name, bytes, reader) of each file in a folder, .tar.gz or .zip, and (name, reason) of the rest.

    Call the readers in their order. They raise ValueError for a file that cannot be read though others can.
    Raises UserError if the source is missing, or damaged as a whole.
    """
    with ExitStack() as stack:
        with refuse_damage(source):
            if source.is_dir():
                found = list_folder(source, output)
            elif not source.is_file():
                raise UserError(f"--input {source} does not exist: name a folder, .tar.gz or .zip of faces")
            elif zipfile.is_zipfile(source):
                found = list_zip(stack.enter_context(zipfile.ZipFile(source))), []
            else:
                found = list_tar(stack.enter_context(tarfile.open(source)), source)
        yield found


@contextmanager
def refuse_damage(source: Path):
    """Turns what a damaged folder or archive raises into a UserError."""
    try:
        yield
    except (*DAMAGE, UnicodeDecodeError, lzma.LZMAError, tarfile.TarError) as error:
        reason = str(error).split(":")[0]  # tarfile goes on with a line for each format that it tried
        raise UserError(f"--input {source}: {reason}; give a folder, or a whole .tar.gz or .zip") from None


def read_alone(read: Callable, *args) -> bytes:
    """What `read` returns of a file whose damage is its own: in a folder or a .zip, not in a .tar.gz."""
    try:
        return read(*args)
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError("encrypted" if "encrypted" in reason else f"cannot be read: {reason}") from None


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a .zip's member, no more than it says that it has."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RuntimeError("packed in another way than deflate")  # which may unpack to any size at once
    with archive.open(member) as file:
        return file.read(member.file_size)


def list_folder(folder: Path, output: Path) -> tuple[list, list]:
    paths, unreadable = walk_files(folder, [output])
    name = {path: path.relative_to(folder).as_posix() for path in [*paths, *unreadable]}
    files = [(name[path], path.stat().st_size, partial(read_alone, path.read_bytes)) for path in paths]
    return files, [(name[path], reason) for path, reason in unreadable.items()]


def list_zip(archive: zipfile.ZipFile) -> list:
    files = []
    for member in archive.infolist():
        name = member.filename
        if not member.flag_bits & 0x800:  # macOS writes UTF-8 and does not say so
            with suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        name = name.replace("\\", "/")  # as some Windows programs write it
        if not name.endswith("/"):
            files.append((name, member.file_size, partial(read_alone, read_member, archive, member)))
    return files


def list_tar(archive: tarfile.TarFile, source: Path) -> tuple[list, list]:
    members = archive.getmembers()
    archive.fileobj.seek(archive.offset)  # tarfile takes a broken header for the end, too
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")
    by_name = {}
    for member in members:  # the last of its name, as after `tar -u`
        name = posixpath.normpath(member.name)
        # GNU tar stores a file that it meets twice, as after `find`, as a link to itself.
        if name not in by_name or not member.islnk() or posixpath.normpath(member.linkname) != name:
            by_name[name] = member
    targets, others = [], []
    for member in by_name.values():
        target = member
        for _ in range(40):  # links to links; more are a loop
            if target and (target.issym() or target.islnk()):
                folder = posixpath.dirname(target.name) if target.issym() else ""
                target = by_name.get(posixpath.normpath(posixpath.join(folder, target.linkname)))
        if target and target.isfile():
            targets.append((member.name, target))
        elif not member.isdir():
            others.append((member.name, "neither a file nor a link to one in the archive"))
    # In the order of the files, each read once for all its links: going back unpacks a .gz again.
    targets.sort(key=lambda pair: pair[1].offset_data)
    read = lru_cache(1)(refuse_damage(source)(lambda target: archive.extractfile(target).read()))
    return [(name, target.size, partial(read, target)) for name, target in targets], others


def parse_age(text: str) -> tuple[float, float]:
    """First and last year of an age (`31.5`), a range (`20-29`, `70+`) or an age group; else ValueError."""
    word = text.strip().lower()
    if word in UNKNOWN:
        raise ValueError("no age")
    for name, (first, last) in AGE_GROUPS.items():
        if word == name.lower():
            return first, min(last, OLDEST)
    match = AGE.fullmatch(word) or OPEN_RANGE.fullmatch(word) or RANGE.fullmatch(word)
    if not match:
        raise ValueError(f"age is neither a number nor a range of years: {text.strip()!r}")
    years = [float(number.replace(",", ".")) + 0.0 for number in match.groups() if number]  # pandas: -0.0
    first, last = years[0], max(years[0], OLDEST) if match.re is OPEN_RANGE else years[-1]
    if not 0 <= first <= last <= 130:
        raise ValueError(f"age outside 0 to 130: {word}")
    return first, last


def parse_label(kind: str, text: str, strange: Counter) -> int:
    """Index of a gender or race, -1 for one that is missing or not known; `strange` counts the latter."""
    word = text.strip().lower().removesuffix(".0")  # as pandas writes whole numbers beside gaps
    for index, words in enumerate(WORDS[kind]):
        if word in (*words, str(index)):
            return index
    if word not in UNKNOWN:
        strange[f"{kind} {text.strip()!r}"] += 1
    return -1


def read_labels(path: str) -> list[tuple[str, tuple | str]]:
    """The rows of a table: (file, (first year, last year, gender, race) or the reason why it has no age).

    Strange words for gender and race count as missing, and are named on stderr. UserError if the table cannot
    be read or lacks a column.
    """
    try:
        table = cli.read_table(path)
        header = [name.strip().lower() for name in table.fieldnames or ()]
        for column, spellings in SPELLINGS.items():
            name = next((name for name in spellings if name in header), None)
            if name:
                header[header.index(name)] = column
        table.fieldnames = header
        lines = list(table)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--labels {path} cannot be read ({reason}): give a CSV in UTF-8") from None
    for column in ("file", "age"):
        if column not in header:
            first = ", ".join(header)[:80]
            raise UserError(f"--labels {path}: no column {column} in its first line ({first}): name it there")
    rows, strange = [], Counter()
    for number, line in enumerate(lines, 1):
        try:
            label = (
                *parse_age(line["age"]),
                *(parse_label(kind, line.get(kind, ""), strange) for kind in WORDS),
            )
        except ValueError as error:
            label = str(error)
        rows.append((line["file"].strip() or f"row {number}", label))
    for word, count in strange.items():
        print(f"warning: {word} is unknown to --labels, in {count:,} rows", file=sys.stderr)
    return rows


def encode_path(path: str) -> str:
    """A picture's path as the names of its pair end in it."""
    path = posixpath.normpath(path)  # `tar -C faces .` begins its names with ./
    name = UNSAFE.sub(lambda letter: f"%{ord(letter[0]) & 0xFF:02X}", path)
    if len(name.encode()) > 180:  # file systems take 255 bytes
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        name = f"{name.encode()[:160].decode(errors='ignore')}-{digest}"
    return name


def make_stem(first: float, last: float, gender: int, race: int, path: str) -> str:
    """The stem of an own face, as `utkface.parse_stem` reads it: a label below 0 is unknown."""
    years = f"{round(first, 2):g}"
    if first != last:
        years += f"-{round(last, 2):g}"
    labels = "_".join("x" if label < 0 else str(label) for label in (gender, race))
    return f"{years}_{labels}_{encode_path(path)}"


def match_labels(rows: list, names: list[str], source: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The stems of the files that rows of `read_labels` name, and why the other files and rows have none.

    A row names one of `names`, paths within `source`, by its path, or by its bare name if no other has it.
    """
    composed = partial(unicodedata.normalize, "NFC")  # macOS takes letters and their accents apart
    files, labels, reasons, stems = defaultdict(list), {}, {}, {}
    for name in names:
        files[posixpath.basename(composed(name))].append(name)
    # A path counts before others' bare names.
    files |= {composed(posixpath.normpath(name)): [name] for name in names}
    for file, label in rows:
        path = file.replace("\\", "/")
        if posixpath.isabs(path):  # as it is spelled, or else by where it leads
            ways = [os.path.relpath(to(path), to(source)) for to in (os.path.abspath, os.path.realpath)]
            path = min(ways, key=lambda way: way.startswith("../"))
        path = composed(posixpath.normpath(path))
        found = files.get(path + CROP_ENDING) or files.get(path, [])
        if len(found) > 1:
            reasons[file] = f"{len(found)} files have this name: give their folders"
        elif not found:
            reasons[file] = "leads out of --input" if path.startswith("../") else "no such file"
        elif labels.setdefault(found[0], label) != label:
            labels[found[0]] = "its rows disagree"
    for name in names:
        label = labels.get(name, "no row in --labels")
        if isinstance(label, tuple):
            stems[name] = make_stem(*label, name)
        else:
            reasons[name] = f"its {CROP_ENDING} is taken" if name + CROP_ENDING in labels else label
    return stems, reasons
