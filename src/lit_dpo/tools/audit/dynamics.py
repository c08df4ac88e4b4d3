"""What `TrainingDynamics` has written of a run, and what that says of each comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_dpo.callbacks.dynamics import FILE
from lit_dpo.errors import LitDPOError
from lit_dpo.versions import DYNAMICS, check_version

if TYPE_CHECKING:
    import pyarrow as pa

Numbers = NDArray[Any]


class Dynamics(NamedTuple):
    """Comparisons as training saw them: a row each time.

    Attributes:
        columns: `(N,)` each, by name; see `TrainingDynamics`.
        about: of the run: its loss, its β, a digest of its data.
    """

    columns: dict[str, Numbers]
    about: dict[str, Any]

    @classmethod
    def of(cls, table: pa.Table, file: object = "The table of dynamics") -> Dynamics:
        """Take what was written; passes whose numbers are not finite say nothing.

        Raises:
            VersionError: if a newer release has written it.
        """
        about = json.loads((table.schema.metadata or {}).get(b"lit_dpo", b"{}"))
        check_version(about.pop("version", None), DYNAMICS, file)
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        told = np.isfinite(columns["reward_margin"]) & np.isfinite(columns["loss"])
        return cls({name: values[told] for name, values in columns.items()}, about)

    @classmethod
    def read(cls, run: Path) -> Dynamics:
        """Read those of a run.

        Raises:
            LitDPOError: if it has none, saying how to have them.
        """
        import pyarrow.parquet as pq

        if not (file := run / FILE).is_file():
            raise LitDPOError(
                f"Expected {file} but there is none. Train with `--trainer.callbacks+=TrainingDynamics`, which costs "
                "no pass more, or measure the checkpoints that the run has left: `lit-dpo audit RUN --recompute`."
            )
        return cls.of(pq.read_table(file), file)


class Scores(NamedTuple):
    """What training says of each comparison, `(N,)` each.

    Attributes:
        row: its number in the training data.
        chosen: place of the chosen completion among its prompt's.
        rejected: place of the rejected one.
        times: how often it was seen.
        confidence: mean over the times of σ(β·margin), from 0 to 1. The least are the likeliest to be labelled the
            wrong way round: `benchmarks/audit.py` compares it with the others.
        variability: standard deviation of it.
        correctness: share of the times at which the margin was above 0.
        area: mean reward margin; from below 0, where training disagrees with the label, upwards.
        gradient: mean of its share in its step's gradient, times the comparisons of the step: 1 is an equal share.
        last_gradient: the same, the last time.
        reference_margin: difference of the reference's log-probs, nats; NaN without a reference.
        last_loss: the last time.
        last_margin: reward margin, the last time.
    """

    row: Numbers
    chosen: Numbers
    rejected: Numbers
    times: Numbers
    confidence: Numbers
    variability: Numbers
    correctness: Numbers
    area: Numbers
    gradient: Numbers
    last_gradient: Numbers
    reference_margin: Numbers
    last_loss: Numbers
    last_margin: Numbers


def score(dynamics: Dynamics) -> Scores:
    """Sum up what each comparison did in training.

    Confidence, variability and correctness are those of dataset cartography (arXiv 2009.10795), of which a comparison's
    classes are "chosen" and "rejected"; the area under the margin is AUM (arXiv 2001.10528).

    Args:
        dynamics: in any order.
    """
    columns = dynamics.columns
    order = np.argsort(columns["step"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    keys = np.stack([columns[name] for name in ("index", "chosen", "rejected")], 1)
    found, of = np.unique(keys, axis=0, return_inverse=True)
    of = of.ravel()
    times = np.bincount(of, minlength=len(found))

    def mean(values: Numbers) -> Numbers:
        return np.asarray(np.bincount(of, values.astype(np.float64), minlength=len(found)) / times)

    last = np.zeros(len(found), np.int64)
    last[of] = np.arange(len(of))  # in the order of training: the last one stays
    margin, gradient = columns["reward_margin"].astype(np.float64), _relative(columns)
    confidence = mean(columns["confidence"])
    row, chosen, rejected = found.T
    return Scores(
        row=row,
        chosen=chosen,
        rejected=rejected,
        times=times,
        confidence=confidence,
        variability=np.sqrt(mean((columns["confidence"] - confidence[of]) ** 2)),
        correctness=mean(margin > 0),
        area=mean(margin),
        gradient=mean(gradient),
        last_gradient=gradient[last],
        reference_margin=columns["reference_margin"][last].astype(np.float64),
        last_loss=columns["loss"][last].astype(np.float64),
        last_margin=margin[last],
    )


def _relative(columns: dict[str, Numbers]) -> Numbers:
    """Shares of gradients, times the comparisons that they are shares among."""
    _, of, counts = np.unique(columns["step"], return_inverse=True, return_counts=True)
    return np.asarray(columns["gradient_share"].astype(np.float64) * counts[of.ravel()])
