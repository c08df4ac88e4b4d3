"""A policy without weights: every module in its place, its tensors of the right size and dtype, and no memory.

The tensors are PyTorch's fake ones, on a CPU: operations on them give shapes, so that a step's memory and arithmetic
can be counted for a model of any size in seconds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lit_dpo.compat import can_switch_attention, fake_tensors
from lit_dpo.errors import PolicyError
from lit_dpo.logps.attention import use_pair_attention
from lit_dpo.policy import LoRAPolicy, checks
from lit_dpo.policy.sliced import SLICE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_dpo.policy import BaseModel


class Repeats(NamedTuple):
    """How the layers of a model repeat: `start`, then `period` again and again.

    A model of `shallow` layers, and `times` what one of `deep` layers has more, is the whole. Both have layers between
    the first, which gets no gradient, and the last, which computes less.
    """

    start: int
    period: int
    layers: int

    @property
    def shallow(self) -> int:
        """Layers that hold two periods."""
        return self.start + 2 * self.period

    @property
    def deep(self) -> int:
        """Layers that hold three periods."""
        return self.start + 3 * self.period

    @property
    def times(self) -> int:
        """Periods beyond the first two."""
        return (self.layers - self.start) // self.period - 2


class Skeleton(NamedTuple):
    """A model whose tensors are fake.

    Attributes:
        model: a `peft.PeftModel` in training mode, or a base model where there are no adapters.
        parameters: numbers in its weights, adapters left out.
        trained: numbers in its adapters.
        widest: `(outputs, inputs)` of its largest linear layer but the head.
        repeats: how its layers repeat.
        fake: the mode that operations on it run in.
    """

    model: Any
    parameters: int
    trained: int
    widest: tuple[int, int]
    repeats: Repeats | None
    fake: AbstractContextManager[Any]


def skeleton(policy: BaseModel, dtype: torch.dtype, *, on_gpu: bool = False, layers: int | None = None) -> Skeleton:
    """Make the model that a policy would load, without downloading or reading weights.

    Args:
        policy: says which model, quantisation and adapters; a reference that is a model of its own: a frozen base.
        dtype: of everything that is not quantised.
        on_gpu: quantised weights are unpacked whole, as bitsandbytes does there, and not in slices.
        layers: only the first of its layers.
    """
    fake = fake_tensors()
    base = _base(policy, dtype, layers)
    repeats = _repeats(base)
    parameters = sum(p.numel() for p in base.parameters())
    head = base.get_output_embeddings()
    linear = [
        (m.weight.shape[0], m.weight.shape[1]) for m in base.modules() if isinstance(m, nn.Linear) and m is not head
    ]
    model = base
    if isinstance(policy, LoRAPolicy):
        from peft import get_peft_model

        config = policy.lora_config()
        if config.use_dora and policy.quantization != "none":  # PEFT unpacks each weight for its norms
            raise PolicyError(
                "Nothing to plan with: `use_dora` on quantised weights is not counted. Run a step instead."
            )
        with torch.device("meta"), checks.default_dtype(torch.float32):
            model = get_peft_model(base, config)
        if policy.gradient_checkpointing:
            checks.enable_checkpointing(base)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with fake:
        _fill(model, policy, on_gpu)
    if policy.attention in ("auto", "pairs") and can_switch_attention(base):
        use_pair_attention(base)
    widest = max(linear, key=lambda shape: shape[0] * shape[1], default=(1, 1))
    model.train()
    for module in model.modules():
        if hasattr(
            module, "layerdrop"
        ):  # it is 0, but OPT of older transformers draws and compares a number all the same
            module.training = False
    return Skeleton(model, parameters, trained, widest, repeats, fake)


def _base(policy: BaseModel, dtype: torch.dtype, layers: int | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    config = policy.config()
    checks.turn_off_dropout(config, quiet=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the policy says the same, or its check refuses
    if layers is not None:
        config.get_text_config().num_hidden_layers = layers
    given = {} if policy.attention in ("auto", "pairs") else {"attn_implementation": policy.attention}
    with torch.device("meta"), checks.as_policy_error(f"the model {policy.model!r}"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=policy.trust_remote_code, **given
        )
    base.requires_grad_(False)
    if policy.quantization != "none":
        quantizer = AutoHfQuantizer.from_config(policy.quantization_config(dtype), pre_quantized=False)
        quantizer.preprocess_model(model=base, device_map={"": "cpu"}, checkpoint_files=[])
    return base


def _stack(base: PreTrainedModel) -> list[nn.Module]:
    """List a model's decoder layers; none, where they are not in a list of their own."""
    count = base.config.get_text_config().num_hidden_layers
    lists = (module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


def _repeats(base: PreTrainedModel) -> Repeats | None:
    """Find the shortest start and period of a model's layers, by their classes, shapes and kinds; None if none."""
    kinds = getattr(base.config.get_text_config(), "layer_types", None)
    if not (layers := _stack(base)):
        return None
    count = len(layers)
    looks = [
        (kinds and kinds[place], [(name, type(part), *(p.shape for p in part.parameters(recurse=False)))
                                  for name, part in layer.named_modules()])
        for place, layer in enumerate(layers)
    ]  # fmt: skip
    for period in range(1, count // 4 + 1):
        for start in range(count - 4 * period + 1):
            same = all(looks[place] == looks[place - period] for place in range(start + period, count))
            if same and (count - start) % period == 0:
                return Repeats(start, period, count)
    return None


def _fill(model: nn.Module, policy: BaseModel, on_gpu: bool) -> None:
    """Fake tensors for all that are on the meta device; what is quantised gets its packed size."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        packed = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
        if packed:
            _pack(module, policy, on_gpu)
        for name, one in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not (packed and name == "weight"):
                if id(one) not in made:
                    made[id(one)] = nn.Parameter(torch.empty(one.shape, dtype=one.dtype), one.requires_grad)
                setattr(module, name, made[id(one)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype)))


def _pack(module: Any, policy: BaseModel, on_gpu: bool) -> None:
    outputs, inputs = module.weight.shape
    numbers = outputs * inputs
    if isinstance(module, bnb.nn.Linear4bit):
        packed, blocks = (numbers + 1) // 2, -(-numbers // 64)
        scales = blocks + 4 * -(-blocks // 256) if policy.double_quantization else 4 * blocks
    else:
        packed, scales = numbers, 4 * outputs
    unpacked = numbers if on_gpu or isinstance(module, bnb.nn.Linear8bitLt) else min(numbers, SLICE // 4)
    bias = module.bias
    module.__class__ = _Packed
    module.__dict__ = {**nn.Module().__dict__, "training": module.training}
    module.weight = nn.Parameter(torch.empty(packed, 1, dtype=torch.uint8), requires_grad=False)
    module.scales = torch.empty(scales, dtype=torch.uint8)
    module.bias, module.outputs, module.unpacked = bias, outputs, unpacked


class _Packed(nn.Module):
    """A linear layer with a quantised weight: the memory and arithmetic of a pass, and no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Passing.apply(x, self.outputs, self.unpacked)  # type: ignore[no-untyped-call]
        return out


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, unpacked: int) -> Tensor:
        ctx.inputs, ctx.unpacked = x.shape[-1], unpacked
        room = x.new_empty(unpacked)
        return x @ room[:1].expand(x.shape[-1], outputs)  # whatever is unpacked at once, the arithmetic is of all

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        room = gradient.new_empty(ctx.unpacked)
        return gradient @ room[:1].expand(gradient.shape[-1], ctx.inputs), None, None
