"""A frozen base in shards: each rank keeps a part of every layer, and layers are gathered as they run.

PyTorch's `fully_shard` around each layer and around the decoder (embeddings, last norm). Adapters stay whole, so that
gradients, clipping, checkpoints and exports are those of an ordinary run, and `DDPStrategy` brings them together. The
head stays whole too: it runs in chunks, and their number differs by rank; so does an embedding that is the head.

A gather is a conversation of all ranks: each must run the same passes of the base. See `lit_dpo.policy.symmetry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from lit_dpo import compat
from lit_dpo.errors import PolicyError
from lit_dpo.policy.adapters import is_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


_OF_PACKED = ("compress_statistics", "quant_type")
"""What PEFT asks a packed weight for, to put an adapter on it."""


def make_mesh(shard: str, device: str, world_size: int, nodes: int) -> DeviceMesh:
    """Make the ranks that share one copy of the base: all, or those of a node.

    Args:
        shard: `node` or `all`.
        device: the type of the ranks' devices.
        world_size: how many ranks there are.
        nodes: on how many machines, each with as many ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    copies = nodes if shard == "node" else 1
    # of two dimensions also for one copy: its second is a group of its own, in which DDP's exchanges do not get between
    return init_device_mesh(device, (copies, world_size // copies), mesh_dim_names=("copies", "ranks"))["ranks"]


def mesh_of(model: PeftModel | PreTrainedModel) -> DeviceMesh | None:
    """Return the ranks among which a model's base is sharded; None if it is whole."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: DeviceMesh | None = getattr(base, "lit_dpo_mesh", None)
    return found


def layers_of(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return a decoder's list of layers, and its name in it: of its lists the one with most parameters.

    Raises:
        PolicyError: if it has none.
    """
    from torch import nn

    lists = [(name, one) for name, one in decoder.named_modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        raise PolicyError(f"`policy.shard`: {type(decoder).__name__} has no list of layers to shard. Use `none`.")
    return max(lists, key=lambda one: sum(p.numel() for p in one[1].parameters()))


def shard(model: PeftModel | PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard what of a base is still whole: its layers one by one, then its decoder. It must be frozen.

    Args:
        model: a transformers causal LM, or a PEFT model around one, whose adapters stay whole.
        mesh: of one dimension.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    if decoder is base:
        raise PolicyError(f"`policy.shard`: {type(base).__name__} does not tell its decoder from its head. Use `none`.")
    whole = {p for name, p in base.named_parameters() if is_adapters(name) or p.requires_grad}
    whole |= {p for part in (base.get_output_embeddings(),) if part is not None for p in part.parameters()}
    for layer in layers_of(decoder)[1]:
        shard_module(layer, mesh, whole)
    shard_module(decoder, mesh, whole)
    base.lit_dpo_mesh = mesh


def shard_module(module: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Shard the parameters of a module but for those of modules in it that are sharded already; never twice.

    Args:
        module: frozen.
        mesh: of one dimension.
        whole: parameters that are left as they are.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(module, FSDPModule):
        return
    packed: list[Any] = [
        part for part in module.modules() if getattr(getattr(part, "weight", None), "quant_state", None)
    ]
    said = [{name: getattr(part.weight, name) for name in _OF_PACKED} for part in packed]
    for part in packed:
        part.quant_state = part.weight.quant_state  # a gathered weight has none: bitsandbytes looks at the layer then
    with _without_gradients():
        # the outermost too lets go after its pass: else it stays gathered where no backward pass follows
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for part, values in zip(packed, said, strict=True):
        vars(part.weight).update(values)


def _without_gradients() -> AbstractContextManager[Any]:
    """Ask for no gradients of whole numbers, as packed weights are: torch 2.10 and 2.11 do, and take it back then."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.requires_grad_ and not args[0].is_floating_point():
                return args[0]
            return func(*args, **(kwargs or {}))

    return Mode()


def shards(model: nn.Module) -> Iterator[Any]:
    """Return the modules that are sharded, from the outside in."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


@contextmanager
def as_if_whole(model: nn.Module) -> Iterator[None]:
    """Show sharded weights in their whole shape, without memory: of a shard PEFT takes the shape for the layer's."""
    from torch import nn

    if not any(hasattr(p, "to_local") for p in model.parameters()):
        yield
        return
    shown = []
    kinds = [(module, type(module)) for module in shards(model)]
    for module, kind in kinds:  # which would look for its shards where PEFT moves the module
        module.__class__ = kind.__bases__[1]
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if hasattr(p, "to_local"):
                whole = nn.Parameter(p.to_local().new_empty(1).expand(p.shape), requires_grad=False)
                vars(whole).update({said: getattr(p, said) for said in _OF_PACKED if hasattr(p, said)})
                setattr(module, name, whole)
                shown.append((module, name, p))
    try:
        yield
    finally:
        for module, name, p in shown:
            setattr(module, name, p)
        for module, kind in kinds:
            module.__class__ = kind


def leave_to_shards(module: nn.Module) -> None:
    """Have `DistributedDataParallel` not touch the sharded parameters of a module: no rank has another's."""
    if names := [name for name, p in module.named_parameters() if hasattr(p, "to_local")]:
        compat.leave_out_of_ddp(module, names)


def gathered_bytes(model: PeftModel | PreTrainedModel) -> int:
    """Bytes that are gathered at once besides the shards: what is outside the layers, and three layers.

    Two in a backward pass; up to 2.7 were measured at the end of a forward pass, where the next gather has begun.
    """
    if mesh_of(model) is None:
        return 0
    sizes: list[int] = [
        sum(p.numel() * p.element_size() for p in _own(module)) for module in shards(model)
    ]  # the decoder's is the first
    return sum(sizes[:1]) + sum(sorted(sizes[1:])[-3:])


def parameter_counts(model: PeftModel) -> tuple[int, int]:
    """Count the numbers that train, and all: as PEFT does, which does not know a packed weight in shards."""
    trained, total = model.get_nb_trainable_parameters()
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and hasattr(module.weight, "to_local"):
            total += state.shape.numel() - module.weight.numel()
    return trained, total


def _own(module: nn.Module) -> list[Any]:
    """Sharded parameters of a module, without those of sharded modules in it."""
    inside = {id(p) for other in shards(module) if other is not module for p in other.parameters()}
    return [p for p in module.parameters() if hasattr(p, "to_local") and id(p) not in inside]
