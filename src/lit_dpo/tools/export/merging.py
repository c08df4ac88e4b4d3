"""From an adapter and its base to one model on disk, with a certificate of what that changed."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lit_dpo.checkpoint import RECORD, check_finite, save_adapter
from lit_dpo.errors import LitDPOError, PolicyError, ResumeError
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.adapters import adapters_off
from lit_dpo.policy.base_model import QUICKSTART
from lit_dpo.policy.checks import as_policy_error
from lit_dpo.tools import trained as trained_things
from lit_dpo.tools.export.certificate import MAX_DRIFT, MAX_GAP, Certificate, Scores, check, drift, preferring, scores
from lit_dpo.tools.export.probe import Probe
from lit_dpo.tools.trained import Trained
from lit_dpo.writing import remove

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Before(NamedTuple):
    """What was trained, scored on its base as that was in training."""

    policy: Scores
    reference: Scores
    known: bool | None


def merge(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    given: argparse.Namespace,
    fresh: Path,
    device: torch.device,
) -> Certificate:
    """Merge into a freshly loaded base, write it, read it again, and compare what it says with what was trained.

    The base is loaded in float32 for it, so that only what is written is rounded; 4-bit weights are never merged into.

    Args:
        trained: an adapter or a checkpoint.
        tokenizer: goes along.
        probe: pairs to score.
        given: options of the command.
        fresh: a new folder, that the caller throws away if this raises.
        device: where all of it runs.

    Raises:
        LitDPOError: if the base is another one, or the merged model drifts by more than a bound.
    """
    base, same = merge_base(trained, given)
    _check_room(base, given.dtype, fresh)
    with adapter_folder(trained, tokenizer, probe, device, fresh / ".adapter") as (folder, before):
        model = _on_the_base(base, folder, device)
        untied = untie(model)
        unmerged = scores(model, probe.batches)
        with adapters_off(model):
            bare = scores(model, probe.batches)
        _write(model, base, getattr(torch, given.dtype), fresh, untied)
        del model
    gc.collect()
    tokenizer.save_pretrained(fresh)
    merged = LoRAPolicy(
        str(fresh), quantization="none", dtype="float32", trust_remote_code=given.trust_remote_code
    ).load_frozen(device)
    after = scores(merged, probe.batches)
    certificate = Certificate(
        pairs=len(after.chosen),
        completions=len(after.lengths),
        tokens=len(after.per_token),
        probe=probe.said,
        dtype=given.dtype,
        base=_said_of(base, before.known if same else same),
        trained_as=_trained_as(trained),
        rounding=drift(unmerged, after),
        gap=drift(before.policy, after),
        base_gap=drift(before.reference, bare),
        before=preferring(before.policy, before.reference),
        after=preferring(after, before.reference),
        turned=int(
            (
                (before.policy.difference > before.reference.difference)
                != (after.difference > before.reference.difference)
            ).sum()
        ),
        max_drift=MAX_DRIFT[given.dtype] if given.max_drift is None else given.max_drift,
        max_gap=(None if same else MAX_GAP) if given.max_gap is None else given.max_gap,
        untied=untied,
    )
    check(certificate)
    (fresh / CERTIFICATE).write_text(json.dumps(certificate.as_dict, indent=1) + "\n", encoding="utf-8")
    return certificate


def merge_base(trained: Trained, given: argparse.Namespace) -> tuple[LoRAPolicy, bool | None]:
    """Find the unquantised base that is merged into: the one that was trained on, or `--merge_base`.

    Returns:
        The base, and whether it is what was trained on: None where that was quantised on the disk.

    Raises:
        LitDPOError: if that is another one by its content, or it is quantised on disk.
    """
    policy = trained.policy
    quantised = getattr(policy.config(), "quantization_config", None) is not None
    mine: dict[str, Any] = {"model": policy.model, "revision": policy.revision}
    if given.merge_base:
        name, at, revision = given.merge_base, *_revision_of(given.merge_base)
        mine = {"model": at or name, "revision": revision}
    base = LoRAPolicy(
        **mine, quantization="none", dtype="float32", adapter_base="any", trust_remote_code=policy.trust_remote_code
    )
    if getattr(base.config(), "quantization_config", None) is not None:
        raise PolicyError(
            f"The weights of {base.place} are quantised, and a merge into them would be another model: name the model "
            "that they were made of with `--merge_base`."
        )
    base.fetch()
    same: bool | None = True
    if given.merge_base:
        theirs, here = policy.model_identity()["fingerprint"], base.model_identity()["fingerprint"]
        same = None if quantised else theirs == here
        if same is False and policy.adapter_base != "any":
            raise ResumeError(
                f"`--merge_base` {base.place} is another model than {policy.place}, which was trained on: its content "
                f"is {here}, not {theirs}. Leave it out, or allow it with `--adapter_base any`."
            )
    return base, same


def _revision_of(name: str) -> tuple[str, str | None]:
    from lit_dpo import hub

    return hub.split_revision(name)


@contextmanager
def adapter_folder(
    trained: Trained, tokenizer: PreTrainedTokenizerBase, probe: Probe, device: torch.device, scratch: Path
) -> Iterator[tuple[Path, Before]]:
    """Score what was trained, as it was trained, and give its adapter as a PEFT folder; a checkpoint's is `scratch`."""
    known = trained_things.check_base(trained)
    model = trained_things.load(trained, device)
    policy = scores(model, probe.batches)
    with adapters_off(model):
        reference = scores(model, probe.batches)
    folder = trained.path
    if trained.kind == "checkpoint":
        # inside what is written: a kill leaves nothing anywhere else
        folder = scratch
        save_adapter(model, tokenizer, folder)
    del model
    gc.collect()
    try:
        yield folder, Before(policy, reference, known)
    finally:
        remove(scratch)


