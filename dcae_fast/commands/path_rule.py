"""How options and arguments that are paths are read."""

from pathlib import Path

from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo


def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Refuses two texts where a path is expected: the empty one, which pathlib reads as the current folder, and "None",
    which an option file's null becomes.
    """

    def path_of(texts: list[str]) -> Path:
        if not texts[0]:
            raise ValueError("expected a file or folder, found an empty text; `.` is the current folder")
        if texts[0] == "None":
            raise ValueError("expected a file or folder, found None; one with this name is ./None")
        return Path(texts[0])

    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(1, "PATH", path_of, lambda value: isinstance(value, Path), lambda path: [str(path)])
