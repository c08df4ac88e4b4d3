"""A policy of a model that the user already holds: adapters are put on it, or its own are taken."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.errors import PolicyError, first_line
from lit_dpo.hub import Place
from lit_dpo.policy import adapter_checks, checks, lora_options
from lit_dpo.policy.adapters import adapter_parameters, is_adapters
from lit_dpo.policy.lora import LoRAPolicy

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SAYS_ITSELF = ("model", "quantization", "double_quantization", "adapter_path", "adapter_base", "dtype")


@dataclass
class _Held:
    """What was given, and what is known of it from then; training changes the adapter in place."""

    base: PreTrainedModel
    adapted: PeftModel | None
    tokenizer: PreTrainedTokenizerBase | None
    adapter_digest: str | None
    does_something: bool
    loaded: bool = False


@dataclass(frozen=True)
class HeldPolicy(LoRAPolicy):
    """What `LoRAPolicy.from_model` makes; its fields say what the model is.

    Checkpoints know the model by a digest of its weights in memory: a run continues on the same weights, wherever they
    come from. No file can build the model again: whatever loads a checkpoint is given such a policy.
    """

    @classmethod
    def of(
        cls, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> HeldPolicy:
        """See `LoRAPolicy.from_model`."""
        from peft import PeftModel

        if options.get("shard", "none") != "none":
            raise PolicyError(
                "`shard` is for a base that is read in shards; a model that is loaded already is whole on every rank. "
                "Give its name or directory: `LoRAPolicy(name, shard=…)`."
            )
        if given := sorted({*_SAYS_ITSELF, "trust_remote_code"} & options.keys()):
            raise PolicyError(f"`{given[0]}` has no effect on a model that is loaded already: leave it out.")
        base, adapted = (model.get_base_model(), model) if isinstance(model, PeftModel) else (model, None)
        _check_model(base, adapted)
        if adapted is not None and (given := sorted(lora_options.PASSED_ON.keys() & options.keys())):
            raise PolicyError(f"`{given[0]}` has no effect on a model with an adapter: its own holds. Leave it out.")
        name = str(getattr(base, "name_or_path", "") or type(base).__name__)
        said = {"dtype": str(base.dtype).removeprefix("torch."), **checks.quantization_of(base)}
        policy = cls(name, **said, **options)
        found = {} if adapted is None else adapter_parameters(adapted)
        # no field: neither copied, compared, printed nor saved with the others
        vars(policy)["held"] = _Held(
            base,
            adapted,
            tokenizer,
            adapter_digest=_digest(found.items(), whole=True) if found else None,
            does_something=any(("lora_B" in name and bool(p.any())) or "tokens" in name for name, p in found.items()),
        )
        return policy

    def __deepcopy__(self, memo: Any) -> HeldPolicy:
        """Return the same: it is frozen, and a copy would be a second model in memory."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Other processes get the fields alone."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _given(self) -> _Held:
        if "held" not in vars(self):
            raise PolicyError(
                f"{self.model!r} was given as an object, which no file holds. Load the same model again and give it: "
                "`DPOModule.load_from_checkpoint(path, policy=LoRAPolicy.from_model(model))`."
            )
        found: _Held = vars(self)["held"]
        return found

    @property
    def starts_from_adapter(self) -> bool:
        """Whether the model came with an adapter that does something: it is the reference then."""
        held: _Held | None = vars(self).get("held")
        return held is not None and held.does_something

    def check_model(self, *, weights: bool = True) -> None:
        """See that the model is there, and one that can be scored; that was seen as it was given."""
        self._given()
        checks.check_attention(self.attention)

    def check(self, *, weights: bool = True) -> None:
        """As of a policy that loads its model, but for an adapter of its own."""
        if self._given().adapted is None:
            super().check(weights=weights)
        else:
            self.check_model(weights=weights)

    def fetch(self) -> None:
        """Nothing is downloaded."""

    def config(self) -> PreTrainedConfig:
        """Return a copy of the model's."""
        return copy.deepcopy(self._given().base.config)

    @cached_property
    def place(self) -> Place:
        """No folder; the name that the model came with, and the revision that was given: exported adapters say them."""
        return Place(Path("(a model in memory)"), self.model, self.revision, f"{self.option}.model")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the one that was given, or that of the model's name."""
        from transformers import AutoTokenizer

        if (tokenizer := self._given().tokenizer) is not None:
            return tokenizer
        try:
            return AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"No tokenizer for {self.model!r}: {first_line(error)}. Give it too: "
                "`LoRAPolicy.from_model(model, tokenizer=tokenizer)`."
            ) from error

    def load_base(self, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> PreTrainedModel:
        """Return the model itself, once; without dropout, on `device`."""
        held = self._given()
        if held.loaded:
            raise PolicyError(f"{self.model!r} is another module's policy already. Load the model again and give that.")
        assert self.model_identity()  # of the weights as they were given
        held.loaded, base = True, held.base
        if base.device != device:
            base.to(device)
        if self.attention not in ("auto", "pairs"):
            base.set_attn_implementation(self.attention)
        checks.turn_off_dropout(base.config)
        _turn_off_dropout(base)
        checks.keep_trainable(base)
        if self.quantization == "nf4":
            from lit_dpo.policy.sliced import multiply_in_slices

            multiply_in_slices(base)
        return base.requires_grad_(False)

    def put_adapters(self, base: PreTrainedModel) -> PeftModel:
        """Take the user's adapter, float32 and trainable; or put fresh ones on."""
        if (adapted := self._given().adapted) is None:
            return super().put_adapters(base)
        for parameter in adapter_parameters(adapted).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return adapted

    def lora_config(self) -> LoraConfig:
        """Of the adapter that the model came with, or of fresh ones by the fields."""
        adapted = self._given().adapted
        return super().lora_config() if adapted is None else copy.deepcopy(adapted.peft_config["default"])

    def model_identity(self) -> dict[str, Any]:
        """Digest samples of the weights, as they were given."""
        return {"model": self.model, "revision": self.revision, "fingerprint": self._sampled, **self._quantised()}

    def model_content(self) -> dict[str, Any]:
        """Digest every byte of the weights."""
        return {"weights": f"memory {_digest(_weights(self._given().base), whole=True)}", **self._quantised()}

    def adapter_digest(self) -> str | None:
        """Of the adapter that the model came with, as it was given."""
        return self._given().adapter_digest

    @cached_property
    def _sampled(self) -> str:
        return f"memory {_digest(_weights(self._given().base), whole=False)}"


def _check_model(base: PreTrainedModel, adapted: Any) -> None:
    """See that it is a causal language model on one device, with one LoRA adapter or none."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        raise PolicyError(f"Expected a transformers or PEFT model but got a {type(base).__name__}.")
    checks.check_causal(base.config, type(base).__name__)
    if len(places := {str(p.device) for p in base.parameters()}) > 1 or "meta" in places:
        raise PolicyError(f"Expected a model on one device but its weights are on {', '.join(sorted(places))}.")
    _check_whole(base)
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if adapted is None:
        if layers:
            raise PolicyError(
                f"{type(base).__name__} has adapters inside already, of PEFT or of a policy that was made of it. Give "
                "the `PeftModel`, or load the model again."
            )
        return
    if sorted(adapted.peft_config) != ["default"]:
        raise PolicyError(f"Expected one adapter named default but the model has {', '.join(adapted.peft_config)}.")
    adapter_checks.check_lora_config(adapted.peft_config["default"], "of the model")
    if any(layer.merged for layer in layers):
        raise PolicyError("The model's adapter is merged into its weights: `unmerge_adapter()` first.")


def _check_whole(base: PreTrainedModel) -> None:
    """See that this process has all of each weight."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):  # then none can be in pieces
        return
    from torch.distributed.tensor import DTensor

    sharded = next((name for name, p in base.named_parameters() if isinstance(p, DTensor)), None)
    # older releases of transformers keep the parts as plain tensors, and say only how many there are
    if sharded or (getattr(base, "tp_size", None) or 1) > 1:
        raise PolicyError(
            f"Expected a model with whole weights but its {sharded or 'layers'!r} is spread over devices: was it "
            "loaded with `tp_plan`? Devices of a tensor group would be given different batches, and adapters on "
            'row-wise layers fail. Load it without; `LoRAPolicy(…, shard="node")` spreads a base that does not fit.'
        )


def _turn_off_dropout(base: PreTrainedModel) -> None:
    """Layers have read it from the configuration; an adapter's own dropout stays."""
    own = {id(layer) for name, layer in base.named_modules() if "lora_dropout" in name}
    for module in base.modules():
        for name, value in vars(module).items():
            named = re.search(r"drop(out)?($|_)|jitter", name) or (name == "p" and "Dropout" in type(module).__name__)
            if named and isinstance(value, float) and value > 0 and id(module) not in own:
                setattr(module, name, 0.0)


def _weights(base: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Of the base alone, by the names that they have without adapters."""
    for name, tensor in base.state_dict().items():
        if not is_adapters(name) and hasattr(tensor, "detach"):
            yield name.replace(".token_adapter", "").replace(".base_layer", ""), tensor


def _digest(weights: Any, *, whole: bool) -> str:
    """Of tensors with names; or of evenly spaced numbers of each, thousands of them."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(weights):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not whole and flat.numel() > 2**14:
            flat = flat[torch.linspace(0, flat.numel() - 1, 2**14, dtype=torch.float64).long().to(flat.device)]
        digest.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
