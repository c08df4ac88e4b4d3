"""Where the time of a step of `Trainer.fit` goes: its longest kernels, the time without one, waits for the device."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gpu_compare import store
from gpu_run import Run
from lit_dpo import DPOModule, LoRAPolicy, PreferenceDataModule
from material import made_conversations, place_model, train_tokenizer

LONGEST = 15


def kernels(run: Run) -> str:
    """Steps one after another: to warm up, plain, under the profiler, and with every wait for the device noted."""
    folder, batch = run.folder / "profiled", 2 if run.rehearsed else 8
    steps = Steps(run.device, warm_up=2, each=2) if run.rehearsed else Steps(run.device, warm_up=5, each=4)
    material(run, folder, batch * steps.last)
    data = PreferenceDataModule(
        train=str(folder / "pairs.jsonl"), max_length=2048, truncation="truncate_prompt", batch_size=batch
    )
    policy = LoRAPolicy(str(folder / "model"), quantization="none")
    trainer = pl.Trainer(
        accelerator="cpu" if run.rehearsed else "gpu",
        devices=1,
        precision="32-true" if run.rehearsed else "bf16-mixed",
        max_epochs=-1,
        max_steps=steps.last,
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(DPOModule(policy, lr_scheduler="constant"), data)
    found = steps.found()
    run.note(**found)
    first = found["longest"][0]
    if run.rehearsed:
        said = f"{found['values read a step']:g} values read a step (waits are counted on a GPU alone)"
    else:
        said = f"{found['waits a step']:g} waits for the device a step"
    return (
        f"{found['seconds a step']:.4g} s a step, {found['idle']:.0%} of it without a kernel; longest "
        f"{first['name'][:60]}, {first['share']:.0%}; {said}"
    )


def material(run: Run, folder: Path, count: int) -> None:
    pairs = made_conversations("30,25" if run.rehearsed else "300,250", count)
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_tokenizer(pairs, folder / "model")
    size = ("tiny", 8192, "float32", 2048) if run.rehearsed else ("1B", 128256, "bfloat16", 2048)
    place_model(folder / "model", store(run), *size, run.device)


class Steps(pl.Callback):
    """Looks at steps in three ways, each from the begin of a batch to the begin of another."""

    def __init__(self, device: str, warm_up: int, each: int) -> None:
        self.device, self.warm_up, self.each = device, warm_up, each
        self.last = warm_up + 3 * each + 1
        self.times: list[float] = []
        self.places: Counter[str] = Counter()
        self.open = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        done, rest = divmod(trainer.global_step - self.warm_up, self.each)
        if done < 0 or rest:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.open.close()
        if done == 1:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] * (self.device == "cuda")
            self.profile = self.open.enter_context(torch.profiler.profile(activities=kinds))
            self.times[-1:] = [self.times[-1], time.perf_counter()]  # to start it takes a while
        elif done == 2 and self.device == "cuda":
            self.open.enter_context(waits(self.places))

    def found(self) -> dict[str, Any]:
        """Of a step, in seconds."""
        begin, end, profiled, stopped, *_ = self.times
        events = [event for event in self.profile.events() if self._counts(event)]
        spans = sorted((event.time_range.start, event.time_range.end) for event in events)
        busy, until = 0.0, float("-inf")
        for start, stop in spans:
            busy += max(0.0, stop - max(start, until))
            until = max(until, stop)
        busy /= 1e6 * self.each
        plain, traced = (end - begin) / self.each, (stopped - profiled) / self.each
        names = Counter(event.name for event in self.profile.events())
        return {
            "seconds a step": plain,
            "seconds a step under the profiler": traced,
            "seconds with a kernel": busy,
            "idle": max(0.0, 1 - busy / plain),
            "idle under the profiler": 1 - busy / traced,
            "longest": self._longest(events, busy),
            "waits a step": self.places.total() / self.each if self.device == "cuda" else None,
            "waits": dict(self.places) if self.device == "cuda" else "a CPU has no mode that tells waits",
            "values read a step": names["aten::_local_scalar_dense"] / self.each,
            "copies to the host a step": sum(n for name, n in names.items() if "Memcpy DtoH" in name) / self.each,
        }

    def _counts(self, event: Any) -> bool:
        """Kernels and copies on the device; on a CPU the operations that call no other."""
        if self.device == "cuda":
            return event.device_type.name == "CUDA" and not event.is_user_annotation
        return not event.cpu_children and not event.is_user_annotation

    def _longest(self, events: list[Any], busy: float) -> list[dict[str, Any]]:
        seconds, counts = Counter[str](), Counter(event.name for event in events)
        for event in events:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / self.each
        return [
            {"name": name[:200], "seconds": one, "share": one / busy, "calls": counts[name] / self.each}
            for name, one in seconds.most_common(LONGEST)
        ]


@contextlib.contextmanager
def waits(places: Counter[str]) -> Iterator[None]:
    """Counts where the program waits for the device: torch warns of each, in the frame that asked."""

    def seen(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        ours = next((frame for frame in reversed(frames) if "/lit_dpo/" in frame.filename), None)
        shown = [frame for frame in (frames[-1], ours) if frame]
        places[" in ".join(dict.fromkeys(f"{_short(frame.filename)}:{frame.lineno}" for frame in shown))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-3:])
