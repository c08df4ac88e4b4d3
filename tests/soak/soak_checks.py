"""What is looked at after a fault: whether all that has a name is whole, what is left over, and what differs."""

from __future__ import annotations

import csv
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_dpo.references.store import LogpStore

TEMPORARY = re.compile(r"^\.(.+)\.[^/]+-\d+\.(tmp|old)$")
_COSTS = ("second", "memory", "data_wait", "per_", "time")
_OPEN = ("rows.jsonl", "log.txt", "metrics.csv", "progress")
"""Files that grow line by line: the last line may be torn."""


def files(root: Path) -> Iterator[Path]:
    """All that has its own name: nothing in a temporary folder, nor a temporary file."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(TEMPORARY.match(part) for part in path.relative_to(root).parts):
            yield path


def leftovers(root: Path) -> list[str]:
    """Names of what is temporary: ours, and whatever looks like somebody's.

    But for the folders `pymp-…`, which Python makes for the workers of a loader in the system's own place for them.
    """
    found = []
    for path in root.rglob("*"):
        name = path.name
        if TEMPORARY.match(name) or name.startswith("tmp") or name.endswith((".tmp", ".part", ".incomplete")):
            found.append(str(path.relative_to(root)))
    return sorted(found)


def torn(root: Path) -> list[str]:
    """Files under their own names that cannot be read to their ends, and why."""
    found = []
    for path in files(root):
        try:
            _read(path)
        except Exception as error:
            found.append(f"{path.relative_to(root)}: {type(error).__name__}: {str(error)[:200]}")
    for folder in {path.parent for path in root.rglob("*.index")}:
        if (store := LogpStore(folder)).damaged:
            found.append(f"{folder.relative_to(root)}: {store.damaged} entries are damaged")
    return found


def _read(path: Path) -> None:
    if path.suffix == ".ckpt":
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise ValueError(bad)
        torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        load_file(path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.read_table(path)
    elif path.suffix == ".arrow":
        import pyarrow as pa

        pa.ipc.open_stream(path.open("rb")).read_all()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text()) if path.name != "hparams.yaml" else path.read_text()
    elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("no end")
    elif path.suffix == ".jsonl" and path.name not in _OPEN:
        [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is equal ----


def last(root: Path) -> Path | None:
    """The checkpoint that `--ckpt_path last` finds."""
    return max(root.glob("runs/*/last.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def differences(straight: Path, resumed: Path) -> list[str]:
    """What differs between what two folders of `fit` hold, at most some of each kind."""
    return [*_weights(straight, resumed), *rows_differ(straight, resumed)]


def _weights(straight: Path, resumed: Path) -> list[str]:
    whole, other = last(straight), last(resumed)
    if whole is None or other is None:
        return ["no last.ckpt"]
    one, two = (torch.load(file, weights_only=True) for file in (whole, other))
    # not `epoch`: a file of the very end, after SIGTERM for instance, has counted the last one as over
    keys = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
    found = [f"last.ckpt: {key}" for key in keys if not same(one[key], two[key])]
    adapters = [_exported(folder) for folder in (straight, resumed)]
    return [*found, *([] if same(*adapters) else ["the adapter"])]


def _exported(root: Path) -> dict[str, torch.Tensor]:
    """The adapter of the last run that wrote one: a kill may come after all steps, and right before it."""
    found = [run / "adapter" for run in _versions(root) if (run / "adapter" / "adapter_model.safetensors").exists()]
    return _adapter(found[-1]) if found else {}


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors") if folder.is_dir() else {}


def same(one: Any, two: Any) -> bool:
    """Equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def rows_differ(straight: Path, resumed: Path) -> list[str]:
    """Which numbers of which steps were logged otherwise, by whichever logger."""
    found = []
    for kind, read in (("csv", _csv), ("board", _board)):
        one, two = read(straight), read(resumed)
        missing, more = sorted(one.keys() - two.keys()), sorted(two.keys() - one.keys())
        wrong = sorted(key for key in one.keys() & two.keys() if one[key] != two[key])
        for word, keys in (("no", missing), ("more", more), ("another", wrong)):
            if keys:
                said = ", ".join(f"{name}@{step}" for name, step in keys[:4])
                found.append(f"{kind}: {word} {said}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else ""))
    return found


def _versions(root: Path) -> list[Path]:
    return sorted(root.glob("runs/version_*"), key=lambda folder: int(folder.name.partition("_")[2]))


def _csv(root: Path) -> dict[tuple[str, int], str]:
    """Numbers by name and step, the last one that was logged."""
    found = {}
    for folder in _versions(root):
        file = folder / "metrics.csv"
        for row in csv.DictReader(file.open(newline="")) if file.exists() else ():
            if not (row.get("step") or "").isdigit():
                continue
            for name, value in row.items():
                if value and name not in ("step", "epoch") and not any(word in name for word in _COSTS):
                    found[name, int(row["step"])] = value
    return found


def _board(root: Path) -> dict[tuple[str, int], float]:
    """The same of TensorBoard's files."""
    from tensorboard.compat.proto.event_pb2 import Event

    found = {}
    for folder in _versions(root):
        for file in sorted(folder.glob("events.out.tfevents*"), key=lambda one: one.name):
            for record in _records(file.read_bytes()):
                event = Event.FromString(record)
                for value in event.summary.value:
                    if value.HasField("simple_value") and not any(word in value.tag for word in _COSTS):
                        found[value.tag, event.step] = value.simple_value
    return found


def _records(content: bytes) -> Iterator[bytes]:
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        if place + 16 + length > len(content):  # torn by a kill
            return
        yield content[place + 12 : place + 12 + length]
        place += 16 + length


def tools_differ(command: str, straight: Path, resumed: Path) -> list[str]:
    """What differs between what two folders of `ablate`, `inspect` or `export` hold."""
    if command == "ablate":
        return _ablations(straight / "out", resumed / "out")
    found = []
    folder = {"inspect": "report", "export": "tuned"}[command]
    one, two = (
        {path.relative_to(root / folder).as_posix(): path.read_bytes() for path in files(root / folder)}
        for root in (straight, resumed)
    )
    if one.keys() != two.keys():
        found.append(f"other files: {sorted(one.keys() ^ two.keys())}")
    return [*found, *(f"another {name}" for name in sorted(one.keys() & two.keys()) if one[name] != two[name])]


def _ablations(one: Path, two: Path) -> list[str]:
    import pyarrow.parquet as pq

    found = []
    for name in ("pairs.parquet", "pairs.csv", "comparisons.csv"):  # others hold seconds
        if (one / name).read_bytes() != (two / name).read_bytes():
            found.append(f"another {name}")
    for folder in sorted((one / "runs").iterdir()):
        other = two / "runs" / folder.name
        if not pq.read_table(folder / "pairs.parquet").equals(pq.read_table(other / "pairs.parquet")):
            found.append(f"another pairs.parquet of {folder.name}")
        if not same(_adapter(folder / "adapter"), _adapter(other / "adapter")):
            found.append(f"another adapter of {folder.name}")
        mine, theirs = (_curves(of) for of in (folder, other))
        if mine != theirs:
            found += [f"rows of {folder.name}: {a} and not {b}" for a, b in zip(mine, theirs, strict=False) if a != b]
            found += [f"{len(theirs)} rows instead of {len(mine)}"] if len(mine) != len(theirs) else []
    return found


def _curves(folder: Path) -> list[dict[str, float]]:
    rows = json.loads((folder / "result.json").read_text())["curves"]
    return [{key: value for key, value in row.items() if not any(word in key for word in _COSTS)} for row in rows]
