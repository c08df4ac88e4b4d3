"""Laws of writing: whole or not at all, on the disk, and where the disk refuses a sentence and nothing left behind."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from safetensors.torch import load_file

from lit_dpo.callbacks import PredictionWriter
from lit_dpo.callbacks.export import clear_runs
from lit_dpo.checkpoint import AdapterCheckpointIO, save_adapter
from lit_dpo.errors import ResumeError, TrainingError
from lit_dpo.writing import hold, put_in_place, refusal, refusals, release, written_whole
from training import data, module, trainer


@pytest.fixture(scope="module")
def policy(tiny_model):
    """A loaded policy and its tokenizer."""
    dpo = module(tiny_model)
    dpo.configure_model()
    return dpo, dpo.policy.load_tokenizer()


def _saver(policy) -> AdapterCheckpointIO:
    dpo, tokenizer = policy

    def export(checkpoint: dict, directory: Path) -> None:
        save_adapter(dpo.model, tokenizer, directory, checkpoint["state_dict"])

    return AdapterCheckpointIO(TorchCheckpointIO(), lambda _: None, lambda _: None, export)


def _save(policy, number: int, path: Path) -> None:
    dpo, _ = policy
    state = {name: torch.full_like(p, number) for name, p in dpo.state_dict().items()}
    _saver(policy).save_checkpoint({"state_dict": state}, path)


def _numbers(folder: Path) -> set[float]:
    """The numbers that an adapter consists of."""
    return {float(n) for p in load_file(folder / "adapter_model.safetensors").values() for n in p.unique()}


@contextmanager
def _disk(at: Path, *options: str):
    """A file system of its own: a full or read-only one stops the administrator too."""
    at.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(at)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@contextmanager
def _full(at: Path, room: int = 56):
    with _disk(at, "-o", "size=256k"):
        (at / "filler").write_bytes(b"x" * (256 - room) * 1024)
        yield at


@contextmanager
def _read_only(at: Path):
    with _disk(at, "-o", "size=4m"):
        subprocess.run(["mount", "-o", "remount,ro", str(at)], check=True)
        yield at


WRITERS = {
    "checkpoint": lambda policy, folder: _save(policy, 1, folder / "a.ckpt"),
    "adapter": lambda policy, folder: save_adapter(policy[0].model, policy[1], folder / "a"),
}
DISKS = {
    "full": (functools.partial(_full, room=28), "The disk is full: make room"),
    "read-only": (_read_only, "read-only: name another place"),
}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_refuses_is_said_in_a_sentence_and_keeps_nothing_of_it(policy, tmp_path, disk, what):
    made, words = DISKS[disk]
    with made(tmp_path / "disk") as folder:
        before = sorted(folder.iterdir())
        with pytest.raises(TrainingError, match=words) as error:
            WRITERS[what](policy, folder)
        assert f"Cannot write to {folder}: " in str(error.value)
        assert "\n" not in str(error.value)
        assert sorted(folder.iterdir()) == before


def test_a_pair_stays_where_its_successor_does_not_fit(policy, tmp_path):
    with _disk(tmp_path / "disk", "-o", "size=4m") as folder:
        _save(policy, 1, folder / "a.ckpt")
        room = os.statvfs(folder)
        (folder / "filler").write_bytes(b"x" * (room.f_bavail * room.f_bsize - 64 * 1024))
        with pytest.raises(TrainingError, match="disk is full"):
            _save(policy, 2, folder / "a.ckpt")
        assert sorted(found.name for found in folder.iterdir()) == ["a", "a.ckpt", "filler"]
        assert _numbers(folder / "a") == {1.0}


def test_an_error_of_a_full_disk_keeps_nothing_of_what_did_not_fit(policy, tmp_path):
    """Python 3.12.0 and 3.12.1 crash when they collect an error with a view of a `BytesIO` in one of its frames."""
    with _disk(tmp_path / "disk", "-o", "size=4m") as folder:
        _save(policy, 1, folder / "a.ckpt")
        room = os.statvfs(folder)
        used = (room.f_blocks - room.f_bfree) * room.f_bsize
        # the adapter fits, the file that comes after it does not
        (folder / "filler").write_bytes(b"x" * (room.f_bavail * room.f_bsize - used * 3 // 4))
        with pytest.raises(TrainingError, match="disk is full") as error:
            _save(policy, 2, folder / "b.ckpt")
        cause = error.value.__cause__
        assert isinstance(cause, OSError)
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        assert any(frame.f_code.co_name == "_write" for frame in frames)
        views = [one for frame in frames for one in frame.f_locals.values() if isinstance(one, memoryview)]
        for view in views:
            with pytest.raises(ValueError, match="released"):
                len(view)


@pytest.mark.parametrize("disk", DISKS)
def test_a_run_that_cannot_save_ends_in_a_sentence(tiny_model, pairs_file, tmp_path, disk):
    made, words = DISKS[disk]
    with made(tmp_path / "disk") as folder:
        before = sorted(folder.iterdir())
        run = trainer(tmp_path, callbacks=[ModelCheckpoint(folder / "c")], enable_checkpointing=True, max_steps=1)
        with pytest.raises((TrainingError, OSError)) as error:
            run.fit(module(tiny_model), data(pairs_file))
        if disk == "full":  # the folder itself is made by `ModelCheckpoint`
            assert words in str(error.value)
            assert not [found for found in folder.rglob("*") if found.name.startswith(".")]
            before.append(folder / "c")
        assert sorted(folder.iterdir()) == sorted(before)


def test_predictions_are_whole_or_not_there(tiny_model, pairs_file, tmp_path):
    with _full(tmp_path / "disk") as folder:
        (folder / "more").write_bytes(b"x" * 56 * 1024)
        run = trainer(tmp_path, callbacks=[PredictionWriter(str(folder / "predictions.jsonl"))])
        with pytest.raises(TrainingError, match="disk is full"):
            run.predict(module(tiny_model), data(pairs_file, predict=str(pairs_file)))
        run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "predictions.jsonl"))])
        run.predict(module(tiny_model), data(pairs_file, predict=str(pairs_file)))
        assert sorted(found.name for found in folder.iterdir()) == ["filler", "more"]
    assert len([json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]) == 21


def test_a_kill_at_any_moment_leaves_a_file_that_loads_and_a_folder_that_is_its_own(policy, tmp_path):
    """Each child saves over the same name until it is killed."""
    path, drawn, found = tmp_path / "last.ckpt", random.Random(0), set()
    for first in range(1, 13):
        before = path.stat().st_ino if path.exists() else None
        child = os.fork()
        if child == 0:
            try:
                for number in itertools.count(1000 * first):
                    _save(policy, number, path)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while (not path.exists() or path.stat().st_ino == before) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(drawn.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        state = torch.load(path, weights_only=True)["state_dict"]
        numbers = {float(n) for p in state.values() for n in p.unique()}
        assert len(numbers) == 1
        if (tmp_path / "last").exists():
            assert _numbers(tmp_path / "last") == numbers
        found |= numbers
    assert len(found) == 12
    _save(policy, 1, path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["last", "last.ckpt"], "what was left is cleared away"


def test_what_is_written_is_flushed_before_it_has_its_name(tmp_path):
    """Seen from outside, in the system calls of a process: every file, then the rename, then the folder."""
    if subprocess.run(["which", "strace"], capture_output=True).returncode:
        pytest.skip("no strace here")
    code = (
        "from pathlib import Path\nfrom lit_dpo.writing import written_whole\n"
        f"with written_whole(Path({str(tmp_path)!r}) / 'a') as new:\n    new.write_text('x')\n"
    )
    trace = ["strace", "-f", "-y", "-e", "trace=fsync,rename", sys.executable, "-c", code]
    said = subprocess.run(trace, capture_output=True, text=True, check=True).stderr
    calls = [line for line in said.splitlines() if str(tmp_path) in line]
    assert [call.partition("(")[0].split()[-1] for call in calls] == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_whoever_may_read_a_new_file_may_read_what_is_written(policy, tmp_path, mask):
    """safetensors makes files that their owner alone may read."""
    before = os.umask(mask)
    try:
        save_adapter(policy[0].model, policy[1], tmp_path / "adapter")
        _save(policy, 1, tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    written = [one for one in tmp_path.rglob("*") if one.is_file()]
    assert {one.stat().st_mode & 0o777 for one in written} == {0o666 & ~mask}
    assert sum(one.suffix == ".safetensors" for one in written) == 2


def test_a_checkpoint_is_written_to_its_own_disk_alone(policy, tmp_path, monkeypatch):
    """The system's folder for temporary files may be small, and a kill would leave the file there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    _save(policy, 1, tmp_path / "a.ckpt")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "a.ckpt"]


