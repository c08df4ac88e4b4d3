"""What can be wrong with a trained adapter, found before weights load; each a sentence that says what to do."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lit_dpo import hub
from lit_dpo.errors import PolicyError
from lit_dpo.hub import Place
from lit_dpo.policy import files
from lit_dpo.policy.adapters import is_adapters
from lit_dpo.policy.digests import sampled_digest
from lit_dpo.policy.lora_options import PASSED_ON

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from lit_dpo.policy.base_model import BaseModel


log = logging.getLogger(__name__)

RECORD = "lit_dpo.json"
"""What an adapter's folder says of its run: the base's content, its quantisation, the loss, measures. No row's text."""


# Of PEFT's `LoraConfig`: what names and describes, and features of a layer, which act wherever it is called and are off
# with the adapter. Everything else must be as it is by default, also what a later PEFT brings.
_PLAIN_FIELDS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_dropout", "lora_bias", "fan_in_fan_out", "target_modules", "exclude_modules", "target_parameters"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config", "eva_config"),
    "trainable_token_indices",  # values that are put in the place of a table's, and left out with the adapter
    *("megatron_core", "qalora_group_size"),  # not read without fields that are refused
    *("bias", "modules_to_save"),  # refused above, in words of their own
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # how it began; others change the base


def check_adapter(policy: BaseModel, place: Place) -> LoraConfig:
    """See that the adapter can be continued and compared with; return the layers that it is for."""
    folder = place.folder
    adapter = check_lora(place)
    files.check_patterns(adapter, lambda: layer_names(policy), folder)
    check_base(policy, adapter, place)
    for field in fields(policy):
        if field.name not in PASSED_ON or field.default is MISSING:
            continue
        mine, theirs = getattr(policy, field.name), getattr(adapter, PASSED_ON[field.name])
        theirs = sorted(theirs) if isinstance(theirs, set | list) else theirs
        mine = sorted(mine) if isinstance(mine, list) else mine
        if mine not in (field.default, theirs):
            raise PolicyError(
                f"Expected `policy.{field.name}` to be left out with `adapter_path` but got {mine!r}: "
                f"the adapter in {folder} has {theirs!r}, and continues with it."
            )
    return adapter.target_modules


def check_lora(place: Place) -> LoraConfig:
    """See that the place holds a LoRA adapter that changes nothing but its layers; return its configuration."""
    from peft import PeftConfig

    folder = place.folder
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise PolicyError(f"Expected a PEFT adapter in {place} but it has no {name}: {hub.listing(place)}.")
    files.json_object(folder / "adapter_config.json")
    with files.refused(f"The adapter at `{place.option}` {place.name!r}"):
        adapter = PeftConfig.from_pretrained(str(folder))
    check_lora_config(adapter, f"in {folder}")
    files.check_values(adapter, folder)
    files.check_tensors(adapter, folder)
    return adapter


