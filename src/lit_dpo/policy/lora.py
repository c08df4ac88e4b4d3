"""The policy: a base model in 4 bits, 8 bits or full precision, with LoRA adapters that are the only thing trained.

The only file that knows how peft makes adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_dpo.errors import PolicyError
from lit_dpo.policy import checks
from lit_dpo.policy.base_model import BaseModel
from lit_dpo.policy.kernels import use_kernels

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoRAPolicy(BaseModel):
    """What is trained: a frozen base model and LoRA adapters (arXiv 2106.09685), NF4 by default (arXiv 2305.14314).

    Building one costs nothing; `check` reads configuration files only; `load` loads weights.

    Args:
        model: hub id or directory of a causal language model in safetensors; `lit-dpo/quickstart` is built in.
        revision: branch, tag or commit of a hub id.
        quantization: `nf4` (4 bits), `int8`, or `none`. A checkpoint that bitsandbytes has quantised must say the same.
        double_quantization: quantise the NF4 scales too, 0.37 bits less per weight. False is refused where there are
            no such scales.
        adapter_path: a trained LoRA adapter to continue: a PEFT directory, or `organisation/name` or
            `organisation/name@revision` of the hub; its own rank, scale and layers then hold.
        adapter_base: `same` refuses adapters, a reference's too, that were trained on another base; `any` takes them.
        dtype: of everything that is not quantised, and of computation; `auto` is float32 on a CPU (bfloat16 is tens of
            times slower there), on a GPU bfloat16, on an old one float16. Adapters and log-probs are float32 always.
        attention: `auto` (the flat row where a start-up probe finds it exact, else padded rows), `pairs` (the flat row
            or an error), or a transformers implementation such as `sdpa`, `eager`, `flash_attention_2` (padded rows).
        trust_remote_code: run code that comes with the model.
        r: LoRA rank.
        alpha: LoRA scale; updates are multiplied by `alpha / r`.
        dropout: on the adapters' input while training. The base's own dropouts are always off.
        target_modules: names (or suffixes) of the layers that get an adapter, a regular expression, or `all-linear`
            for all linear layers but the head.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.
        kernels: `auto` takes Liger's on a CUDA device, where they are installed (the extra `kernels`), know the
            architecture and a start-up probe finds them exact; elsewhere it does nothing. `none` leaves them out.

    Raises:
        PolicyError: for a value outside its domain, or fields that contradict each other.

    Example:
        >>> LoRAPolicy("facebook/opt-350m", r=16, alpha=16, dropout=0.1, target_modules=["q_proj", "v_proj"]).r
        16
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    gradient_checkpointing: bool = False
    kernels: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        super().__post_init__()
        self._check_choices(LoRAPolicy)
        if not self.target_modules:
            raise PolicyError("Expected `target_modules` to name layers but it is empty; `all-linear` takes all.")
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise PolicyError(
                "Expected `r` >= 1, `alpha` > 0 and `dropout` in [0, 1) but got "
                f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}."
            )

    def check(self, *, weights: bool = True) -> None:
        """Find what would fail while loading, in seconds: weights are neither loaded nor downloaded.

        Args:
            weights: whether they must be there.

        Raises:
            PolicyError: naming the directory, file, field or layer, and what there is instead.
        """
        self.check_model(weights=weights)
        if self.adapter_path is None and self.target_modules != "all-linear":
            checks.check_targets(self.config(), self.target_modules, self.trust_remote_code)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The policy with its adapters, in training mode, on `device`.

        Args:
            device: where the weights go as they are read.
            dtype: what `auto` means here, instead of the device's own.

        Returns:
            A `peft.PeftModel`; only its adapters, float32, require gradients.

        Raises:
            PolicyError: if the model or adapter cannot be loaded, or its layers are not quantised as asked.
        """
        import torch

        self.fetch()
        self.check()  # with the weights there, their content can be compared with what an adapter names
        dtype = self.torch_dtype(torch.device(device), dtype)
        with checks.default_dtype(torch.float32):  # else new adapters would be rounded
            return self._load(torch.device(device), dtype)

    def _load(self, device: torch.device, dtype: torch.dtype) -> Any:
        from peft import get_peft_model

        base = self.load_base(device, dtype)
        if self.kernels == "auto":
            use_kernels(base)
        if self.adapter_path is not None:
            model = self.load_adapter(base, trainable=True)
        else:
            model = get_peft_model(base, self.lora_config())
        checks.check_quantized(model, self.quantization)
        # an exported adapter names what it was trained on, at the commit: AutoPeftModel loads that
        model.peft_config["default"].base_model_name_or_path = self.place.name
        model.peft_config["default"].revision = self.place.commit
        if self.gradient_checkpointing:
            checks.enable_checkpointing(base)
        return model.train()

    def lora_config(self) -> Any:
        """PEFT's description of the adapters: of fresh ones by the fields, else that of `adapter_path`."""
        from peft import LoraConfig, PeftConfig

        if self.adapter_path is not None:
            found = PeftConfig.from_pretrained(self.adapter_place.folder)
            found.inference_mode = False  # as it was saved, it would not train
            return found
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type, unused-ignore]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            bias="none",  # a trained bias outlives "adapters off", and the reference would drift with it
            task_type="CAUSAL_LM",
        )

    def checkpoint_identity(self) -> dict[str, Any]:
        """What a checkpoint of adapters must be put back onto: `model_identity`."""
        return self.model_identity()

    def cache_identity(self) -> dict[str, Any]:
        """What decides the base's log-probs besides dtypes: `model_content`."""
        return self.model_content()
