"""What a model's configuration says, wherever it says it: settings are nested by part, by layer type and by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Setting(NamedTuple):
    """One entry of a configuration or of a part of it.

    Attributes:
        path: its name, behind those of the parts that it is in: `attn_config.attn_pdrop`.
        name: its own name.
        value: what it is set to.
        parts: the configurations or dictionaries that it is in, the innermost last.
    """

    path: str
    name: str
    value: Any
    parts: tuple[Any, ...]

    @property
    def is_number(self) -> bool:
        """Whether it is one; True and False are none."""
        return isinstance(self.value, int | float) and not isinstance(self.value, bool)

    def change(self, value: object) -> None:
        """Set it to something else, where it is."""
        part = self.parts[-1]
        if isinstance(part, dict):
            part[self.name] = value
        else:
            setattr(part, self.name, value)


def settings(config: PreTrainedConfig, path: str = "", parts: tuple[Any, ...] = ()) -> Iterator[Setting]:
    """All entries of a configuration and of what is nested in it: dictionaries, configurations, lists of them.

    Example:
        >>> found = settings({"dropout": 0.1, "rope_parameters": {"full_attention": {"rope_type": "dynamic"}}})
        >>> [one.path for one in found if one.name in ("dropout", "rope_type")]
        ['dropout', 'rope_parameters.full_attention.rope_type']
    """
    parts = (*parts, config)
    for name, value in list((config if isinstance(config, dict) else vars(config)).items()):
        if not isinstance(name, str) or name.startswith("_"):
            continue  # labels of classes; caches
        yield Setting(f"{path}{name}", name, value, parts)
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, dict) or hasattr(inner, "to_dict"):
                yield from settings(inner, f"{path}{name}.", parts)


class RopeLimit(NamedTuple):
    """From how many tokens on positions depend on the longest row of a batch, and by which kind of RoPE."""

    tokens: int
    kind: str


def rope_limit(config: PreTrainedConfig) -> RopeLimit | None:
    """Find the smallest limit of a text configuration, whichever layers it is for; None if there is none.

    LongRoPE and dynamic NTK choose their frequencies by the longest row of a batch: beyond their limit a long pair
    moves its batch mates.
    """
    found = []
    for one in settings(config):
        if one.name not in ("rope_type", "type") or not isinstance(one.value, str) or "rope" not in one.path:
            continue
        if "dynamic" in one.value or one.value in ("longrope", "su"):  # `su` is LongRoPE in old configurations
            names = ("original_max_position_embeddings", "max_position_embeddings")
            places = [(part, name) for name in names for part in reversed(one.parts)]
            limits = [part.get(n) if isinstance(part, dict) else getattr(part, n, None) for part, n in places]
            if limit := next(filter(None, limits), None):
                found.append(RopeLimit(int(limit), one.value))
    return min(found, default=None)
