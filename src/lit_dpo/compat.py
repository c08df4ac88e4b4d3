"""The one door to private names of other libraries: what no public API does, each with the reason why.

Nothing else in the package uses one, and there are at most thirteen; both are laws that the tests hold. A test for each
says what we take it to mean, so that a release that changes it is found there, by name, and not in somebody's numbers.

Two private methods of `LightningCLI` are overridden, which is no access: `_prepare_subcommand_parser` (there is no
public place for an option of one command alone) and `_parse_ckpt_path` (it would put a checkpoint's hyper-parameters
over what was typed). The same tests see that Lightning still calls both.

Libraries are imported by what needs them, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from torch import Tensor
    from transformers import PreTrainedModel

# ---- PEFT ----


def turn_adapters_off(layer: Any, off: bool) -> None:
    """Let one of PEFT's layers compute without its adapters, or with them.

    `enable_adapters` and `PeftModel.disable_adapter` also set `requires_grad` of all adapter weights.
    """
    layer._disable_adapters = off


def use_adapters(layer: Any, names: str | list[str]) -> None:
    """Let one of PEFT's layers compute with these adapters.

    `set_adapter` also sets `requires_grad`: the adapters that it leaves would silently stop training.
    """
    layer._active_adapter = names


# ---- transformers ----


def attention_of(model: PreTrainedModel) -> str | None:
    """Name the attention implementation of a model. transformers has a public way to set it, and none to read it."""
    found: str | None = model.config._attn_implementation
    return found


def can_switch_attention(model: PreTrainedModel) -> bool:
    """Whether a model takes its attention from `transformers.AttentionInterface`.

    Where it does not, the public `set_attn_implementation` logs a warning and does nothing.
    """
    return bool(model._can_set_attn_implementation())


# ---- torch ----


def has_gradient_hook(tensor: Tensor) -> bool:
    """Whether something runs on a tensor's gradient: `register_hook` has no counterpart that tells."""
    return bool(tensor._backward_hooks)


def leave_out_of_ddp(module: Any, names: list[str]) -> None:
    """Have `DistributedDataParallel` neither broadcast nor compare these parameters of a module that it is given.

    Its public `init_sync=False` leaves out all of them, adapters too, and is the strategy's to say.
    """
    module._ddp_params_and_buffers_to_ignore = names


def operation_mode() -> Any:
    """Return the class whose `__torch_dispatch__` sees every operation, those of a backward pass too.

    The public `torch.overrides.TorchFunctionMode` sees calls of Python alone.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def fake_tensors() -> AbstractContextManager[Any]:
    """Make a mode in which tensors have a shape, a dtype and a device, and no memory.

    Tensors on the public `meta` device are on no other, so that code that asks for the device takes another way.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


# ---- Lightning ----

CLASS_PATH, INSTANTIATOR = "_class_path", "_instantiator"
"""Hyper-parameters that say which class `load_from_checkpoint` builds, and that LightningCLI's function builds it from
class paths. LightningCLI alone writes them; a module that was built in Python has no public way to."""

BATCHES_THAT_STEPPED = "_batches_that_stepped"
"""What a loop, and its part of a checkpoint, call the number of the next row that is logged."""


def number_rows_from(trainer: pl.Trainer, step: int) -> None:
    """Let the next row that a training loop logs have this number: `global_step`, which is public, does not move it."""
    setattr(trainer.fit_loop.epoch_loop, BATCHES_THAT_STEPPED, step)


def is_numbered(logger: TensorBoardLogger | CSVLogger) -> bool:
    """Whether a TensorBoard or CSV logger has its version. The public `version` gives it one, by being asked."""
    return logger._version is not None


def number(logger: TensorBoardLogger | CSVLogger, version: int) -> None:
    """Give a TensorBoard or CSV logger its version; `version` cannot be set."""
    logger._version = version


# ---- jsonargparse ----


@contextmanager
def on_another_class(discard: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Within it, `discard(parser, before, after)` takes from a class's entry what another class shall not have.

    jsonargparse keeps whatever the other class accepts, and has no setting for it. Everything that compares class
    paths (arguments, files over files, all of them over defaults) calls this one function.
    """
    from jsonargparse import _typehints

    theirs = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = theirs