class _Noted(TorchCheckpointIO):
    """A plugin of one's own."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint({**checkpoint, "by": "mine"}, path)


@pytest.mark.parametrize("where", ["remote", "later", "mine", "bare"])
def test_a_plugin_that_the_trainer_has_writes_the_file(policy, tmp_path, where):
    """To a store elsewhere, where no folder can stand beside it; in its own time, with the folder; or as it likes."""
    saver = _saver(policy)
    saver.on_save = lambda checkpoint: checkpoint.update(lit_dpo={"version": 1})
    path = "memory://kept/x.ckpt" if where == "remote" else tmp_path / "x.ckpt"
    state = {name: torch.full_like(p, 3.0) for name, p in policy[0].state_dict().items()}
    if where != "remote":
        saver.inner = {"later": AsyncCheckpointIO(saver.inner), "mine": _Noted()}.get(where, saver.inner)
    checkpoint = state if where == "bare" else {"state_dict": state, "epoch": 1}
    saver.save_checkpoint(checkpoint, path)
    saver.teardown()  # what writes later has written then
    found = saver.load_checkpoint(path)
    assert found.keys() == ({*checkpoint} | ({"by"} if where == "mine" else set()))
    assert ("lit_dpo" in found) == (where != "bare")
    assert (tmp_path / "x").exists() == (where in ("later", "mine"))
    if where in ("later", "mine"):
        assert _numbers(tmp_path / "x") == {3.0}
    saver.remove_checkpoint(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises((OSError, ResumeError)):
        saver.load_checkpoint(path)


def test_a_run_clears_away_what_killed_ones_left_next_to_it(tmp_path):
    """What a process writes that runs, or runs elsewhere, stays; and so does whatever has another name."""
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    host = socket.gethostname()
    none = f".last.ckpt.{host}-{10**30}.tmp"  # the number of no process
    for folder in (tmp_path / "version_0", tmp_path / "version_0" / "checkpoints", tmp_path / "version_1"):
        folder.mkdir()
        for of, kind in ((dead, "tmp"), (dead, "old"), (os.getppid(), "tmp")):
            (folder / f".last.ckpt.{host}-{of}.{kind}").mkdir()
        for name in (f".last.ckpt.elsewhere-{dead}.tmp", f"mine.{host}-{dead}.tmp", ".hidden", none):
            (folder / name).touch()
    clear_runs(trainer(tmp_path, logger=CSVLogger(tmp_path, name="")))
    kept = {f".last.ckpt.{host}-{os.getppid()}.tmp", f".last.ckpt.elsewhere-{dead}.tmp", f"mine.{host}-{dead}.tmp"}
    for folder in (tmp_path / "version_0", tmp_path / "version_0" / "checkpoints", tmp_path / "version_1"):
        assert {one.name for one in folder.iterdir()} - {"checkpoints"} == kept | {".hidden", none}


def test_processes_that_write_the_same_path_do_not_meet(tmp_path):
    """One of them is there in the end, whole."""
    path, children = tmp_path / "folder", []
    for number in range(4):
        if not (child := os.fork()):
            try:
                for _ in range(20):
                    with written_whole(tmp_path / "file") as new:
                        new.write_text(str(number) * 1000)
                with written_whole(path / str(number)) as new:
                    new.mkdir()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    text = (tmp_path / "file").read_text()
    assert len(text) == 1000
    assert len(set(text)) == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
    assert sorted(one.name for one in path.iterdir()) == ["0", "1", "2", "3"]


def test_a_failure_leaves_what_was_there(tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder"):
        for content in ("old", None):
            try:
                with written_whole(path) as new:
                    target = new if path.name == "file" else new / "a"
                    target.parent.mkdir(exist_ok=True)
                    target.write_text(content or "new")
                    if content is None:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
        assert (path if path.is_file() else path / "a").read_text() == "old"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder"]


def test_folders_of_which_one_cannot_be_placed_stay_as_they_were(tmp_path):
    """The first of them has no place: what was moved out of the way for the second comes back."""
    made = {tmp_path / "gone" / "x": tmp_path / "new-x", tmp_path / "folder": tmp_path / "new-folder"}
    for path in (tmp_path / "folder", *made.values()):
        path.mkdir()
        (path / "name").write_text(path.name)
    with pytest.raises(FileNotFoundError):
        put_in_place(made)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "new-folder", "new-x"]
    assert [(path / "name").read_text() for path in (tmp_path / "folder", *made.values())] == [
        "folder",
        "new-x",
        "new-folder",
    ]


def test_a_new_folder_that_cannot_have_its_name_is_the_system_s_own_error(tmp_path):
    """A disk has that name: nobody else has made it, so nothing is said of another process."""
    with (
        _disk(tmp_path / "folder") as taken,
        pytest.raises(OSError, match="busy"),
        written_whole(taken, new=True) as new,
    ):
        new.mkdir()
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]


def test_what_is_not_the_disk_s_refusal_passes_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="mine"), refusals(tmp_path / "a"):
        raise ValueError("mine")


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_disk_that_takes_nothing_is_found_behind_whatever_came_of_it(link):
    disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    above = RuntimeError("cannot write")
    setattr(above, link, disk)
    full = f"{os.strerror(errno.ENOSPC)}. The disk is full: make room."
    assert refusal(above) == refusal(disk) == f"Cannot write to /a/b: {full}"
    assert refusal(OSError(errno.ENOSPC, "")) == f"Cannot write: {full}"
    assert refusal(FileNotFoundError(errno.ENOENT, "")) == refusal(ValueError()) == ""


def test_a_folder_that_is_held_is_held_until_it_is_released(tmp_path):
    held = hold(tmp_path / "folder")
    assert hold(tmp_path / "folder") is None
    release(-1)  # of a disk without locks: nothing to let go of
    release(held)
    again = hold(tmp_path / "folder")
    assert again >= 0
    release(again)
