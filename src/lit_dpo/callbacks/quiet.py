from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.export import callbacks_of
from lit_dpo.quiet import Hush

if TYPE_CHECKING:
    from lit_dpo.module import DPOModule


class Quiet(pl.Callback):
    """While a trainer works, leaves out what other libraries say and nobody can do anything about.

    Before and after, and of whatever else, all is said that was said. A `ModelSummary` whose numbers would be wrong is
    left out as well: it counts packed 4-bit weights as parameters, of which there are twice as many. A subclass with
    empty hooks, among the trainer's callbacks, lets everything through.
    """

    def __init__(self) -> None:
        self._hush = Hush()

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Begin, before anything loads."""
        self._hush.begin()
        if _is_dumb_notebook() and any(isinstance(one, RichProgressBar) for one in callbacks_of(trainer)):
            rank_zero_info("No progress bar is shown: `pip install ipywidgets` brings Rich's into notebooks.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Take out a summary that counts wrong; the module has said what trains, in a line."""
        counted = sum(one.numel() for one in pl_module.model.parameters())
        if counted != pl_module.model.get_nb_trainable_parameters()[1]:
            for one in [one for one in callbacks_of(trainer) if isinstance(one, ModelSummary)]:
                callbacks_of(trainer).remove(one)  # from the list that is gone through, ahead of its turn

    def teardown(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """End."""
        self._hush.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """End, for nothing is torn down."""
        self._hush.end()


def _is_dumb_notebook() -> bool:
    """Whether this is a notebook where Rich cannot draw."""
    from rich.console import Console

    return Console().is_jupyter and importlib.util.find_spec("ipywidgets") is None
