"""Run by a test: train one step over all pairs and validate, on one process or on two."""

import functools
import sys

import torch

from training import adapter, data, module, trainer

if __name__ == "__main__":
    model, pairs, root, out, devices = sys.argv[1:]
    ranks = int(devices)
    dpo = module(model, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    run = trainer(root, devices=ranks, strategy="ddp" if ranks > 1 else "auto", num_sanity_val_steps=0, max_epochs=1)
    run.fit(dpo, data(pairs, val=pairs, batch_size=22 // ranks, eval_batch_size=3))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    if run.is_global_zero:
        torch.save({"metrics": metrics, "adapter": adapter(dpo)}, out)
