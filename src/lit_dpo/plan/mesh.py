"""What each of several devices holds and sends: the base's shares, and the traffic of a step.

All of it is arithmetic on bytes: how many there are, which is exact, and how long they take at a stated bandwidth.
What a message costs besides its bytes (latency, which grows with the devices that take part) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lit_dpo.logps import score
from lit_dpo.memory import stored_bytes
from lit_dpo.policy.sharding import layers_of

if TYPE_CHECKING:
    from torch import Tensor

    from lit_dpo.plan.cards import Card

REACHED = 0.8
"""Part of a link's bandwidth that collective operations reach. A rule of thumb, measured on no network by us."""
NETWORK = 400.0
"""10^9 bits a second of each device's own port to other nodes, where nobody says another number."""


class Mesh(NamedTuple):
    """Devices, and over which of them one copy of the base is spread.

    Attributes:
        nodes: machines.
        devices: of a node.
        shard: of the policy: `none`, `node` or `all`.

    Example:
        >>> Mesh(8, 8, "node").spread, Mesh(8, 8, "all").spread
        (8, 64)
    """

    nodes: int = 1
    devices: int = 1
    shard: str = "none"

    @property
    def ranks(self) -> int:
        """All devices."""
        return self.nodes * self.devices

    @property
    def spread(self) -> int:
        """Devices that hold one copy of the base together; 1: each holds a copy."""
        return {"none": 1, "node": self.devices, "all": self.ranks}[self.shard]


class Links(NamedTuple):
    """Bytes a second, in one direction, that a collective operation reaches.

    Attributes:
        node: between the devices of a node.
        network: of one device's port to other nodes.
    """

    node: float
    network: float

    @classmethod
    def of(cls, card: Card, network: float = NETWORK) -> Links:
        """Those of a card, and of a network by 10^9 bits a second and device."""
        return cls(REACHED * card.link * 1e9, REACHED * network / 8 * 1e9)

    def bandwidth(self, mesh: Mesh, among: int) -> float:
        """Of a ring through `among` devices: all bytes pass each link in it, and a node's ports share them."""
        return self.node if among <= mesh.devices else min(self.node, mesh.devices * self.network)


class Parts(NamedTuple):
    """Bytes of a model's tensors, by what becomes of them when the base is spread.

    Attributes:
        layers: frozen parameters of all decoder layers.
        largest: of these, the most that one layer has.
        rest: other frozen parameters of the decoder: embeddings and norms.
        whole: what each device keeps whole: the head, scales of packed weights, buffers.
        trained: adapters.
    """

    layers: int = 0
    largest: int = 0
    rest: int = 0
    whole: int = 0
    trained: int = 0

    @classmethod
    def of(cls, model: Any) -> Parts:
        """Sort a model's tensors, as `lit_dpo.policy.sharding.shard` would.

        Args:
            model: the policy's or a reference's, with weights or without.
        """
        base = score.base_model(model)
        decoder, kept = base.get_decoder(), {id(p) for p in base.get_output_embeddings().parameters()}
        lists = any(isinstance(part, nn.ModuleList) for part in decoder.modules())
        layers = [_bytes(layer.parameters(), kept) for layer in (layers_of(decoder)[1] if lists else ())]
        rest = _bytes(decoder.parameters(), kept) - sum(layers)  # a head that shares the embeddings keeps them whole
        frozen, trained = stored_bytes(model)
        return cls(sum(layers), max(layers, default=0), rest, frozen - sum(layers) - rest, trained)

    @property
    def spread(self) -> int:
        """Bytes that are spread, and gathered for each pass."""
        return self.layers + self.rest


def _bytes(parameters: Iterable[Tensor], left_out: set[int]) -> int:
    one_each = {id(p): p for p in parameters if not p.requires_grad and id(p) not in left_out}
    return sum(p.numel() * p.element_size() for p in one_each.values())


class Share(NamedTuple):
    """Bytes on one device.

    Attributes:
        base: its share of what is spread; all of it where nothing is. Of a reference that is a model of its own too.
        gathered: of others' shares, at most at once: embeddings and norms, and three layers (one that runs, the next,
            and the buffer in which that arrives).
        whole: the head, and whatever else is not spread.
        buckets: in which `DDPStrategy` brings the adapters' gradients together.
    """

    base: int
    gathered: int
    whole: int
    buckets: int

    @classmethod
    def of(cls, mesh: Mesh, policy: Parts, reference: Parts | None = None) -> Share:
        """Of each device of a mesh.

        Args:
            mesh: of devices.
            policy: bytes of the policy.
            reference: of a model of its own.
        """
        models = [policy] if reference is None else [policy, reference]
        gathered = max(min(one.layers, 3 * one.largest) + one.rest for one in models) if mesh.spread > 1 else 0
        return cls(
            base=sum(-(-one.spread // mesh.spread) for one in models),
            gathered=gathered,
            whole=sum(one.whole for one in models) + (0 if reference is None else reference.trained),
            buckets=policy.trained if mesh.ranks > 1 else 0,
        )

    @property
    def frozen(self) -> int:
        """Bytes that do not train."""
        return self.base + self.gathered + self.whole


class Traffic(NamedTuple):
    """Bytes that each device receives, and how long they take.

    Attributes:
        reduced: of adapters' gradients, twice through the ring, once a step, whatever its micro-batches.
        gathered: of the base, for each pass of a micro-batch.
        reducing: seconds of `reduced`; None where no bandwidth is known.
        gathering: seconds of `gathered`, for each; None likewise.
    """

    reduced: float
    gathered: tuple[float, ...]
    reducing: float | None = None
    gathering: tuple[float, ...] | None = None

    @classmethod
    def of(cls, mesh: Mesh, trained: int, passes: Sequence[int], links: Links | None = None) -> Traffic:
        """Of a mesh.

        Args:
            mesh: says who takes part.
            trained: bytes of the adapters.
            passes: of a micro-batch, the bytes that each has to gather of a model: `Parts.spread`.
            links: bandwidths, if they are known.

        Example:
            >>> found = Traffic.of(Mesh(1, 8, "node"), 0, [14_000] * 3, Links(1000, 1000))
            >>> found.gathered, found.gathering
            ((12250.0, 12250.0, 12250.0), (12.25, 12.25, 12.25))
        """
        reduced = 2 * trained * (mesh.ranks - 1) / mesh.ranks
        gathered = tuple(size * (mesh.spread - 1) / mesh.spread for size in passes)
        if links is None:
            return cls(reduced, gathered)
        bandwidth = links.bandwidth(mesh, mesh.spread)
        times = tuple(size / bandwidth for size in gathered)
        return cls(reduced, gathered, reduced / links.bandwidth(mesh, mesh.ranks), times)

    def waiting(self, seconds: Sequence[float]) -> float:
        """Seconds of a micro-batch in which a device waits for weights: what a pass's arithmetic does not hide.

        Args:
            seconds: of the arithmetic of each pass, with which the gathers for its next layers go on.
        """
        times = self.gathering or (0.0,) * len(seconds)
        return sum(max(0.0, gather - one) for gather, one in zip(times, seconds, strict=True))
