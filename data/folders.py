"""Whole folders or none: a folder is written under a temporary name and renamed into place."""

import contextlib
import errno
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_ABANDONED_SECONDS = 24 * 3600
_in_use: set[str] = set()


@contextlib.contextmanager
def building(target: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A new temporary folder beside `target` that becomes `target` when the block ends well and vanishes otherwise.

    If another process has put a folder there meanwhile that `is_whole`, that one stays; anything else there is
    replaced. Leftovers of processes that were killed are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temp = _new_name(target)
    try:
        temp.mkdir()
        yield temp
        _sync(temp)
        _publish(temp, target, is_whole)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        _in_use.discard(temp.name)


def remove_leftovers(target: Path) -> None:
    """Delete temporary folders for `target` whose process is gone (on another machine: untouched for a day)."""
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and path.name not in _in_use and _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _new_name(target: Path) -> Path:
    name = f"{_prefix(target)}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    _in_use.add(name)
    return target.with_name(name)


def _abandoned(path: Path) -> bool:
    start, pid, _ = path.name.rsplit("-", 2)
    if start.endswith(f".tmp-{socket.gethostname()}") and pid.isdecimal():
        return int(pid) == os.getpid() or not _alive(int(pid))
    with contextlib.suppress(OSError):
        newest = max(p.stat().st_mtime for p in [path, *path.rglob("*")])
        return time.time() - newest > _ABANDONED_SECONDS
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(temp: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    try:
        os.rename(temp, target)
    except OSError as err:
        if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_whole(target):
            return
        aside = _new_name(target)
        os.rename(target, aside)
        os.rename(temp, target)
        shutil.rmtree(aside, ignore_errors=True)
        _in_use.discard(aside.name)
    _sync_path(target.parent)


def _sync(folder: Path) -> None:
    """Flush every file and folder below to the disk, so that the rename cannot outlive their content."""
    for path in [*folder.rglob("*"), folder]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
