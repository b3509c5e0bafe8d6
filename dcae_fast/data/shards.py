"""Reads the table of contents of WebDataset tar shards: pictures, their positions, and their classes."""

import posixpath
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dcae_fast.errors import DataError
from dcae_fast.images import picture_suffixes

from .folders import suffix_of
from .pictures import CAPTION_SUFFIXES, Caption, Notes, Picture, Pictures

MAX_CLASS_NUMBERS = 100_000  # numbers from here on are treated as class names
MAX_CLASS_BYTES = 200  # of a class name, which becomes a folder name


class ClassMember(NamedTuple):
    """The `.cls` member of a sample. name: of the member; text: its content, a class number or a class name."""

    name: str
    text: str


@dataclass
class Sample:
    """The members of a shard with one key: (extension, picture), (name, content) of `.cls` members, and the captions.

    captions: by suffix.
    """

    pictures: list[tuple[str, Picture]] = field(default_factory=list)
    classes: list[tuple[str, bytes]] = field(default_factory=list)
    captions: dict[str, Caption] = field(default_factory=dict)


def read_shards(root: Path, shards: Sequence[str], member: str | None) -> Pictures:
    """Lists the pictures in tar files, given by paths relative to `root`, without unpacking the files.

    A sample consists of the members whose paths are equal up to the first dot of the file name. It must have one
    picture; with `member`, one picture with this extension, such as jpg or seg.png. A member `x.cls` contains the class
    of the picture `x.<suffix>`, a number or a name. Numbers are kept; names, and numbers from `MAX_CLASS_NUMBERS` on,
    are numbered in sorted order. The caption is the text of the member `x.txt`, or else the text "caption" in `x.json`.
    A shard that cannot be read to its end is left out entirely. Raises DataError if some
    classes are numbers and others are names.
    """
    pictures, found = Pictures(root, []), []
    for shard in shards:
        ignored, failed = [], []
        try:
            samples = _samples(root, shard, member, ignored, failed)
        except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: invalid number in a header
            reason = getattr(error, "strerror", None) or error
            pictures.failed.append((shard, f"not a readable, uncompressed tar file: {reason}"))
            continue
        pictures.ignored += ignored
        pictures.failed += failed
        found += _one_picture_each(samples, pictures)
    return _labelled(pictures, found)


def _samples(root: Path, shard: str, member: str | None, ignored: Notes, failed: Notes) -> dict[str, Sample]:
    """A shard's samples by key. Adds the members that belong to no sample to `ignored` or `failed`."""
    samples: dict[str, Sample] = {}
    status, wanted = (root / shard).stat(), member and member.lower().lstrip(".")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    with tarfile.open(root / shard, "r:") as tar:
        members = [(_normal(info.name), info) for info in tar if not info.isdir()]
        _check_end(root / shard, tar.offset)
        by_path = dict(members)
        for path, info in members:
            name, file = f"{shard}/{path}", posixpath.basename(path)
            stem, _, extension = file.partition(".")
            suffix, key = suffix_of(file), f"{shard[:-4]}/{path[: len(path) - len(file)]}{stem}"
            target = _target(info, by_path)
            if path.startswith("../"):
                failed.append((name, "its path leads out of the shard"))
            elif any(part.startswith(".") for part in path.split("/")):
                ignored.append((name, "hidden"))
            elif suffix not in picture_suffixes() and suffix != ".cls" and f".{extension}" not in CAPTION_SUFFIXES:
                ignored.append((name, "no picture suffix"))
            elif target is None or not target.isreg() or target.issparse():
                failed.append((name, "not a regular file, nor a link to a regular file in the same shard"))
            elif suffix == ".cls":
                samples.setdefault(key, Sample()).classes.append(
                    (name, tar.extractfile(target).read(MAX_CLASS_BYTES + 1))
                )
            elif suffix in CAPTION_SUFFIXES:
                caption = Caption(name, target.offset_data, target.size)
                samples.setdefault(key, Sample()).captions[suffix] = caption
            elif wanted is not None and extension.lower() != wanted:
                ignored.append((name, f"not --member {wanted}"))
            else:
                picture = Picture(name, key, 0, shard, target.offset_data, target.size, status.st_mtime_ns)
                samples.setdefault(key, Sample()).pictures.append((extension, picture))
    return samples


def _check_end(path: Path, offset: int) -> None:
    """Raises ReadError unless only zeros follow `offset`: tarfile mistakes a damaged header for the end of the file."""
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(2**20):
            if any(block):
                raise tarfile.ReadError(f"damaged member header at byte {offset}")


