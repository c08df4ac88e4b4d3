"""What each of several devices holds and sends: the base's shares, and the traffic of a step.

All of it is arithmetic on bytes: how many there are, which is exact, and how long they take at a stated bandwidth.
What a message costs besides its bytes (latency, which grows with the devices that take part) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.logps import score
from lit_dpo.plan.skeleton import stack

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
        whole: what each device keeps whole: the head, scales of packed weights, buffers, other models.
        trained: adapters.
    """

    layers: int
    largest: int
    rest: int
    whole: int
    trained: int

    @classmethod
    def of(cls, model: Any, frozen: int, trained: int) -> Parts:
        """Sort a model's parameters.

        Args:
            model: the policy's, with weights or without.
            frozen: all bytes that a device without sharding keeps and does not train.
            trained: bytes that train.
        """
        base = score.base_model(model)
        kept = {
            id(p) for p in base.get_output_embeddings().parameters()
        }  # a head that shares the embeddings keeps them whole
        layers = [_bytes(layer.parameters(), kept) for layer in stack(base)]
        rest = _bytes(base.get_decoder().parameters(), kept) - sum(layers)
        return cls(sum(layers), max(layers), rest, frozen - sum(layers) - rest, trained)


def _bytes(parameters: Iterable[Tensor], left_out: set[int]) -> int:
    one_each = {id(p): p for p in parameters if not p.requires_grad and id(p) not in left_out}
    return sum(p.numel() * p.element_size() for p in one_each.values())


class Share(NamedTuple):
    """Bytes on one device.

    Attributes:
        base: its share of what is spread; all of it where nothing is.
        gathered: of others' shares, at most at once: three layers (one that runs, the next, and the buffer in which
            that arrives), and the embeddings and norms, from a micro-batch's forward pass to its backward pass.
        whole: the head, and whatever else is not spread.
        buckets: in which `DDPStrategy` brings the adapters' gradients together.
    """

    base: int
    gathered: int
    whole: int
    buckets: int

    @classmethod
    def of(cls, mesh: Mesh, parts: Parts) -> Share:
        """Of each device of a mesh."""
        spread, trained = parts.layers + parts.rest, parts.trained if mesh.ranks > 1 else 0
        gathered = min(parts.layers, 3 * parts.largest) + parts.rest if mesh.spread > 1 else 0
        return cls(-(-spread // mesh.spread), gathered, parts.whole, trained)

    @property
    def frozen(self) -> int:
        """Bytes that do not train."""
        return self.base + self.gathered + self.whole


class Traffic(NamedTuple):
    """Bytes that each device receives, and how long they take.

    Attributes:
        reduced: of adapters' gradients, twice through the ring, once a step, whatever its micro-batches.
        gathered: of the base, in one pass over its layers.
        passes: of a micro-batch over the layers; each gathers them.
        embeddings: gathered once a micro-batch.
        reducing: seconds of `reduced`; None where no bandwidth is known.
        gathering: seconds of `gathered`; None likewise.
    """

    reduced: float
    gathered: float
    passes: int
    embeddings: float
    reducing: float | None = None
    gathering: float | None = None

    @classmethod
    def of(cls, mesh: Mesh, parts: Parts, passes: int, links: Links | None = None) -> Traffic:
        """Of a mesh.

        Args:
            mesh: says who takes part.
            parts: bytes of the model.
            passes: over the layers that a micro-batch makes: of the reference, forward, backward.
            links: bandwidths, if they are known.
        """
        reduced = 2 * parts.trained * (mesh.ranks - 1) / mesh.ranks
        gathered, rest = (size * (mesh.spread - 1) / mesh.spread for size in (parts.layers, parts.rest))
        if links is None:
            return cls(reduced, gathered, passes, rest)
        reducing = reduced / links.bandwidth(mesh, mesh.ranks)
        return cls(reduced, gathered, passes, rest, reducing, gathered / links.bandwidth(mesh, mesh.spread))

    @property
    def each(self) -> float:
        """Bytes of a micro-batch."""
        return self.passes * self.gathered + self.embeddings

    def waiting(self, seconds: Sequence[float]) -> float:
        """Seconds of a micro-batch in which a device waits for weights: what a pass's arithmetic does not hide.

        Args:
            seconds: of the arithmetic of each pass.
        """
        return sum(max(0.0, (self.gathering or 0.0) - one) for one in seconds)

    def hidden_from(self, tokens: float, seconds: float) -> float | None:
        """Tokens of a micro-batch from which on a forward pass takes as long as its gathers.

        Args:
            tokens: of a micro-batch.
            seconds: of its forward pass.
        """
        return None if self.gathering is None or not seconds else tokens * self.gathering / seconds
