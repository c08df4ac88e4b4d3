"""Base models that stay in memory from one run of a process to the next. Off, unless a program says `keeping`.

A run takes the base that was loaded with the same options, on the same device in the same dtype, and gives it back
without its adapters. What cannot be given back as it was (adapters whose start changes the base, layers of one's own)
is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_dpo import compat
from lit_dpo.policy.kernels import kernels_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_LEAVE_THE_BASE = (True, False, "gaussian", "orthogonal")
"""How adapters may start (`init_lora_weights`) without changing the weights under them, as PiSSA and LoftQ do."""


@dataclass
class _Kept:
    key: Hashable
    base: PreTrainedModel
    attention: str | None
    free: bool = False


_shelf: list[_Kept] | None = None
"""None where nothing is kept."""


@contextmanager
def keeping() -> Iterator[None]:
    """Within it, bases stay; at its end they go."""
    global _shelf
    before, _shelf = _shelf, []
    try:
        yield
    finally:
        _shelf = before


def base_of(key: Hashable | None, device: torch.device, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return the base that was loaded under this key and has been given back, or load it.

    Args:
        key: all that decides what is loaded. None: it is not kept.
        device: where it shall be.
        load: makes it.
    """
    if _shelf is None or key is None:
        return load()
    import torch

    for kept in _shelf:
        if kept.free and kept.key == key:
            kept.free = False
            if kept.base.device != device:  # after a run the trainer moves its model to the CPU
                torch.nn.Module.to(kept.base, device)  # transformers refuses it for quantised ones, by rule of thumb
            return kept.base
    _shelf[:] = [kept for kept in _shelf if not kept.free]  # room for the other one
    base = load()
    _shelf.append(_Kept(key, base, compat.attention_of(base)))
    return base


def give_back(model: PeftModel) -> None:
    """Take a run's adapters off its base, so that the next run may have it. Does nothing where nothing is kept.

    Args:
        model: the policy of a run that has ended; it must not be used any more.
    """
    if _shelf is None:
        return
    base = model.get_base_model()
    if any(kept.base is base for kept in _shelf) and _comes_off(model):
        model.unload()
    for kept in list(_shelf):
        if not kept.free and _is_bare(kept.base):
            _reset(kept)
            kept.free = True
        elif not kept.free:
            _shelf.remove(kept)


def _comes_off(model: PeftModel) -> bool:
    """Whether the base is what it was when the adapters are gone."""
    return all(
        config.init_lora_weights in _LEAVE_THE_BASE and not config.target_parameters
        for config in model.peft_config.values()
    )


def _is_bare(base: PreTrainedModel) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in base.modules())


def _reset(kept: _Kept) -> None:
    """Leave what a run sets on the base for the next run to set."""
    base: Any = kept.base
    if compat.attention_of(base) != kept.attention:
        base.set_attn_implementation(kept.attention)
    vars(base).pop("lit_dpo_plain_attention", None)
    if (kernels := kernels_of(base)) is not None:
        kernels.use(False)
        del base.lit_dpo_kernels
    base.requires_grad_(False).eval()
    for parameter in base.parameters():
        parameter.grad = None
