"""Checkpoints and adapters on disk: whole, in pairs, and finite."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from lit_dpo.checkpoint.identity import check_readable
from lit_dpo.errors import ResumeError, TrainingError, first_line
from lit_dpo.policy.adapter_checks import RECORD
from lit_dpo.writing import put_in_place, refusals, remove, temporary_name, written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class AdapterCheckpointIO(CheckpointIO):
    """Writes each checkpoint whole or not at all, and a PEFT directory of the same name next to it.

    Args:
        inner: the strategy's own plugin.
        on_save: adds to a checkpoint what every file shall say.
        on_load: looks at what a file says.
        export: writes the PEFT directory of a checkpoint.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        on_save: Callable[[dict[str, Any]], None],
        on_load: Callable[[dict[str, Any]], None],
        export: Callable[[dict[str, Any], Path], None],
    ) -> None:
        self.inner, self.on_save, self.on_load, self.export = inner, on_save, on_load, export

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write both to temporary names, then rename: a folder that is there goes, the file comes, its folder comes.

        Raises:
            TrainingError: if the disk refuses; what was there is as it was.
        """
        if _is_bare(checkpoint):  # what a spawned process hands back to the one that started it
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        # ahead of every write: it refuses weights that are not finite
        self.on_save(checkpoint)
        if "://" in str(path):  # a remote store: its own writes are whole
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        folder = _adapter_folder(path)
        if isinstance(self.inner, AsyncCheckpointIO):  # it writes later, and whole
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            self.export(checkpoint, folder)
            return
        check_writable(folder)
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # next to the target: only within a file system is a rename one step
            scratch = temporary_name(path, "tmp")
            try:
                self.export(checkpoint, scratch / folder.name)
                self._write(checkpoint, scratch / path.name, storage_options)
                # the file, which is all that a run needs, is there at any moment; its folder only when it is its own
                put_in_place({path: scratch / path.name, folder: scratch / folder.name})
            finally:
                remove(scratch)

    def _write(self, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        if type(self.inner) is not TorchCheckpointIO or storage_options is not None:
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        # as Lightning does, but for its detour over the system's folder for temporary files: another disk, which may be
        # small, and on which a kill would leave the whole file for good
        content = io.BytesIO()
        torch.save(checkpoint, content)
        # the view is let go of before an error travels: Python 3.12.0 and 3.12.1 crash (cpython issue 111049) when they
        # collect one that an error has kept, and `Path.write_bytes` keeps one
        with content.getbuffer() as view, path.open("wb") as file:
            file.write(view)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Load; nothing but tensors and builtins is ever in it."""
        # to the CPU, as Lightning's own plugin: a file of a GPU is read without one, and by each rank for itself
        # whatever the caller asks: a file may be a stranger's, and others than these run code
        try:
            checkpoint = self.inner.load_checkpoint(path, map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ResumeError(
                f"Expected a checkpoint of tensors and builtins but {path} cannot be read as one: {first_line(error)}"
            ) from error
        if not _is_bare(checkpoint):
            check_readable(checkpoint, path)
            self.on_load(checkpoint)
        return checkpoint

    def teardown(self) -> None:
        """Let the inner plugin finish."""
        self.inner.teardown()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove both."""
        self.inner.remove_checkpoint(path)
        # somebody's folder may have the same name
        if "://" not in str(path) and _is_adapter(_adapter_folder(Path(path))):
            shutil.rmtree(_adapter_folder(Path(path)), ignore_errors=True)


def _is_bare(checkpoint: Mapping[str, Any]) -> bool:
    """See whether these are tensors by name, and no checkpoint with more than them."""
    return all(isinstance(one, torch.Tensor) for one in checkpoint.values())


def _adapter_folder(path: Path) -> Path:
    # without the suffix the file has the folder's name itself
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}-adapter")


def check_writable(directory: Path) -> None:
    """See that an adapter would replace an adapter, and nothing else.

    Raises:
        TrainingError: if the directory holds something else.
    """
    if directory.exists() and not _is_adapter(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise TrainingError(f"Expected to write the adapter to {directory}, but something else is there. Name another.")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Nothing is written that is worthless.

    Raises:
        TrainingError: naming the first tensor that holds NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"Expected finite weights but {name} is not, so that nothing was written: what was saved before is as "
                "it was. Lower the learning rate."
            )


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


_CARD = """---
library_name: peft
---

# An adapter, trained with lit_dpo

`lit-dpo export` writes a model card: what it was trained on and how, and what was measured.

### Framework versions

"""


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT directory with the tokenizer, whole or not at all.

    `AutoPeftModelForCausalLM.from_pretrained(directory)` and `pipeline("text-generation", model=directory)` load it.
    The former loads the commit of the base that it was trained on, the latter the main branch unless given `revision=`.

    Args:
        model: the policy.
        tokenizer: goes along.
        directory: where; an adapter that is there is replaced.
        state: the adapter's weights, as in a module's `state_dict`. None: as they are in `model`. They differ where a
            callback saves averages.
        said: what the folder says of its run, in builtins, as `describe` does: `lit_dpo.json`. None: nothing.

    Raises:
        TrainingError: if something else than an adapter is in the directory, or the disk refuses.
    """
    check_writable(directory)
    with written_whole(directory) as fresh:
        # the embeddings are frozen; "auto" would ask the hub whether the vocabulary grew
        # a module's names begin with its attribute `model`, PEFT's do not
        weights = None if state is None else {name.removeprefix("model."): tensor for name, tensor in state.items()}
        fresh.mkdir(exist_ok=True)
        # PEFT puts base, tags and version in; its own card is a form of 200 lines that nobody has filled in
        (fresh / "README.md").write_text(_CARD, encoding="utf-8", newline="\n")
        # the default one alone: the other, if there is one, is a reference's
        model.save_pretrained(fresh, selected_adapters=["default"], save_embedding_layers=False, state_dict=weights)
        tokenizer.save_pretrained(fresh)
        if said is not None:
            (fresh / RECORD).write_text(json.dumps(said, indent=1, default=str) + "\n", encoding="utf-8")