def _on_the_base(base: LoRAPolicy, folder: Path, device: torch.device) -> Any:
    """Put the adapter on the unquantised base, float32."""
    return replace(base, adapter_path=str(folder)).load_frozen(device)


def untie(model: Any) -> bool:
    """Make two weights of embeddings and head that share one, if only one of them is changed by the adapter.

    Merged into a shared weight, what changes one of them would change both. Trained tokens change both alike.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    sides = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(side, "base_layer", side) for side in sides]
    shared: Any
    shared, other = (getattr(one, "weight", None) for one in plain)
    if shared is not other or not any(isinstance(side, LoraLayer) for side in sides):
        return False
    table: torch.Tensor = plain[0].weight
    plain[1].weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    log.warning(
        "embeddings and head share one weight in this model, and the adapter changes one of them: the merged model has "
        "two (tie_word_embeddings=false), and is larger by %s in float32",
        _size(table.numel() * 4),
    )
    return True


def _write(model: Any, base: LoRAPolicy, dtype: torch.dtype, fresh: Path, untied: bool) -> None:
    """Merge, round, and write safetensors with the base's own configuration."""
    with as_policy_error("a merged model of this adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # `untie` has seen to it
        merged = model.merge_and_unload(safe_merge=True)
        merged.to(dtype)
    check_finite(dict(merged.named_parameters()))
    config = base.config()
    with as_policy_error("a merged model of this adapter"):
        merged.save_pretrained(fresh)
    # as the base has it, but for what is new: its dropout is off in memory
    config.dtype = dtype
    config.architectures = merged.config.architectures
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        if untied and hasattr(one, "tie_word_embeddings"):
            one.tie_word_embeddings = False
    config.save_pretrained(fresh)
    for code in base.place.folder.glob("*.py"):
        shutil.copy(code, fresh / code.name)


def _check_room(base: LoRAPolicy, dtype: str, fresh: Path) -> None:
    """Say what memory and disk it takes, and refuse a disk that is too full.

    Raises:
        LitDPOError: naming both sizes.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(base.config(), trust_remote_code=base.trust_remote_code)
    count = sum(p.numel() for p in skeleton.parameters())
    written = count * _BYTES[dtype]
    log.info(
        "merging %s parameters takes %s of memory (float32), and %s on the disk",
        f"{count:,}",
        _size(count * 4),
        _size(written),
    )
    there = next(folder for folder in fresh.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(there).free) < written * 1.05:
        raise LitDPOError(f"Expected {_size(written)} of free disk in {there} but there are {_size(free)}: make room.")


def _size(count: int) -> str:
    """Write bytes as people do.

    Example:
        >>> _size(16_100_000_000)
        '16.1 GB'
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _trained_as(trained: Trained) -> str:
    policy = trained.policy
    name = policy.model if policy.model == QUICKSTART else trained_things.shown(policy.place)
    kind = {"nf4": "4-bit NF4", "int8": "8-bit LLM.int8()", "none": "unquantised"}[policy.quantization]
    return f"{name} ({kind})"


def _said_of(base: LoRAPolicy, known: bool | None) -> str:
    said: dict[bool | None, str] = {
        True: "content as in training",
        False: "another content than in training, as allowed",
        None: "content not compared: that of training is not recorded, or was quantised on the disk",
    }
    name = base.model if base.model == QUICKSTART else trained_things.shown(base.place)
    return f"{name} ({said[known]})"


def write_adapter(trained: Trained, tokenizer: PreTrainedTokenizerBase, fresh: Path, device: torch.device) -> None:
    """Write the adapter as a PEFT folder with its tokenizer; of a folder its files are taken as they are.

    Raises:
        LitDPOError: if it is no LoRA adapter that can be used, or not finite.
    """
    from safetensors.torch import load_file

    from lit_dpo import hub
    from lit_dpo.policy.adapter_checks import check_lora

    if trained.kind == "checkpoint":
        save_adapter(trained_things.load(trained, device), tokenizer, fresh, said=trained.said)
        return
    check_lora(hub.Place(trained.path, trained.name, None, "the adapter"))
    check_finite(load_file(trained.path / "adapter_model.safetensors"))
    fresh.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", RECORD):
        if (trained.path / name).is_file():
            shutil.copyfile(trained.path / name, fresh / name)
    tokenizer.save_pretrained(fresh)
