"""Ranks as SLURM starts them: told to stop, they end after one batch, together."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import ranks

SLURM = Path(__file__).parents[1] / "configs" / "trainers" / "slurm.yaml"
HERE = {"accelerator": "cpu", "precision": "32-true", "devices": "2", "num_nodes": "1", "log_every_n_steps": "1"}


def _srun(folder, name, words):
    """Start both ranks, as `srun` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    job |= {"SLURM_JOB_ID": "61234", "SLURM_JOB_NAME": "dpo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        ranks.command(
            words,
            log=folder / f"{name}-{rank}.log",
            cwd=folder,
            environment={**os.environ, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=str)
def test_ranks_that_are_told_to_stop_do_so_together(tiny_model, pairs_file, tmp_path, told):
    words = ["fit", "--trainer", str(SLURM), "--model.policy.model", str(tiny_model), "--data.train", str(pairs_file)]
    words += ["--model.policy.quantization", "none", "--data.batch_size", "2", "--trainer.max_epochs", "500"]
    words += ["--trainer.callbacks+", "training.Unestimated"]
    words += [word for name, value in HERE.items() for word in (f"--trainer.{name}", value)]
    both = _srun(tmp_path, "first", words)
    try:
        until = time.monotonic() + 120
        while "epoch 2 of" not in both[0].output() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.13)  # somewhere in a batch
        for rank in told:
            os.kill(both[rank].pid, signal.SIGTERM)
        assert [one.wait(40) for one in both] == [143, 143], "\n".join(one.output()[-2000:] for one in both)
    finally:
        for one in both:
            one.kill()
    (file,) = tmp_path.rglob("last.ckpt")
    assert "to go on, repeat it with --ckpt_path" in both[0].output()
    made = torch.load(file, weights_only=True)["global_step"]
    assert f"stopped after {made} steps" in both[0].output()
