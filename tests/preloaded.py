"""What the server of `ranks.py` imports before it forks: all that a run imports."""

from __future__ import annotations

import importlib

for _name in (
    *("lit_dpo", "lit_dpo.cli", "lit_dpo.lightning_cli", "lit_dpo.module", "lit_dpo.losses", "lit_dpo.tools.ablate"),
    *("lightning.pytorch.cli", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torch.utils.tensorboard"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft.tuners.lora"),
    *("bitsandbytes", "datasets", "pyarrow.parquet", "pandas", "tokenizers", "training", "stops"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"),
):
    importlib.import_module(_name)
