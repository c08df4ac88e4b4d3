"""YAML whose aliases repeat one another: a few lines of text can be a billion values."""

from __future__ import annotations

import yaml

_MOST = 100_000


def repeats_endlessly(text: str) -> bool:
    r"""Say if the values of a YAML text, an alias counted as what it repeats, are over 100,000, or in themselves.

    Reading such a text takes no memory; walking through what was read does not end.

    Args:
        text: YAML; what is none is said to be fine, as whoever reads it says what is wrong.

    Example:
        >>> repeats_endlessly("common: &common {lr: 1e-4}\nfirst: *common\nsecond: *common")
        False
    """
    if "&" not in text or "*" not in text:
        return False
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return root is not None and _size(root, {}) > _MOST


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    if (found := sizes.get(id(node))) is not None:
        return found
    sizes[id(node)] = _MOST + 1  # for as long as it is looked at: it is in itself
    inner = node.value if isinstance(node, yaml.CollectionNode) else ()
    sizes[id(node)] = 1 + sum(
        _size(part, sizes) for one in inner for part in (one if isinstance(one, tuple) else (one,))
    )
    return sizes[id(node)]
