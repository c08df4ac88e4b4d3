"""A run and the commands that read it, from the kept files of an earlier version: what loads, and what is written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
KEPT = HERE / "v0_1"
"""Written by 0.1, by `write.py`; never by a later version."""

VERSION = "0.1.0"
"""By which it was."""

CHECKPOINT = "run/checkpoints/step6.ckpt"
"""After half of the steps."""


class Walked(NamedTuple):
    """What commands have left."""

    folder: Path
    run: Path
    """Of the run that went on from `CHECKPOINT` to its end."""
    said: dict[str, str]
    """By command, what it printed."""


def released() -> bool:
    """Whether that version is out, by the changelog: then nothing of it changes any more."""
    return f"## [{VERSION}]" in (HERE.parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")


def walk(folder: Path) -> Walked:
    """Let this version go on with the kept run, measure it, and read it with every command.

    Args:
        folder: empty; the kept files are copied into it.
    """
    shutil.copytree(KEPT, folder / "kept", dirs_exist_ok=True)
    said = {}
    with chdir(folder / "kept"):
        said["fit"] = command(["fit", "--config", "run/config.yaml", "--ckpt_path", CHECKPOINT, *into("again")])
        checkpoint = ["--config", "run/config.yaml", "--ckpt_path", CHECKPOINT]
        said["predict"] = command(["predict", *checkpoint, *into("predicted")])
        said["export"] = command(["export", "run", "exported"])
        said["generate"] = command(["generate", CHECKPOINT, "--prompt", "How many are 3?", "--max_new_tokens", "3"])
        said["inspect"] = command(["inspect", "--config", "run/config.yaml", "--out", "inspected"])
        said["audit"] = command(["audit", "run", "--out", "audited"])
    return Walked(folder / "kept", folder / "kept" / "again", said)


def into(name: str) -> list[str]:
    """Where a run writes: a logger that keeps rows as text, in a folder of this name."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": ".", "name": name, "version": ""},
    }
    return [f"--trainer.logger={json.dumps(logger)}"]


def command(words: Sequence[str]) -> str:
    """Run `lit-dpo`, in this process; what it printed."""
    from lit_dpo.cli import main

    before, sys.argv = sys.argv, ["lit-dpo", *words]
    out = StringIO()
    try:
        with redirect_stdout(out):
            main(list(words))
    finally:
        sys.argv = before
    return out.getvalue()


# ---- for the list of what is public ----


def described(walked: Walked) -> dict[str, list[str]]:
    """What is in the files, by section of `public_api.txt`."""
    from lit_dpo.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(walked.run / "last.ckpt")
    return {
        "names of measures": sorted(_header(walked.run / "metrics.csv")),
        "files of a run": sorted(_files(walked.run)),
        "keys of a checkpoint": sorted({*_keys(checkpoint)}),
        "keys of lit_dpo.json": _in_json(walked.run / "adapter" / "lit_dpo.json"),
        "keys of environment.json": _in_json(walked.run / "environment.json"),
        "columns of dynamics.parquet": _columns(walked.run / "dynamics.parquet"),
        "fields of predictions.jsonl": [*_row(walked.folder / "predicted" / "predictions.jsonl")],
        "files of an export": sorted(_files(walked.folder / "exported")),
        "files of a report of inspect": sorted(_files(walked.folder / "inspected")),
        "keys of report.json": sorted(json.loads((walked.folder / "inspected" / "report.json").read_text())),
        "files of an audit": sorted(_files(walked.folder / "audited")),
        "columns of scores.parquet": _columns(walked.folder / "audited" / "scores.parquet"),
        **_of_ablations(walked.folder / "ablation"),
        **_of_caches(),
    }


def _files(folder: Path) -> Iterator[str]:
    """Without what PEFT, transformers and the logger write on their own."""
    theirs = (
        "README.md",
        "tokenizer",
        "special_tokens",
        "added_tokens",
        "hparams",
        "metrics",
        "chat_template",
        "adapter_model",
        "adapter_config",
        "generation_config",
    )
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(theirs):
            yield path.relative_to(folder).as_posix()


def _keys(checkpoint: dict[str, Any]) -> Iterator[str]:
    """Of what is ours in a checkpoint; of Lightning's parts none, and of PEFT's names one."""
    for name, value in checkpoint.items():
        if name.startswith(("lit_dpo", "PreferenceDataModule")):
            yield from _paths(value, f"{name}.")
    yield from (f"state_dict.{name}" for name in checkpoint["state_dict"] if "layers" not in name or "0.mlp.up" in name)


_THEIRS = {"packages": "NAME", "variables": "NAME", "groups": "OPTION"}
"""What is of others: packages, the environment, the optimizer's settings."""


def _paths(given: Any, prefix: str = "") -> Iterator[str]:
    """Names joined by dots, of every value that is not a dictionary."""
    if isinstance(given, list) and given and isinstance(given[0], dict):
        yield from (path for one in given for path in _paths(one, f"{prefix.rstrip('.')}[]."))
    elif isinstance(given, dict) and given:
        for name, value in given.items():
            if name in _THEIRS:
                yield f"{prefix}{name}.{_THEIRS[name]}"
            else:
                yield from _paths(value, f"{prefix}{name}.")
    else:
        yield prefix.rstrip(".")


def _in_json(path: Path) -> list[str]:
    return sorted({*_paths(json.loads(path.read_text(encoding="utf-8")))})


def _header(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()[0].split(",")


def _row(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    return found


def _columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    return [f"{field.name}: {field.type}" for field in schema]


def _of_ablations(folder: Path) -> dict[str, list[str]]:
    """Of the tables that an ablation writes, from made pairs: its runs take too long for here."""
    import pyarrow.parquet as pq
    from made_summary import made_pairs, made_result

    from lit_dpo.tools.ablate.records import Layout, Result
    from lit_dpo.tools.measures.summary import summarise
    from lit_dpo.tools.measures.writing import FILES, write

    results = [made_result("dpo", beta, 0) for beta in (0.05, 0.5)]
    tables = {one.name: _of_one_loss(made_pairs("dpo", float(one.axes["beta"]), 0)) for one in results}
    write(Layout(folder), summarise(results, tables), tables)
    found = {"files of an ablation": sorted(FILES), "keys of result.json": [*Result._fields]}
    for name in ("pairs", "runs"):
        found[f"columns of {name}.parquet of an ablation"] = _bounded(pq.read_schema(folder / f"{name}.parquet").names)
    for name in ("arms", "comparisons"):
        columns = [column.strip('"') for column in _header(folder / f"{name}.csv")]
        found[f"columns of {name}.csv of an ablation"] = _bounded(columns)
    return found


def _of_one_loss(pairs: Any) -> Any:
    return pairs.select([name for name in pairs.column_names if "/" not in name or "/dpo-" in name])


def _bounded(columns: Sequence[str]) -> list[str]:
    """Of a column with the ends of its interval one line."""
    bounded = {name for name in columns if f"{name}_low" in columns and f"{name}_high" in columns}
    ends = {f"{name}_{end}" for name in bounded for end in ("low", "high")}
    return [f"{name}, {name}_low, {name}_high" if name in bounded else name for name in columns if name not in ends]


def _of_caches() -> dict[str, list[str]]:
    from lit_dpo.data.storage import features
    from lit_dpo.references.store import _ENTRY

    return {
        "columns of encoded data": [*features(["NUMBER"])],
        "an entry of the reference's cache": [f"{name}: {_ENTRY[name].str}" for name in _ENTRY.names],
    }
