"""The policy: a base model in 4 bits, 8 bits or full precision, with LoRA adapters that are the only thing trained.

The only file that knows how bitsandbytes and peft load.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_dpo import policy_checks as checks
from lit_dpo.errors import PolicyError
from lit_dpo.fingerprints import sampled_digest, whole_digest

if TYPE_CHECKING:
    import torch

QUICKSTART = "lit-dpo/quickstart"
"""The built-in model id: made on first use, see `lit_dpo.quickstart`."""


@dataclass(frozen=True)
class QLoRAPolicy:
    """What is trained: a frozen base model and LoRA adapters (arXiv 2106.09685), NF4 by default (arXiv 2305.14314).

    Building one costs nothing; `check` reads configuration files only; `load` loads weights.

    Args:
        model: hub id or directory of a causal language model in safetensors; `lit-dpo/quickstart` is built in.
        revision: branch, tag or commit of a hub id.
        quantization: `nf4` (4 bits), `int8`, or `none`.
        double_quantization: quantise the NF4 scales too, 0.37 bits less per weight. False is refused where there are
            no such scales.
        r: LoRA rank.
        alpha: LoRA scale; updates are multiplied by `alpha / r`.
        dropout: on the adapters' input while training. The base's own dropouts are always off.
        target_modules: names (or suffixes) of the layers that get an adapter, a regular expression, or `all-linear`
            for all linear layers but the head.
        adapter_path: a trained LoRA adapter (a PEFT directory) to continue; its own rank, scale and layers then hold.
        dtype: of everything that is not quantised, and of computation; `auto` is float32 on a CPU (bfloat16 products
            are tens of times slower there) and bfloat16 on a GPU. Adapters and log-probs are float32 in any case.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.
        attention: `auto` (the flat row where a start-up probe finds it exact, else padded rows), `pairs` (the flat row
            or an error), or a transformers implementation such as `sdpa`, `eager`, `flash_attention_2` (padded rows).
        trust_remote_code: run code that comes with the model.

    Raises:
        PolicyError: for a value outside its domain, or fields that contradict each other.

    Example:
        >>> QLoRAPolicy("facebook/opt-350m", r=16, alpha=16, dropout=0.1, target_modules=["q_proj", "v_proj"]).r
        16
    """

    model: str
    revision: str | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    adapter_path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    attention: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        for name, allowed in (
            ("quantization", ("nf4", "int8", "none")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                raise PolicyError(f"Expected `{name}` among {', '.join(allowed)} but got {getattr(self, name)!r}.")
        if self.quantization != "nf4" and not self.double_quantization:
            raise PolicyError(
                f"`double_quantization` has no effect with quantization={self.quantization}: leave it out."
            )
        if not self.target_modules:
            raise PolicyError("Expected `target_modules` to name layers but it is empty; `all-linear` takes all.")
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise PolicyError(
                "Expected `r` >= 1, `alpha` > 0 and `dropout` in [0, 1) but got "
                f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}."
            )

    def check(self) -> None:
        """Find what would fail while loading, in seconds and without loading weights.

        Raises:
            PolicyError: naming the directory, file, field or layer, and what there is instead.
        """
        config = self._config()
        checks.check_weights(Path(self.path))
        checks.check_causal(config, self.model)
        checks.check_attention(self.attention)
        if self.quantization != "none":
            checks.check_bitsandbytes(self.quantization)
        targets: Any = self.target_modules
        if self.adapter_path is not None:
            targets = checks.check_adapter(self, Path(self.adapter_path))
        if targets != "all-linear":
            checks.check_targets(config, targets, self.trust_remote_code)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The policy with its adapters, in training mode, on `device`.

        Args:
            device: where the weights go as they are read.
            dtype: what `auto` means here; by default float32 on a CPU and bfloat16 elsewhere.

        Returns:
            A `peft.PeftModel`; only its adapters, float32, require gradients.

        Raises:
            PolicyError: if the model or adapter cannot be loaded, or its layers are not quantised as asked.
        """
        import torch

        self.check()
        dtype = self.torch_dtype(torch.device(device), dtype)
        with _default_dtype(torch.float32):  # Lightning's "true" precisions change it, and would round new adapters
            return self._load(torch.device(device), dtype)

    def load_frozen(self, device: torch.device | str = "cpu") -> Any:
        """The base, with the adapter of `adapter_path` if there is one, frozen and in evaluation mode.

        Raises:
            PolicyError: as `load`.
        """
        import torch

        self.check()
        with _default_dtype(torch.float32):
            model = self._load_base(torch.device(device), self.torch_dtype(torch.device(device)))
            if self.adapter_path is not None:
                model = self._load_adapter(model, trainable=False)
        checks.check_quantized(model, self.quantization)
        return model.requires_grad_(False).eval()

    def _load(self, device: torch.device, dtype: torch.dtype) -> Any:
        from peft import LoraConfig, get_peft_model

        base = self._load_base(device, dtype)
        if self.adapter_path is not None:
            model = self._load_adapter(base, trainable=True)
        else:
            lora = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type, unused-ignore]
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                bias="none",  # a trained bias outlives "adapters off", and the reference would drift with it
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base, lora)
        checks.check_quantized(model, self.quantization)
        if self.gradient_checkpointing:
            _enable_checkpointing(base)
        return model.train()

    def _load_base(self, device: torch.device, dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        config = self._config()
        checks.turn_off_dropout(config)
        with checks.as_policy_error(f"the model {self.model!r}"):
            base, info = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                device_map={"": device},
                quantization_config=self._quantization_config(dtype),
                use_safetensors=True,
                output_loading_info=True,
                **({} if self.attention in ("auto", "pairs") else {"attn_implementation": self.attention}),
                **self._hub(),
            )
        checks.check_complete(info, self.model)
        checks.keep_trainable(base)
        return base

    def _load_adapter(self, base: Any, *, trainable: bool) -> Any:
        from peft import PeftModel

        assert self.adapter_path is not None
        with checks.as_policy_error(f"the adapter {self.adapter_path!r}"):
            model = PeftModel.from_pretrained(base, self.adapter_path, is_trainable=trainable)
        checks.check_adapter_keys(model, Path(self.adapter_path))
        return model

    def load_tokenizer(self) -> Any:
        """The model's tokenizer, or the adapter's where it brought its own (with its chat template)."""
        from transformers import AutoTokenizer

        self._config()
        # a directory that is no model is a clearer message than one without a tokenizer
        checks.check_weights(Path(self.path))
        adapter = self.adapter_path
        if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(adapter, trust_remote_code=self.trust_remote_code)
        try:
            return AutoTokenizer.from_pretrained(self.path, **self._hub())
        except (OSError, ValueError) as error:
            raise PolicyError(f"No tokenizer for {self.model!r}: {checks.first_line(error)}") from error

    @property
    def path(self) -> str:
        """What transformers is given: the hub id, or an absolute directory."""
        if self.model == QUICKSTART:
            from lit_dpo.quickstart import quickstart_directory

            return str(quickstart_directory() / "model")
        local = Path(self.model).expanduser()
        return str(local.resolve()) if local.is_dir() else self.model

    def torch_dtype(self, device: torch.device, auto: torch.dtype | None = None) -> torch.dtype:
        """The dtype of computation on `device`."""
        import torch

        if self.dtype != "auto":
            found = getattr(torch, self.dtype)
            assert isinstance(found, torch.dtype)
            return found
        return auto or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of adapters must be put back onto: the base's content (not its place) and quantisation."""
        return {
            "model": self.model,
            "revision": self.revision,
            "fingerprint": self._fingerprint(),
            "quantization": self.quantization,
            "double_quantization": self.quantization == "nf4" and self.double_quantization,
        }

    def content(self) -> dict[str, Any]:
        """What decides the base's log-probs beside dtypes: every byte of it (or its commit), and quantisation.

        Raises:
            PolicyError: if a hub id has no known commit.
        """
        folder = Path(self.path)
        digest = whole_digest(folder) if folder.is_dir() else self._fingerprint()
        if digest == "commit None":
            raise PolicyError(f"The commit of {self.model!r} is not known, so nothing can be cached for it.")
        return {
            "weights": digest,
            "quantization": self.quantization,
            "double_quantization": self.quantization == "nf4" and self.double_quantization,
        }

    def adapter_content(self, path: str) -> str:
        """A digest of every byte of an adapter.

        Raises:
            PolicyError: if it is not a directory: a hub id may change.
        """
        if not any(Path(path).glob("*.safetensors")):
            raise PolicyError(
                f"Expected the adapter {path!r} to be a directory with *.safetensors: of anything else the content is "
                "not known, so nothing can be cached."
            )
        return whole_digest(Path(path))

    def start(self) -> str | None:
        """A digest of the adapter that is continued; None for a fresh one."""
        return None if self.adapter_path is None else sampled_digest(Path(self.adapter_path))

    def _config(self) -> Any:
        from transformers import AutoConfig

        path = self.path
        if not Path(path).is_dir() and (self.model.count("/") != 1 or self.model.startswith((".", "/", "~"))):
            raise PolicyError(f"Expected `policy.model` to be a directory or a hub id, but there is no {path!r}.")
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise PolicyError(
                f"Expected a model in {path} but it has no config.json; it holds {checks.listing(Path(path))}."
            )
        try:
            return AutoConfig.from_pretrained(path, **self._hub())
        except (OSError, ValueError) as error:
            hint = "" if Path(path).is_dir() else f"; there is no directory {Path(path).absolute()} either"
            raise PolicyError(f"No model configuration for {self.model!r}{hint}: {checks.first_line(error)}") from error

    def _quantization_config(self, dtype: torch.dtype) -> Any:
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

    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def _fingerprint(self) -> str:
        """Commit of a hub id; else a digest of configuration and weights (sizes and samples of the content)."""
        folder = Path(self.path)
        if not folder.is_dir():
            return f"commit {self._config()._commit_hash}"
        return sampled_digest(folder)


def adapter_parameters(model: Any, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """The parameters of one of a policy's adapters by name, in the model's order; `default` is what is trained."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in f"{name}."}


def _enable_checkpointing(base: Any) -> None:
    # reentrant checkpoints need inputs that require gradients, and embeddings are frozen
    keywords = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):  # the name from transformers 5.20 on
        base.activation_checkpointing_enable(keywords)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
