"""Whether it is right on this machine: the card and what is installed, the laws, the quickstart to its accuracy."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_run import HERE, MissingError, Run

REPOSITORY = HERE.parent
PACKAGES = (
    *("torch", "triton", "lightning", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "torchmetrics"),
    *("jsonargparse", "trl", "flash-attn", "liger-kernel", "kernels"),
)


def card(run: Run) -> str:
    """What it is, and what it does in a second."""
    from material import copy_rate, matrix_peak

    run.note(versions=versions())
    run.note(card=described(run.device))
    dtype = "float32" if run.rehearsed else "bfloat16"
    run.note(dtype=dtype, matrix_flops=matrix_peak(run.device, dtype), copied_bytes=copy_rate(run.device))
    found = run.found
    return (
        f"{found['card']['name']}: {found['matrix_flops'] / 1e12:.4g} TFLOP/s of a {dtype} matrix product, "
        f"{found['copied_bytes'] / 1e9:.4g} GB/s of a copy; torch {found['versions']['torch']}, "
        f"transformers {found['versions']['transformers']}"
    )


def versions() -> dict[str, str]:
    """Of Python and of packages; those that are not there say so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def described(device: str) -> dict[str, Any]:
    """Name, memory, driver."""
    import torch

    if device == "cpu":
        return {"name": "no card, a CPU", "rehearsal": "figures are this CPU's, not a card's"}
    properties = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
        driver = said.splitlines()[0] if said else driver
    return {
        "name": properties.name,
        "GiB": round(properties.total_memory / 2**30, 2),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def laws(run: Run) -> str:
    """The tests that are marked `gpu`; on a CPU as far as they go there."""
    if not find_spec("pytest"):
        raise MissingError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["--gpu-device", "cpu"] * run.rehearsed
    counts, bad = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0), []
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        said = re.match(r"(\S+?::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if not said:
            continue
        counts[said[2]] += 1
        bad += [said[1]] if said[2] in ("FAILED", "ERROR") else []
        run.note(counts=counts, failing=bad, line=counted(counts, bad))
    status = process.wait()
    if status or not counts["PASSED"]:  # all of them skipped is no proof
        raise RuntimeError(f"pytest ended with {status}")
    return counted(counts, bad)


def counted(counts: dict[str, int], bad: list[str]) -> str:
    text = ", ".join(
        f"{count} {name.lower()}" for name, count in counts.items() if count or name in ("PASSED", "FAILED")
    )
    return text + (f": {', '.join(name.rpartition('/')[2] for name in bad)}" if bad else "")


def quickstart(run: Run) -> str:
    """The quickstart as a user runs it, but for the device; held-out pairs are ranked right."""
    config = REPOSITORY / "configs" / "quickstart.yaml"
    command = [sys.executable, "-m", "lit_dpo", "fit", "--config", str(config)]
    command += ["--trainer.accelerator", "cpu" if run.rehearsed else "gpu", "--trainer.devices", "1"]
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
        if status := process.wait():
            raise RuntimeError(f"lit-dpo fit ended with {status}")
        adapter = Path(folder) / "runs" / "version_0" / "adapter" / "adapter_model.safetensors"
        if not adapter.is_file():
            raise RuntimeError("lit-dpo fit left no adapter")
    names = ("val/reward_accuracy", "val/loss", "train/loss")
    found = {name: float(re.findall(rf"{name} ([\d.e-]+)", said)[-1].rstrip(".")) for name in names}
    steps = re.search(r"(\d+) steps in ([\d:]+)", said)
    good = re.search(r"good completions: ([\d.]+) before, ([\d.]+)", said)
    run.note(**found, steps=steps and steps[1], time=steps and steps[2], good_completions=good and good.groups())
    accuracy = found["val/reward_accuracy"]
    line = f"held-out pairs ranked right {accuracy:.3f}, val/loss {found['val/loss']:.3f}"
    line += f"; {steps[1]} steps in {steps[2]}" if steps else ""
    line += f"; good completions {good[1]} before, {good[2]} after" if good else ""
    run.note(line=line)
    if not accuracy >= 0.98:  # one of 64 may be wrong
        raise RuntimeError(f"expected at least 0.98 of the held-out pairs ranked right but got {accuracy}")
    return line
