"""`lit-dpo ablate`: runs that differ in what is varied, and a comparison of them that can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo ablate`; see `lit_dpo.tools.ablate.command`."""
    from lit_dpo.tools.ablate.command import main as command

    command(args)


def run(config: Mapping[str, Any] | Sequence[str] | str | Path, out: str | Path | None = None) -> dict[str, float]:
    """Make one run of `fit`, in this process, and return what it measured last: for a sweeper of one's own.

    Args:
        config: options of `fit`, by name (`{"config": "configs/quickstart.yaml", "model.loss.beta": 0.3}`), nested or
            not; or its arguments, as they are typed; or a file.
        out: folder of the run, new. None: the logger of the configuration says where, as for `fit`.

    Returns:
        The last value of everything that was logged (`val/reward_accuracy`, …), and `steps`, `seconds`, `tokens`,
        `peak_memory` (bytes).

    Raises:
        LitDPOError: for a run that cannot work.

    Example:
        ```python
        run({"config": "configs/quickstart.yaml", "model.loss": "IPOLoss", "model.loss.beta": 0.3})["val/loss"]
        ```
    """
    from lit_dpo.tools.ablate.sweeping import run as made

    return made(config, out)