def layer_names(policy: BaseModel) -> list[str]:
    """Name all modules of the policy's model, on a skeleton without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(policy.config(), trust_remote_code=policy.trust_remote_code)
    return [name for name, _ in skeleton.named_modules()]


def check_lora_config(adapter: LoraConfig, where: str) -> None:
    """See that it is a LoRA adapter that changes nothing but its layers; `where` it is, for errors."""
    from peft import LoraConfig

    if type(adapter) is not LoraConfig:  # AdaLoRA's is a subclass
        raise PolicyError(f"Expected a LoRA adapter {where} but it is {adapter.peft_type}.")
    if adapter.bias != "none" or adapter.modules_to_save:
        raise PolicyError(
            f"The adapter {where} also trained biases or whole modules (bias={adapter.bias!r}, "
            f"modules_to_save={adapter.modules_to_save}), which turning adapters off does not undo. Merge it into "
            "its base first."
        )
    if adapter.init_lora_weights not in _PLAIN_INITS:
        raise PolicyError(
            f"The adapter {where} changes its base as it loads (init_lora_weights={adapter.init_lora_weights!r}), "
            "so policy and reference would share another base. Convert it to a plain LoRA first, see PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    for field in fields(adapter):
        given = getattr(adapter, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in _PLAIN_FIELDS and given != default and (given or default):
            raise PolicyError(
                f"The adapter {where} uses PEFT's `{field.name}` ({given!r}), which adds more than layers that can "
                "be turned off, or acts outside of them: it would be scored and compared wrongly. Merge it into its "
                "base first (PEFT's `merge_and_unload`), if it can be, or train a plain LoRA."
            )


def check_embeddings(policy: BaseModel, place: Place) -> None:
    """Whole weights that PEFT saved along with an adapter, embeddings or head, are those of the policy's base.

    PEFT does so where they have an adapter or the vocabulary was resized, and loads them over the base's.

    Raises:
        PolicyError: if they are others.
    """
    import torch
    from safetensors import safe_open

    with safe_open(place.folder / "adapter_model.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys() if _is_whole(name)}  # noqa: SIM118 - no mapping
    if not whole or not hub.has_weights(policy.place.folder):
        return
    for path in sorted(policy.place.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                # by content: of tied weights a model has one name, an adapter another
                for key in [key for key, given in whole.items() if list(given.shape) == shape]:
                    if torch.equal(file.get_tensor(name).to(whole[key].dtype), whole[key]):
                        del whole[key]
    if whole:
        names = ", ".join(key.removeprefix("base_model.model.") for key in sorted(whole)[:3])
        raise PolicyError(
            f"The adapter in {place.folder} brings whole weights that are not the base's ({names}), as after a resized "
            "vocabulary; turning adapters off does not undo them. Load both with PEFT, `merge_and_unload`, save the "
            f"model with its tokenizer, and name it in `{policy.option}.model`."
        )


def _is_whole(name: str) -> bool:
    return not is_adapters(name)


def check_base(policy: BaseModel, adapter: LoraConfig, place: Place) -> None:
    """See that the adapter was trained on the policy's base, as far as that can be seen.

    Raises:
        PolicyError: if it was trained on another one and `adapter_base` is `same`.
    """
    check_embeddings(policy, place)
    same: bool | None
    named, revision, mine = adapter.base_model_name_or_path, adapter.revision, policy.place
    if policy.adapter_base == "any":
        return
    if (named, revision) == (mine.name, mine.commit):
        _check_unchanged(policy, place)
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
        if mine.folder == theirs.folder:
            _check_unchanged(policy, place)
    if same is None:
        if hub.has_weights(mine.folder):
            _say(f"the adapter {place} names {theirs} as its base, whose weights are not here to compare")
    elif not same and named == mine.name and revision is None:
        _say(f"the adapter {place} does not say which revision of {named} it was trained on; the policy is {mine}")
    elif not same:
        raise PolicyError(
            f"The adapter at `{place.option}`, {place}, was trained on another base: {theirs}; the policy is {mine}. "
            f"Set `{policy.option}.model` and `{policy.option}.revision` to its base, or "
            f"`{policy.option}.adapter_base` to any to put it onto this one all the same."
        )


def _check_unchanged(policy: BaseModel, place: Place) -> None:
    """See that a folder still holds the base that an adapter was trained on, if the adapter's record says which."""
    mine = policy.place
    if mine.commit is not None or not (place.folder / RECORD).is_file():
        return
    try:
        base = json.loads((place.folder / RECORD).read_text(encoding="utf-8"))["base"]
        theirs = str(base["fingerprint"])
    except (ValueError, LookupError, TypeError):  # a stranger's
        return
    if not theirs.startswith("sha256 ") or not hub.has_weights(mine.folder):
        return
    if (here := sampled_digest(mine.folder)) != theirs:
        raise PolicyError(
            f"The adapter at `{place.option}`, {place}, was trained on {mine}, which has other weights now: the "
            f"content was {theirs} and is {here}. Restore them, or set `{policy.option}.adapter_base` to any to put it "
            "onto these all the same."
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


def check_adapter_keys(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """See that a file has all of an adapter: what it lacks, peft fills with fresh weights and a warning."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        given = {name for name in file.keys() if not _is_whole(name)}  # noqa: SIM118 - others: `check_embeddings`
    there = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if different := sorted(given ^ set(there)):
        raise PolicyError(
            f"The adapter in {folder} does not fit the model: {', '.join(different[:3])} on one side only."
        )
