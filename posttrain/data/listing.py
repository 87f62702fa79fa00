"""The files of a data set, found by name alone, and which of them have changed since they were last seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pyarrow import fs

from posttrain.errors import DataError
from posttrain.store.folder import resolve

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga"),
)
"""Of the formats in `vision.pillow_formats`."""

_READ_WHOLE = 64 * 2**20
"""Size in bytes of the largest local file whose content is compared where only its time has changed."""


@dataclass(frozen=True)
class File:
    """A file of one split at the time it was listed."""

    split: str
    path: str
    """In its file system."""
    size: int
    mtime_ns: int
    content: str = ""
    """Digest of its bytes, where it has been read."""


def parquet_files(location: str) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    """The Parquet files at a location: itself, or all in the folder, sorted. Raises DataError where there are none."""
    files, path = resolve(location)
    info = files.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{location}: no such file or folder; check data.train, data.validation, data.test")
    if info.type == fs.FileType.File:
        return files, [info]
    found = files.get_file_info(fs.FileSelector(path, recursive=True))
    inside = sorted((f for f in found if f.path.endswith((".parquet", ".pq"))), key=lambda f: f.path)
    if not inside:
        raise DataError(f"{location}: holds no .parquet file; name a folder that does, or set data.source")
    return files, inside


def image_files(location: str) -> tuple[fs.FileSystem, list[fs.FileInfo], list[str]]:
    """The images in a folder, sorted, and the paths of other files that are not hidden.

    Raises DataError where there is no image.
    """
    files, root = resolve(location)
    if files.get_file_info(root).type != fs.FileType.Directory:
        raise DataError(f"{location}: no such folder; check data.train, data.validation, data.test")
    if isinstance(files, fs.LocalFileSystem):
        _refuse_bad_links(root)
    found = files.get_file_info(fs.FileSelector(root, recursive=True))
    images: list[fs.FileInfo] = []
    others: list[str] = []
    for info in sorted((f for f in found if f.type != fs.FileType.Directory), key=lambda f: f.path):
        if info.path.lower().endswith(IMAGE_SUFFIXES):
            images.append(info)
        elif info.is_file and not info.base_name.startswith("."):
            others.append(info.path)
    for image in images:
        if image.type != fs.FileType.File:
            raise DataError(f"{image.path}: is named as an image and is no file; take it out")
    if not images:
        raise DataError(f"{location}: holds no image; expected <class>/<image> with one of {', '.join(IMAGE_SUFFIXES)}")
    return files, images, others


def _refuse_bad_links(folder: str) -> None:
    """Raises DataError for a link that leads back, whose images would be endless, or nowhere, which Arrow leaves out.

    All other links are followed, to files and to folders.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                _refuse_bad_link(entry)
            if entry.is_dir():
                _refuse_bad_links(entry.path)


def _refuse_bad_link(link: os.DirEntry[str]) -> None:
    target = os.path.realpath(link.path)
    if (os.path.realpath(os.path.dirname(link.path)) + "/").startswith(target + "/"):
        raise DataError(
            f"{link.path}: is a link that leads back to {target}, so that its images would come again and again; "
            "take it out"
        )
    if not os.path.exists(target):
        raise DataError(f"{link.path}: is a link to {target}, which is not there; mend it, or take it out")


def list_files(source: str, locations: Mapping[str, tuple[str, ...]]) -> list[File]:
    """The files of each split's locations, of a `data.source` parquet or folder."""
    find = image_files if source == "folder" else parquet_files
    return [
        File(split, info.path, info.size, info.mtime_ns or 0)
        for split, given in locations.items()
        for location in given
        for info in find(location)[1]
    ]


def changed(now: Iterable[File], before: Mapping[tuple[str, str], File], *, local: bool) -> list[File]:
    """The files that are new, or have changed, since `before`: the files seen then by (split, path).

    A file is unchanged where its size and time are the same, and on local disks also where its size and content are.
    """
    found: list[File] = []
    for file in now:
        known = before.get((file.split, file.path))
        if known is not None and known.size == file.size:
            if known.mtime_ns == file.mtime_ns:
                continue
            if local and known.content and _digest(file).content == known.content:
                continue
        found.append(file)
    return found


def with_content(files: Iterable[File], *, local: bool) -> list[File]:
    """The files with digests of their content where reading it is cheap: on local disks, except for large files."""
    if not local:
        return list(files)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_digest, files))


def _digest(file: File) -> File:
    if file.content or file.size > _READ_WHOLE:
        return file
    try:
        with open(file.path, "rb") as stream:
            found = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
            now = os.fstat(stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            # written to since it was listed: its bytes may not be those that the run has read
            return file
        return replace(file, content=found.hexdigest())
    except OSError:
        # vanished since, or not readable here: only its size and time can be compared
        return file
