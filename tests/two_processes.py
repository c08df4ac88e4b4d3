"""Run by a test: train one step over all pairs and validate, on one process or on two."""

import functools
import math
import sys

import torch

from lit_dpo import CachedReference, losses
from lit_dpo.references import store
from training import adapter, data, module, trainer

if __name__ == "__main__":
    model, pairs, root, out, devices, accumulate, *others = sys.argv[1:]
    ranks = int(devices)
    store._REREAD_SHARE = math.inf  # a missing pair is always looked for among the other rank's, on a busy machine too
    cache, loss = others or (None, "DPOLoss")
    given = {"loss": getattr(losses, loss)(), "reference": CachedReference(directory=cache)} if cache else {}
    rows = {"microbatch_tokens": 200} if ranks > 1 else {}
    dpo = module(model, optimizer=functools.partial(torch.optim.SGD, lr=1.0), **given, **rows)
    epochs = 2 if cache else 1
    strategy = "ddp" if ranks > 1 else "auto"
    steps = {"max_epochs": epochs, "accumulate_grad_batches": int(accumulate), "log_every_n_steps": 50}
    run = trainer(root, devices=ranks, strategy=strategy, num_sanity_val_steps=0, **steps)
    size = 22 if accumulate == "1" else 6  # of all ranks together; the tail of 21 pairs is shared unevenly
    run.fit(dpo, data(pairs, val={"one": pairs, "two": pairs}, batch_size=size // ranks, eval_batch_size=3))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    if run.is_global_zero:
        torch.save({"metrics": metrics, "adapter": adapter(dpo), "state": dpo.loss_state}, out)
