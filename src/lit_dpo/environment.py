"""What a run depends on besides its configuration: versions, commits, hardware, switches. No secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

_SECRET = frozenset({"token", "key", "apikey", "secret", "password", "passwd", "auth", "credential", "credentials"})
_VARIABLES = (
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "MALLOC_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_"),
    *("TORCH_", "PYTORCH_", "PL_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "BNB_", "PYTHONHASHSEED"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT"),
)
"""Names and beginnings of names of variables that change what is computed, or how fast."""

_HIDDEN = "…"
# what stands after a name within an argument (`{"api_key": "x"}`), between `://` and `@`; tokens known by their form
_WITHIN = re.compile(r"""([\w.-]+)(["']?\s*[:=]\s*)(?:"[^"]*"|'[^']*'|[^\s,}\]"']+)""")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_KNOWN = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|xox[bp]-)[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b")


def command() -> list[str]:
    """Return the command line of this process, without what looks like a secret."""
    return without_secrets(sys.argv)


def without_secrets(words: Iterable[str]) -> list[str]:
    """Hide values of options that are called a key, a token or the like, logins in addresses, and known tokens.

    Example:
        >>> without_secrets(["--logger.api_key", "abc", "--data.max_tokens", "512", "http://me:abc@host/x"])
        ['--logger.api_key', '…', '--data.max_tokens', '512', 'http://…@host/x']
    """
    found, hide = [], False
    for word in words:
        option = word.startswith("--")
        found.append(_HIDDEN if hide and not option else hidden(word))
        hide = option and "=" not in word and _is_secret(word)
    return found


def hidden(text: str) -> str:
    """Return a text without what looks like a secret."""
    text = _WITHIN.sub(lambda m: f"{m[1]}{m[2]}{_HIDDEN}" if _is_secret(m[1]) else m[0], text)
    return _KNOWN.sub(_HIDDEN, _LOGIN.sub(_HIDDEN, text))


def _is_secret(name: str) -> bool:
    return not _SECRET.isdisjoint(re.split(r"[\W_]+", name.lower()))


def variables(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that matter; never one that is called a token, a key or the like."""
    return {
        name: hidden(value)
        for name, value in sorted(given.items())
        if name.startswith(_VARIABLES) and not _is_secret(name)
    }


@lru_cache(maxsize=1)
def packages() -> dict[str, str]:
    """Return the version of each package that is installed, by the names of their folders: a millisecond for all."""
    found: dict[str, str] = {}
    for place in sys.path:
        with suppress(OSError):
            for entry in os.listdir(place or "."):
                name, _, version = entry.removesuffix(".dist-info").partition("-")
                if entry.endswith(".dist-info") and version:
                    found.setdefault(name.lower().replace("_", "-"), version)  # the first on the path is imported
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def own_code() -> dict[str, Any]:
    """Return the commit of the package, where it is a checkout or was installed from one."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        return code(root)
    with suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        import json

        said = json.loads(distribution("lit_dpo").read_text("direct_url.json") or "{}")
        return {"commit": str(said["vcs_info"]["commit_id"]), "changed": False}
    return {"commit": None, "changed": None}


def code(folder: Path) -> dict[str, Any]:
    """Return the commit of a folder, and whether files that Git knows have changed since; None for what is not known.

    Git runs nothing that a repository names in its own settings: one of a stranger's is not asked what has changed.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "changed": None}
    changed = None
    if not _names_programs(folder):
        # no files that are not tracked, which may be millions, and no other repositories within
        said = _git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        changed = None if said is None else bool(said)
    return {"commit": commit, "changed": changed}


_PROGRAMS = ("filter.", "diff.", "core.fsmonitor", "core.hookspath", "core.sshcommand", "core.pager", "include")


def _names_programs(folder: Path) -> bool:
    """Whether the settings of a repository itself, not the user's, name programs that `git status` would run."""
    said = _git(folder, "config", "--list", "--name-only", "--no-includes", "--local")
    own = _git(folder, "config", "--list", "--name-only", "--no-includes", "--worktree")
    if said is None:
        return True
    return any(line.lower().startswith(_PROGRAMS) for line in f"{said}\n{own or ''}".splitlines())


def _git(folder: Path, *words: str) -> str | None:
    """Return what Git says, or None: there is none, it is no repository, or it takes too long."""
    try:
        ran = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *words],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Return what this machine is, without its name."""
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
    }


def gpus(device: str) -> dict[str, Any]:
    """Return the GPUs of this machine, and what they are driven by; nothing for a run on another kind of `device`."""
    import torch

    if device != "cuda":
        return {}
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpus": [{"name": one.name, "memory_gib": round(one.total_memory / 2**30, 1)} for one in found],
        "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def switches() -> dict[str, Any]:
    """Return PyTorch's switches that change what is computed."""
    import torch

    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


@lru_cache(maxsize=1)
def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
