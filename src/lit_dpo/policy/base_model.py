"""A base model, with a trained adapter or without: where it is, how it loads, what it is.

Policies and references have one. The only file that knows how transformers and bitsandbytes load.
"""

from __future__ import annotations

import logging
from abc import ABC
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from lit_dpo import hub
from lit_dpo.errors import PolicyError, first_line
from lit_dpo.policy import adapter_checks, checks, files
from lit_dpo.policy.devices import default_dtype
from lit_dpo.policy.digests import sampled_digest, whole_digest
from lit_dpo.policy.heap import returned_at_once
from lit_dpo.policy.layerwise import NotInLayersError, load_in_layers
from lit_dpo.policy.sharding import as_if_whole, shard
from lit_dpo.policy.shared import base_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

QUICKSTART = "lit-dpo/quickstart"
"""The built-in model id: made on first use, see `lit_dpo.quickstart`."""


@dataclass(frozen=True)
class BaseModel(ABC):
    """A causal language model, quantised or not, and an adapter on it that was trained before, if there is one.

    Building one costs nothing; `check_model` reads configuration files only; `load_frozen` loads weights.

    Args:
        model: hub id or directory of a causal language model in safetensors; `lit-dpo/quickstart` is built in.
        revision: branch, tag or commit of a hub id.
        quantization: `nf4` (4 bits), `int8`, or `none`. A checkpoint that bitsandbytes has quantised must say the same.
        double_quantization: quantise the NF4 scales too, 0.37 bits less per weight. False is refused where there are
            no such scales.
        adapter_path: a trained LoRA adapter on it: a PEFT directory, or `organisation/name` or
            `organisation/name@revision` of the hub.
        adapter_base: `same` refuses adapters that were trained on another base; `any` takes them.
        dtype: of everything that is not quantised, and of computation; `auto` is float32 on a CPU (bfloat16 is tens of
            times slower there), on a GPU bfloat16, on an old one float16.
        attention: `auto` (the flat row where a start-up probe finds it exact, else padded rows), `pairs` (the flat row
            or an error), or a transformers implementation such as `sdpa`, `eager`, `flash_attention_2` (padded rows).
        trust_remote_code: run code that comes with the model.

    Raises:
        PolicyError: for a value outside its domain, or fields that contradict each other.
    """

    option: ClassVar[str] = "policy"
    """What the fields are called in configuration files, for errors: `policy.model`."""

    model: str
    revision: str | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    adapter_path: str | None = None
    adapter_base: Literal["same", "any"] = "same"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if hasattr(self.model, "named_parameters"):
            raise PolicyError(
                f"Expected `{self.option}.model` to be a name or a directory but got a {type(self.model).__name__}. "
                "`LoRAPolicy.from_model(model)` makes a policy of a model."
            )
        self._check_choices(BaseModel)
        if self.quantization != "nf4" and not self.double_quantization:
            raise PolicyError(
                f"`double_quantization` has no effect with quantization={self.quantization}: leave it out."
            )

    def _check_choices(self, of: type) -> None:
        """Of a class's fields, those with a list of values have one of them."""
        for name, kind in get_type_hints(of).items():
            if get_origin(kind) is Literal and getattr(self, name) not in (allowed := get_args(kind)):
                raise PolicyError(f"Expected `{name}` among {', '.join(allowed)} but got {getattr(self, name)!r}.")

    def check_model(self, *, weights: bool = True) -> None:
        """Find what would fail while loading, in seconds: weights are neither loaded nor downloaded.

        Args:
            weights: whether they must be there.

        Raises:
            PolicyError: naming the directory, file or field, and what there is instead.
        """
        config = self.config()
        if weights:
            checks.check_weights(self.place)
        checks.check_causal(config, self.model)
        checks.check_no_adapter_inside(self, self.place)
        checks.check_prequantized(self, config)
        checks.check_attention(self.attention)
        if weights:
            files.check_widths(config, self.place.folder, self.trust_remote_code)
        if self.quantization != "none":
            checks.check_bitsandbytes(self.quantization)
        if self.adapter_path is not None:
            targets = adapter_checks.check_adapter(self, self.adapter_place)
            checks.check_targets(config, targets, self.trust_remote_code)

    def load_frozen(self, device: torch.device | str = "cpu", mesh: DeviceMesh | None = None) -> PreTrainedModel:
        """Load the base, with the adapter of `adapter_path` if there is one, frozen and in evaluation mode.

        Args:
            device: where the weights go as they are read.
            mesh: the ranks among which it is sharded, all of which load at the same time. None: it is whole.

        Raises:
            PolicyError: if the model or adapter cannot be loaded, or its layers are not quantised as asked.
        """
        import torch

        self.fetch()
        self.check_model()
        with checks.default_dtype(torch.float32):
            model = self.load_base(torch.device(device), self.torch_dtype(torch.device(device)), mesh)
            if self.adapter_path is not None:
                model = self.load_adapter(model, trainable=False)
        checks.check_quantized(model, self.quantization)
        model.requires_grad_(False).eval()
        if mesh is not None:
            shard(model, mesh)
        return model

    def load_base(self, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> PreTrainedModel:
        """Load the model alone: a transformers model on `device`, without dropout; see `lit_dpo.policy.shared`."""
        if mesh is not None:
            return self._load_base(device, dtype, mesh)
        return base_of(self._sharing_key(device, dtype), device, lambda: self._load_base(device, dtype))

    def _sharing_key(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """All that decides what is loaded, and what a run leaves on it; None for a class that may do more with it."""
        if not type(self).__module__.startswith("lit_dpo."):
            return None
        left = tuple(getattr(self, name, None) for name in ("gradient_checkpointing", "kernels"))
        options = (self.quantization, self.double_quantization, self.attention, self.trust_remote_code)
        return (type(self), self.place, device, dtype, *options, *left)

    def _load_base(self, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> PreTrainedModel:
        config = self.config()
        checks.turn_off_dropout(config)
        quantization = self.quantization_config(dtype)
        options = {
            "dtype": dtype,
            "quantization_config": None if checks.keep_quantized(config, dtype) else quantization,
            **({} if self.attention in ("auto", "pairs") else {"attn_implementation": self.attention}),
            "trust_remote_code": self.trust_remote_code,
        }
        with checks.as_policy_error(f"the model {self.model!r}"), returned_at_once():
            base, info = self._read(config, device, mesh, options)
        checks.check_complete(info, self.model)
        checks.turn_off_dropout_layers(base)
        checks.keep_trainable(base)
        if self.quantization == "nf4":
            from lit_dpo.policy.sliced import multiply_in_slices

            multiply_in_slices(base)
        base.name_or_path = base.config.name_or_path = self.place.name  # for model cards: not a folder of the cache
        return base

    def _read(
        self, config: PreTrainedConfig, device: torch.device, mesh: DeviceMesh | None, options: dict[str, Any]
    ) -> tuple[PreTrainedModel, Any]:
        """Read the weights: whole, or, where they are to be sharded, a few layers at a time."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        if mesh is not None:
            try:
                base, info = load_in_layers(self.place.folder, config, device, mesh, **options)
            except NotInLayersError as error:
                log.warning("%s is read whole before it is sharded, on every rank: %s", self.model, error)
            else:
                with suppress(OSError):  # else what the configuration says
                    base.generation_config = GenerationConfig.from_pretrained(self.path)
                return base, info
        options = {"device_map": {"": device}, "use_safetensors": True, "output_loading_info": True, **options}
        read: tuple[PreTrainedModel, Any] = AutoModelForCausalLM.from_pretrained(self.path, config=config, **options)
        return read

    def load_adapter(self, base: PreTrainedModel, *, trainable: bool) -> PeftModel:
        """Put the adapter of `adapter_path` on the model: a `peft.PeftModel`."""
        from peft import PeftConfig, PeftModel, get_peft_model

        folder = self.adapter_place.folder
        with checks.as_policy_error(f"the adapter {self.adapter_path!r}"):
            if any(hasattr(p, "to_local") for p in base.parameters()):  # in shards: shapes first, and then the numbers
                described = PeftConfig.from_pretrained(folder)
                described.inference_mode = not trainable
                with as_if_whole(base):
                    model = get_peft_model(base, described)
                model.load_adapter(folder, "default", is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
        adapter_checks.check_adapter_keys(model, folder)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer, or the adapter's where it brought its own (with its chat template)."""
        from transformers import AutoTokenizer

        self.config()
        if self.adapter_path is not None:
            adapter = self.adapter_place.folder
            if (adapter / "tokenizer_config.json").is_file():
                with checks.as_policy_error(f"the tokenizer of the adapter {self.adapter_path!r}"):
                    return AutoTokenizer.from_pretrained(adapter, trust_remote_code=self.trust_remote_code)
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # a stranger's file meets any line of a library
            checks.check_weights(self.place)  # a directory that is no model is a clearer message
            raise PolicyError(f"No tokenizer for {self.model!r}: {first_line(error)}") from error

    @property
    def path(self) -> str:
        """What transformers is given: a directory, of a hub id that of its commit in the cache."""
        return str(self.place.folder)

    @cached_property
    def place(self) -> hub.Place:
        """Where the model is. A hub id is resolved once, so that all parts of a run see one commit."""
        name = self.model
        if name == QUICKSTART:
            from lit_dpo.quickstart import quickstart_directory

            name = str(quickstart_directory() / "model")
        return hub.locate_weights(hub.locate(name, self.revision, f"{self.option}.model"), self.revision)

    @cached_property
    def adapter_place(self) -> hub.Place:
        """Where the adapter of `adapter_path` is, likewise."""
        assert self.adapter_path is not None
        return hub.locate_adapter(self.adapter_path, f"{self.option}.adapter_path")

    def fetch(self) -> None:
        """Download a hub id's weights, unless they are there; a PolicyError says why they do not come through."""
        hub.fetch_weights(self.place)

    def torch_dtype(self, device: torch.device, auto: torch.dtype | None = None) -> torch.dtype:
        """Return the dtype of computation on `device`."""
        import torch

        found = (auto or default_dtype(device)) if self.dtype == "auto" else getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def model_identity(self) -> dict[str, Any]:
        """Say what a checkpoint of adapters must be put back onto: the base's content, not its place, and quantisation.

        A hub id and a copy of it in a directory have one fingerprint; two commits of a hub id differ in any case.
        """
        self.fetch()
        place = self.place
        return {
            "model": self.model,
            "revision": self.revision,
            **({} if place.commit is None else {"commit": place.commit}),
            "fingerprint": sampled_digest(place.folder),
            **self._quantised(),
        }

    def model_content(self) -> dict[str, Any]:
        """Say what decides the base's log-probs besides dtypes: every byte, or a hub id's commit, and quantisation."""
        place = self.place
        return {
            "weights": whole_digest(place.folder) if place.commit is None else f"commit {place.commit}",
            **self._quantised(),
        }

    def _quantised(self) -> dict[str, Any]:
        double = self.quantization == "nf4" and self.double_quantization
        return {"quantization": self.quantization, "double_quantization": double}

    def adapter_content(self, path: str) -> str:
        """Digest every byte of an adapter, in a directory or of a hub id.

        Raises:
            PolicyError: if it has no safetensors.
        """
        folder = hub.locate_adapter(path, "adapter_path").folder
        if not any(folder.glob("*.safetensors")):
            raise PolicyError(
                f"Expected the adapter {path!r} to be a directory with *.safetensors: of anything else the content is "
                "not known, so nothing can be cached."
            )
        return whole_digest(folder)

    def adapter_digest(self) -> str | None:
        """Digest the adapter that is continued; None for a fresh one."""
        return None if self.adapter_path is None else sampled_digest(self.adapter_place.folder)

    def config(self) -> PreTrainedConfig:
        """Read the model's configuration, as transformers reads it.

        Raises:
            PolicyError: if there is none.
        """
        place = self.place
        if not (place.folder / "config.json").is_file():
            advice = ""
            if (place.folder / "adapter_config.json").is_file():
                name = self.option
                advice = f" That is an adapter: give it to `{name}.adapter_path`, and its base to `{name}.model`."
            there = hub.listing(place)
            raise PolicyError(f"Expected a model in {place} but it has no config.json; it holds {there}.{advice}")
        values = files.json_object(place.folder / "config.json")
        files.check_size(values, place.folder)
        try:
            return files.model_config(place.folder, values, self.trust_remote_code)
        except Exception as error:  # a stranger's file meets any line of a library
            if "trust_remote_code" in str(error):
                raise PolicyError(
                    f"{self.model!r} comes with code of its own, in {place.folder}: read it, then set "
                    f"`{self.option}.trust_remote_code` to run it."
                ) from error
            raise PolicyError(f"No model configuration for {self.model!r}: {first_line(error)}") from error

    def quantization_config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """Return what transformers needs to quantise while it loads; None for `none`."""
        if self.quantization == "none":
            return None
        from transformers import BitsAndBytesConfig

        if self.quantization == "int8":
            # it says so at every product; once is enough, and it is documented here
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
