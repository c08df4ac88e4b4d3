"""Files and folders that appear whole or not at all, and that are on the disk when they appear."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname

from lit_dpo.errors import LitDPOError, TrainingError

_REMEDIES = {
    errno.ENOSPC: "The disk is full: make room.",
    errno.EDQUOT: "Your quota is used up: make room.",
    errno.EROFS: "It is read-only: name another place.",
    errno.EACCES: "You may not write there: name another place.",
    errno.EPERM: "You may not write there: name another place.",
    errno.ENOTDIR: "A file is in the way: name another place.",
    errno.EEXIST: "A file is in the way: name another place.",
    errno.EIO: "The disk fails: name another place.",
}


@contextmanager
def written_whole(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Give a name next to `path` to write to; what is there takes the place of `path` when it is whole, and flushed.

    Whatever happens before, `path` is as it was. The other name is gone then, or after a kill with the next call.

    Args:
        path: of a file or a folder.
        new: it is a folder, and replaces none: of two processes that write one, the first that is ready has it.

    Raises:
        TrainingError: if the disk refuses: which path, why, and what to do; or if somebody else has made what is new.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path, "tmp")
        try:
            yield temporary
            if new:
                _usual_mode(temporary)
                _flush(temporary)
                _put_new(temporary, path)
            else:
                put_in_place({path: temporary})
        finally:
            remove(temporary)


def _put_new(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)  # no folder takes the place of one that has something in it
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise TrainingError(
            f"Expected to make {path} but another process has made it meanwhile, which was left as it is: name another."
        ) from error
    _flush_entry(path.parent)


def hold(folder: Path) -> int | None:
    """Hold a folder, which is made if need be, against other processes, until `release` or the end of this one.

    Returns:
        What `release` takes; -1 where the system or the disk has no such locks. None if another process holds it.

    Raises:
        TrainingError: if the folder cannot be made.
    """
    with refusals(folder / "held"):
        folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        return -1
    import fcntl

    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on the folder itself: no file is left
    except OSError as error:
        os.close(number)
        return None if isinstance(error, BlockingIOError) else -1
    return number


def release(held: int) -> None:
    """Let go of what `hold` has taken."""
    if held >= 0:
        os.close(held)


def put_in_place(made: dict[Path, Path]) -> None:
    """Give what was made its names, in this order, after all of it is on the disk.

    A folder cannot replace another in one step. So folders that are in the way go first, all of them: what is then
    found at any moment, besides what came from this call or stood there before, is nothing.

    Args:
        made: where each goes, and what; in one parent folder.
    """
    for temporary in made.values():
        _usual_mode(temporary)
        _flush(temporary)
    old = {path: temporary_name(path, "old") for path in made}
    old = {path: away for path, away in old.items() if path.is_dir()}
    for path, away in old.items():
        os.replace(path, away)
    try:
        for path, temporary in made.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in made}:
            _flush_entry(folder)
    finally:
        for path, away in old.items():
            if all(temporary.exists() for temporary in made.values()):  # nothing has its name
                os.replace(away, path)
            remove(away)


def temporary_name(path: Path, kind: str) -> Path:
    """Make a hidden name in the same folder, of this process; what killed ones left under theirs is removed."""
    start = f".{path.name}.{gethostname()}-"
    for found in path.parent.glob(f"{glob.escape(start)}*.{kind}"):
        process = found.name.removeprefix(start).removesuffix(f".{kind}")
        if process.isdigit() and (int(process) == os.getpid() or not _runs(int(process))):
            remove(found)
    return path.with_name(f"{start}{os.getpid()}.{kind}")


def clear_away(folder: Path) -> None:
    """Remove from a folder what killed processes of this machine left under names of `temporary_name`."""
    pattern = re.compile(rf"\..+\.{re.escape(gethostname())}-(\d+)\.(tmp|old)")
    with suppress(OSError):  # it may go meanwhile
        for found in folder.iterdir() if folder.is_dir() else ():
            if (of := pattern.fullmatch(found.name)) and not _runs(int(of[1])):
                remove(found)


def _runs(process: int) -> bool:
    if os.name == "nt":  # where 0 would be a signal
        return True
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another's, or no number that a process can have
        return True
    return True


def remove(path: Path) -> None:
    """Whatever is there, if anything is; a disk that refuses has refused something else before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def refusals(path: Path | str) -> Iterator[None]:
    """Say in a sentence that a disk refuses.

    Raises:
        TrainingError: naming the folder; whichever library it came through.
    """
    try:
        yield
    except LitDPOError:
        raise
    except Exception as error:
        found = _cause(error)
        if found is None:
            raise
        folder = next(one for one in Path(path).parents if not one.name.endswith(".tmp"))  # a pair is made in one
        raise TrainingError(f"Cannot write to {folder}: {os.strerror(found)}. {_REMEDIES[found]}") from error


def refusal(error: BaseException) -> str:
    """Say in a sentence that a disk takes nothing any more, if that is what an error is of; else nothing."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            where = f" to {found.filename}" if found.filename else ""
            return f"Cannot write{where}: {os.strerror(found.errno)}. {_REMEDIES[found.errno]}"
        found = found.__cause__ or found.__context__
    return ""


def _cause(error: BaseException) -> int | None:
    """Find the number of a disk's refusal, or None; safetensors and PyTorch say it in their own words."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    said = (n for n in _REMEDIES if os.strerror(n) in str(error) or f"os error {n})" in str(error))
    return next(said, None)


def _usual_mode(path: Path) -> None:
    """Let others read what they may read of any new file here: safetensors makes files for their owner alone."""
    own = [one for one in (*(path.rglob("*") if path.is_dir() else ()), path) if one.is_file() and _is_private(one)]
    if not own:
        return
    probe = temporary_name(path.with_name("mode"), "tmp")  # what the mask of the process, and the folder, say of it
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666))
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        remove(probe)
    for one in own:
        one.chmod(mode)


def _is_private(file: Path) -> bool:
    return os.name != "nt" and not file.stat().st_mode & 0o077


def _flush(path: Path) -> None:
    """Flush a file, or all files of a folder and its entries."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _flush_entry(inner)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
