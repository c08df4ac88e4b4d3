"""What can be wrong with a trained adapter, found before weights load; each a sentence that says what to do."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_dpo import hub
from lit_dpo.errors import PolicyError
from lit_dpo.fingerprints import sampled_digest
from lit_dpo.hub import Place
from lit_dpo.policy_checks import first_line

log = logging.getLogger(__name__)

_LORA_FIELDS = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}


def check_adapter(policy: Any, place: Place) -> Any:
    """The adapter is one that can be continued and compared with; returns the layers that it is for."""
    folder = place.folder
    adapter = check_lora(place)
    check_base(policy, adapter, place)
    for field in fields(policy):
        if field.name not in _LORA_FIELDS or field.default is MISSING:
            continue
        mine, theirs = getattr(policy, field.name), getattr(adapter, _LORA_FIELDS[field.name])
        theirs = sorted(theirs) if isinstance(theirs, set | list) else theirs
        mine = sorted(mine) if isinstance(mine, list) else mine
        if mine not in (field.default, theirs):
            raise PolicyError(
                f"Expected `policy.{field.name}` to be left out with `adapter_path` but got {mine!r}: "
                f"the adapter in {folder} has {theirs!r}, and continues with it."
            )
    return adapter.target_modules


def check_lora(place: Place) -> Any:
    """The place holds a LoRA adapter that changes nothing but its layers; returns its configuration."""
    from peft import LoraConfig, PeftConfig

    folder = place.folder
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise PolicyError(f"Expected a PEFT adapter in {place} but it has no {name}: {hub.listing(place)}.")
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise PolicyError(f"No adapter at `{place.option}` {place.name!r}: {first_line(error)}") from error
    if not isinstance(adapter, LoraConfig):
        raise PolicyError(f"Expected a LoRA adapter in {folder} but it is {adapter.peft_type}.")
    if adapter.bias != "none" or adapter.modules_to_save:
        raise PolicyError(
            f"The adapter in {folder} also trained biases or whole modules (bias={adapter.bias!r}, "
            f"modules_to_save={adapter.modules_to_save}), which turning adapters off does not undo. Merge it into "
            "its base first."
        )
    if adapter.init_lora_weights not in (True, False, "gaussian"):
        raise PolicyError(
            f"The adapter in {folder} changes its base as it loads (init_lora_weights={adapter.init_lora_weights!r}), "
            "so policy and reference would share another base. Convert it to a plain LoRA first, see PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    return adapter


def check_base(policy: Any, adapter: Any, place: Place) -> None:
    """The adapter was trained on the policy's base, as far as that can be seen.

    Raises:
        PolicyError: if it was trained on another one and `adapter_base` is `same`.
    """
    same: bool | None
    named, revision, mine = adapter.base_model_name_or_path, adapter.revision, policy.place
    if policy.adapter_base == "any" or (named, revision) == (mine.name, mine.commit):
        return
    if not named or not (Path(named).expanduser().is_dir() or hub.looks_like_id(named)):
        base = named or "a base that it does not name"
        _say(f"the adapter {place} was trained on {base}, which is not here to compare with the policy's")
        return
    asks = mine.commit is not None  # what is local asks no hub
    try:
        at = None if Path(named).expanduser().is_dir() else revision
        theirs = hub.locate(named, at, "base_model_name_or_path", ask=asks)
    except PolicyError as error:
        if not asks or named == mine.name:
            why = str(error) if asks else "it is not on this machine"
            _say(f"the adapter {place} was trained on {named}, which cannot be compared with the policy's base: {why}")
            return
        theirs, same = hub.Place(Path(), named, revision, place.option), False
    else:
        same = _same_base(mine, theirs)
    if same is None:
        if hub.has_weights(mine.folder):
            _say(f"the adapter {place} names {theirs} as its base, whose weights are not here to compare")
    elif not same and named == mine.name and revision is None:
        _say(f"the adapter {place} does not say which revision of {named} it was trained on; the policy is {mine}")
    elif not same:
        raise PolicyError(
            f"The adapter at `{place.option}`, {place}, was trained on another base: {theirs}; the policy is {mine}. "
            "Set `policy.model` and `policy.revision` to its base, or `policy.adapter_base` to any to put it onto this "
            "one all the same."
        )


def _same_base(mine: Place, theirs: Place) -> bool | None:
    """By the content of their files; None if what would tell is not on this machine."""
    if mine.folder == theirs.folder:
        return True
    both = mine.commit is not None and theirs.commit is not None
    if both:
        with suppress(PolicyError):  # without the hub, what is in its cache decides
            return hub.same_files(mine, theirs)
    if hub.has_weights(mine.folder) and hub.has_weights(theirs.folder):
        return sampled_digest(mine.folder) == sampled_digest(theirs.folder)
    return False if both else None


@lru_cache(maxsize=256)
def _say(line: str) -> None:
    """Once in a process: checks run before training and while loading."""
    log.info("%s", line)


def check_adapter_keys(model: Any, folder: Path, adapter: str = "default") -> None:
    """What a file lacks, peft fills with fresh weights and a warning."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        given = set(file.keys())
    there = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if different := sorted(given ^ set(there)):
        raise PolicyError(
            f"The adapter in {folder} does not fit the model: {', '.join(different[:3])} on one side only."
        )
