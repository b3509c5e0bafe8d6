"""WebDataset's tar shards: which pictures and classes they hold, and where."""

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
from .pictures import Named, Picture, Pictures

NUMBERS = 100_000  # class numbers are below; larger ones are names that consist of digits
LONGEST = 200  # bytes of a class's name, which becomes a folder's


class ClassMember(NamedTuple):
    """The `.cls` member of a sample: its name, and the class that it holds, a number or a name."""

    name: str
    text: str


@dataclass
class Sample:
    """What a shard has under one key: members (extension, picture) and (name, content) of `.cls` members."""

    pictures: list[tuple[str, Picture]] = field(default_factory=list)
    classes: list[tuple[str, bytes]] = field(default_factory=list)


def read_shards(root: Path, shards: Sequence[str], member: str | None) -> Pictures:
    """The pictures in tar files, which are named by paths from `root`. Nothing is unpacked.

    A sample is all members of one path up to the first dot of its last part, and has one picture: with `member`, the
    one of that extension, as jpg or seg.png. A member `x.cls` holds the class of the picture `x.<suffix>`, a number or
    a name. Numbers are kept; names, and numbers from `NUMBERS` on, are numbered in sorted order. A shard that is not
    readable to its end is left out as a whole. Raises DataError where some classes are numbers and others names.
    """
    pictures, found = Pictures(root, []), []
    for shard in shards:
        ignored, failed = [], []
        try:
            samples = _samples(root, shard, member, ignored, failed)
        except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: numbers in headers
            reason = getattr(error, "strerror", None) or error
            pictures.failed.append((shard, f"not a readable, uncompressed tar file: {reason}"))
            continue
        pictures.ignored += ignored
        pictures.failed += failed
        found += _one_each(samples, pictures)
    return _labelled(pictures, found)


def _samples(root: Path, shard: str, wanted: str | None, ignored: Named, failed: Named) -> dict[str, Sample]:
    """A shard's samples by key; members that belong to none are named."""
    samples: dict[str, Sample] = {}
    status, wanted = (root / shard).stat(), wanted and wanted.lower().lstrip(".")
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
                failed.append((name, "leads out of its shard"))
            elif any(part.startswith(".") for part in path.split("/")):
                ignored.append((name, "hidden"))
            elif suffix not in picture_suffixes() and suffix != ".cls":
                ignored.append((name, "not a picture's suffix"))
            elif target is None or not target.isreg() or target.issparse():
                failed.append((name, "not a regular file, nor a link to one in the same shard"))
            elif suffix == ".cls":
                samples.setdefault(key, Sample()).classes.append((name, tar.extractfile(target).read(LONGEST + 1)))
            elif wanted is not None and extension.lower() != wanted:
                ignored.append((name, f"not --member {wanted}"))
            else:
                picture = Picture(name, key, 0, shard, target.offset_data, target.size, status.st_mtime_ns)
                samples.setdefault(key, Sample()).pictures.append((extension, picture))
    return samples


def _check_end(path: Path, offset: int) -> None:
    """Raises ReadError unless nothing but zeros follows: tarfile takes a damaged header for the end."""
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(2**20):
            if any(block):
                raise tarfile.ReadError(f"no header of a member at byte {offset}")


def _normal(name: str) -> str:
    """A member's path without "./", "//" and a leading "/"."""
    return posixpath.normpath(name).lstrip("/")


def _target(info: tarfile.TarInfo, by_path: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that a link leads to, the member itself if it is no link; None if the shard has none."""
    for _ in range(8):  # links to links; some lead in a circle
        if not (info.islnk() or info.issym()):
            return info
        folder = "" if info.islnk() else posixpath.dirname(info.name)
        info = by_path.get(_normal(posixpath.join(folder, info.linkname)))
        if info is None:
            break
    return None


def _one_each(samples: dict[str, Sample], pictures: Pictures) -> Iterator[tuple[Picture, ClassMember | None]]:
    """The picture of each sample that has one, and its class."""
    for key, sample in samples.items():
        names = [picture.name for _, picture in sample.pictures]
        if not names:
            pictures.ignored += [(name, "the class of no picture") for name, _ in sample.classes]
        elif len(names) > 1:
            extensions = dict.fromkeys(extension for extension, _ in sample.pictures)
            reason = f"its sample {key} has {len(names)} pictures; "
            if len(extensions) < len(names):
                reason += "some have the same extension, and it is not clear which is meant"
            else:
                reason += "name the one to take with " + " or ".join(f"--member {each}" for each in extensions)
            pictures.failed += [(name, reason) for name in names]
        else:
            try:
                yield sample.pictures[0][1], _class_member(sample.classes)
            except DataError as error:
                pictures.failed.append((names[0], str(error)))


def _class_member(members: list[tuple[str, bytes]]) -> ClassMember | None:
    """Raises DataError where the sample's class cannot be known."""
    if not members:
        return None
    (name, content), *more = members
    if more:
        raise DataError(f"two members tell its class: {name} and {more[0][0]}")
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(content) > LONGEST or text.startswith(".") or "/" in text or not text.isprintable():
        told = repr(content.decode(errors="replace")[:40]) if content else "nothing"
        raise DataError(f"{name} holds {told}; expected a class number, or a name that a folder could have")
    return ClassMember(name, text)


def _labelled(pictures: Pictures, found: list[tuple[Picture, ClassMember | None]]) -> Pictures:
    """The pictures with class numbers, under folders of the classes' names; without either if none has a class."""
    members = [member for _, member in found if member is not None]
    if not members:
        pictures.items += [picture for picture, _ in found]
        return pictures
    pictures.classes, numbers = _classes(pictures, members)
    for picture, member in found:
        if member is None:
            pictures.failed.append((picture.name, "no `.cls` member beside it, as others have"))
        elif member.text not in numbers:
            reason = f"{member.name} holds the class number {member.text}; expected at least 0"
            pictures.failed.append((picture.name, reason))
        else:
            label = numbers[member.text]
            pictures.items.append(picture._replace(key=f"{pictures.classes[label]}/{picture.key}", label=label))
    return pictures


def _classes(pictures: Pictures, members: Sequence[ClassMember]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes by number, and the number for each text that is no negative number."""
    numbers = {member.text: int(member.text) for member in members if re.fullmatch(r"-?[0-9]+", member.text)}
    names = [member for member in members if member.text not in numbers]
    if names and numbers:
        number = next(member for member in members if member.text in numbers)
        raise DataError(
            f"{pictures.root}: {number.name} holds the class number {number.text}, and {names[0].name} the name "
            f"{names[0].text!r}; expected numbers in all `.cls` members, or names in all"
        )
    if max(map(abs, numbers.values()), default=NUMBERS) < NUMBERS:
        most = max(numbers.values())
        width = len(str(most))  # of all, so that the names are in the order of the numbers
        classes = tuple(f"{number:0{width}d}" for number in range(most + 1))
        return classes, {text: number for text, number in numbers.items() if number >= 0}
    for member in members:
        pictures.class_members.setdefault(member.text, member.name)
    classes = tuple(sorted({member.text for member in members}))
    return classes, {name: label for label, name in enumerate(classes)}