def _normal(name: str) -> str:
    """A member's normalised path, without "./", "//" and a leading "/"."""
    return posixpath.normpath(name).lstrip("/")


def _target(info: tarfile.TarInfo, by_path: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member itself or, for a link, the member that it points to; None if the shard has no such member."""
    for _ in range(8):  # links may point to links, or form a circle
        if not (info.islnk() or info.issym()):
            return info
        folder = "" if info.islnk() else posixpath.dirname(info.name)
        info = by_path.get(_normal(posixpath.join(folder, info.linkname)))
        if info is None:
            break
    return None


def _one_picture_each(samples: dict[str, Sample], pictures: Pictures) -> Iterator[tuple[Picture, ClassMember | None]]:
    """The picture and the class of each sample with exactly one picture. Adds the others to `ignored` or `failed`."""
    for key, sample in samples.items():
        names = [picture.name for _, picture in sample.pictures]
        if not names:
            pictures.ignored += [(caption.name, "no picture suffix") for caption in sample.captions.values()]
            pictures.ignored += [(name, "a class without a picture") for name, _ in sample.classes]
        elif len(names) > 1:
            extensions = dict.fromkeys(extension for extension, _ in sample.pictures)
            reason = f"sample {key} has {len(names)} pictures; "
            if len(extensions) < len(names):
                reason += "some have the same extension; expected one picture per extension"
            else:
                reason += "choose one with " + " or ".join(f"--member {each}" for each in extensions)
            pictures.failed += [(name, reason) for name in names]
        else:
            captions = tuple(sample.captions[suffix] for suffix in CAPTION_SUFFIXES if suffix in sample.captions)
            try:
                yield sample.pictures[0][1]._replace(captions=captions), _class_member(sample.classes)
            except DataError as error:
                pictures.failed.append((names[0], str(error)))


def _class_member(members: list[tuple[str, bytes]]) -> ClassMember | None:
    """The class member of a sample; None if it has none. Raises DataError for several or invalid class members."""
    if not members:
        return None
    (name, content), *more = members
    if more:
        raise DataError(f"two members give its class: {name} and {more[0][0]}; expected one")
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(content) > MAX_CLASS_BYTES or text.startswith(".") or "/" in text or not text.isprintable():
        found = repr(content.decode(errors="replace")[:40]) if content else "nothing"
        raise DataError(f"{name} contains {found}; expected a class number, or a class name valid as a folder name")
    return ClassMember(name, text)


def _labelled(pictures: Pictures, found: list[tuple[Picture, ClassMember | None]]) -> Pictures:
    """Adds the pictures to `pictures`; if there are classes, with class numbers and class folders in their keys."""
    members = [member for _, member in found if member is not None]
    if not members:
        pictures.items += [picture for picture, _ in found]
        return pictures
    pictures.classes, numbers = _classes(pictures, members)
    for picture, member in found:
        if member is None:
            pictures.failed.append((picture.name, "has no `.cls` member, although other pictures have one"))
        elif member.text not in numbers:
            reason = f"{member.name} contains the class number {member.text}; expected at least 0"
            pictures.failed.append((picture.name, reason))
        else:
            label = numbers[member.text]
            pictures.items.append(picture._replace(key=f"{pictures.classes[label]}/{picture.key}", label=label))
    return pictures


def _classes(pictures: Pictures, members: Sequence[ClassMember]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names by number, and the class number for each text except negative numbers."""
    numbers = {member.text: int(member.text) for member in members if re.fullmatch(r"-?[0-9]+", member.text)}
    names = [member for member in members if member.text not in numbers]
    if names and numbers:
        number = next(member for member in members if member.text in numbers)
        raise DataError(
            f"{pictures.root}: {number.name} contains the class number {number.text}, and {names[0].name} the class "
            f"name {names[0].text!r}; expected only numbers or only names in the `.cls` members"
        )
    if max(map(abs, numbers.values()), default=MAX_CLASS_NUMBERS) < MAX_CLASS_NUMBERS:
        most = max(numbers.values())
        width = len(str(most))  # equal widths sort the names in the order of the numbers
        classes = tuple(f"{number:0{width}d}" for number in range(most + 1))
        return classes, {text: number for text, number in numbers.items() if number >= 0}
    for member in members:
        pictures.class_members.setdefault(member.text, member.name)
    classes = tuple(sorted({member.text for member in members}))
    return classes, {name: label for label, name in enumerate(classes)}
