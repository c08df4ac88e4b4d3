"""The policy: a base model in 4 bits, 8 bits or full precision, with LoRA adapters that are the only thing trained.

The only file that knows how peft makes adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_dpo.errors import PolicyError
from lit_dpo.policy import checks, lora_options
from lit_dpo.policy.base_model import BaseModel
from lit_dpo.policy.kernels import use_kernels
from lit_dpo.policy.sharding import as_if_whole, shard

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


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
        use_rslora: scale by `alpha / sqrt(r)` instead, for large ranks (arXiv 2312.03732).
        use_dora: train the length of each weight's columns too (DoRA, arXiv 2402.09353); slower.
        init_lora_weights: how A begins, uniform (true) or `gaussian`. B begins at 0: a fresh adapter does nothing.
        rank_pattern: other ranks, by name or regular expression of layers: `{q_proj: 32}`.
        alpha_pattern: other scales, likewise.
        exclude_modules: names of layers, or a regular expression, that get no adapter after all.
        layers_to_transform: the numbers of the layers that get adapters, for `target_modules` that are a list.
        layers_pattern: what the list of layers is called, where PEFT does not know.
        target_parameters: names of parameters that get adapters, as experts have that are no layers:
            `mlp.experts.gate_up_proj`. Without quantisation, dropout and DoRA.
        trainable_token_indices: ids of tokens whose embeddings train too, as of new tokens; a head that shares them
            changes along. The reference keeps the base's.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.
        kernels: `auto` takes Liger's on a CUDA device, where they are installed (the extra `kernels`), know the
            architecture and a start-up probe finds them exact; elsewhere it does nothing. `none` leaves them out.
        shard: `all` keeps of every frozen layer a part on each rank, and gathers layers as they run; `node` does so
            among the ranks of one machine; `none` keeps the base whole on every rank. Adapters and head are whole. For
            strategy `ddp`; with one process it does nothing, in a line that says so.

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
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    gradient_checkpointing: bool = False
    kernels: Literal["auto", "none"] = "auto"
    shard: Literal["none", "node", "all"] = "none"

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        super().__post_init__()
        self._check_choices(LoRAPolicy)
        lora_options.check_values(self)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any = None, **options: Any) -> LoRAPolicy:
        """Make a policy of a model that is loaded already; the model becomes the policy's, and is changed.

        Args:
            model: a transformers model for causal language modelling, quantised by bitsandbytes or not, or a
                `peft.PeftModel` with one LoRA adapter named `default`, which is continued then.
            tokenizer: the model's; by default that of the name that it was loaded from.
            **options: fields of `LoRAPolicy` that say how to train: `r`, `target_modules`, `gradient_checkpointing`, …;
                and `revision`, if it was loaded from one, for exported adapters to say it.

        Returns:
            The policy. Checkpoints of it belong to these weights, and do not build the model again: see `HeldPolicy`.

        Raises:
            PolicyError: for a model that cannot be scored or compared with, or an option that would have no effect.
        """
        from lit_dpo.policy.held import HeldPolicy

        if not issubclass(HeldPolicy, cls) and not issubclass(cls, HeldPolicy):
            raise PolicyError(f"{cls.__name__} loads a model of its own: make `from_model` policies of `HeldPolicy`.")
        return (cls if issubclass(cls, HeldPolicy) else HeldPolicy).of(model, tokenizer, **options)

    def check(self, *, weights: bool = True) -> None:
        """Find what would fail while loading, in seconds: weights are neither loaded nor downloaded.

        Args:
            weights: whether they must be there.

        Raises:
            PolicyError: naming the directory, file, field or layer, and what there is instead.
        """
        self.check_model(weights=weights)
        if self.adapter_path is None:
            if self.target_modules and self.target_modules != "all-linear":
                checks.check_targets(self.config(), self.target_modules, self.trust_remote_code)
            lora_options.check_choices(self, self.config())

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, mesh: DeviceMesh | None = None
    ) -> PeftModel:
        """Load the policy with its adapters, in training mode, on `device`.

        Args:
            device: where the weights go as they are read.
            dtype: what `auto` means here, instead of the device's own.
            mesh: the ranks among which the base is sharded, all of which load at the same time. None: it is whole.

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
            return self._load(torch.device(device), dtype, mesh)

    def _load(self, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None) -> PeftModel:
        base = self.load_base(device, dtype, mesh)
        if self.kernels == "auto":
            use_kernels(base)
        model = self.put_adapters(base)
        checks.check_quantized(model, self.quantization)
        # an exported adapter names what it was trained on, at the commit: AutoPeftModel loads that
        model.peft_config["default"].base_model_name_or_path = self.place.name
        model.peft_config["default"].revision = self.place.commit
        if self.gradient_checkpointing:
            checks.enable_checkpointing(base)
        if mesh is not None:
            shard(model, mesh)
        return model.train()

    def put_adapters(self, base: PreTrainedModel) -> PeftModel:
        """Make a `peft.PeftModel` of the base: with the adapter of `adapter_path`, or with fresh ones."""
        from peft import get_peft_model

        if self.adapter_path is not None:
            return self.load_adapter(base, trainable=True)
        with as_if_whole(base):
            return get_peft_model(base, self.lora_config())

    @property
    def starts_from_adapter(self) -> bool:
        """Whether it begins as a trained adapter, which is then its reference, and not as its base."""
        return self.adapter_path is not None

    def lora_config(self) -> LoraConfig:
        """PEFT's description of the adapters: of fresh ones by the fields, else that of `adapter_path`."""
        from peft import LoraConfig, PeftConfig

        if self.adapter_path is not None:
            found = PeftConfig.from_pretrained(self.adapter_place.folder)
            found.inference_mode = False  # as it was saved, it would not train
            return found
        given = {theirs: getattr(self, mine) for mine, theirs in lora_options.PASSED_ON.items()}
        given |= {name: given[name] or {} for name in ("rank_pattern", "alpha_pattern")}
        # a trained bias outlives "adapters off", and the reference would drift with it
        return LoraConfig(**given, bias="none", task_type="CAUSAL_LM")

    def checkpoint_identity(self) -> dict[str, Any]:
        """Say what a checkpoint of adapters must be put back onto: `model_identity`."""
        return self.model_identity()

    def cache_identity(self) -> dict[str, Any]:
        """Say what decides the base's log-probs besides dtypes: `model_content`."""
        return self.model_content()
