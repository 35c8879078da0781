"""``folder:DIR``: one folder a class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mithridate.datasets.sources import Item, Request, shuffle_key
from mithridate.datasets.spec import selection_hint
from mithridate.errors import DatasetError

SUFFIXES: Final = frozenset({".jpeg", ".jpg", ".png", ".webp"})
_SPLIT_FOLDERS: Final = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """The selected files, with labels."""

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for path, label in self.files:
            yield Item(name=str(path), data=path.read_bytes(), label=label)


def open_folder(request: Request) -> FolderFiles:
    """``DIR/CLASS/**/*.{jpg,jpeg,png,webp}``, or the same under ``DIR/train``, ``DIR/test`` and ``DIR/val``.

    ``DIR`` has splits if one of those three holds folders itself; ``val`` stands in for a missing ``test``.
    Without splits, none may be named. Classes are the folder names in order of code points, taken from
    ``train`` where there is one; the test split may lack some but not add any. Hidden folders and files of
    other suffixes are not looked at. Files come in the order of a hash of ``CLASS/FILE``, so that a prefix
    mixes the classes.
    """
    root = Path(request.path)
    if not root.is_dir():
        raise DatasetError(f"{request.spec}: no directory {root.absolute()}{selection_hint(request.path)}")
    directory, reference = _choose(request, root)
    classes = tuple(sorted(_folders(reference)))
    present = _folders(directory)
    if not present:
        raise DatasetError(f"{request.spec}: no folder in {directory.absolute()}; one folder a class is needed")
    added = sorted(present - set(classes))
    if added:
        raise DatasetError(f"{request.spec}: {directory} has classes that {reference} has not: {', '.join(added)}")
    found = [(path, label) for label, name in enumerate(classes) if name in present
             for path in _images(request, directory / name)]  # fmt: skip
    found.sort(key=lambda file: shuffle_key(file[0].relative_to(directory).as_posix()))
    return FolderFiles(files=tuple(found[request.spec.window]), classes=classes)


def _choose(request: Request, root: Path) -> tuple[Path, Path]:
    """The directory of the split that is asked for, and the one that names the classes."""
    splits = {name: root / name for name in ("train", "test", "val") if _folders(root / name)}
    if not splits:
        if request.spec.split is not None:
            wanted = " or ".join(_SPLIT_FOLDERS[request.spec.split])
            raise DatasetError(f"{request.spec}: {root} has no splits: no {wanted} folder that holds class folders")
        return root, root
    directory = next((splits[name] for name in _SPLIT_FOLDERS[request.split] if name in splits), None)
    if directory is None:
        raise DatasetError(f"{request.spec}: {root} has no {request.split} split, only {', '.join(splits)}")
    return directory, splits.get("train", directory)


def _folders(directory: Path) -> set[str]:
    if not directory.is_dir():
        return set()
    return {child.name for child in directory.iterdir() if child.is_dir() and not child.name.startswith(".")}


def _images(request: Request, directory: Path) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    visible = [path for path in files if not any(part[0] == "." for part in path.relative_to(directory).parts)]
    if not visible:
        allowed = ", ".join(sorted(SUFFIXES))
        raise DatasetError(f"{request.spec}: class folder {directory} holds no image file; allowed are {allowed}")
    return visible
