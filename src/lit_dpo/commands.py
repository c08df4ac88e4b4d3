"""What `lit-dpo --help` and `lit-dpo fit --help` say first: text alone, so that it is there at once."""

from __future__ import annotations

COMMANDS = {
    "fit": "train a policy on preference pairs",
    "validate": "measure a policy on the validation pairs",
    "test": "measure a policy on the test pairs",
    "predict": "write the rewards and margins of each pair to a file",
}
"""Those of Lightning's command line."""

TOOLS = {
    "inspect": "say what is wrong with preference data, and what to do about it; no weights are read",
    "audit": "find pairs of a run that look mislabelled, and those that teach nothing",
    "ablate": "train variants (losses, β, references, rates, seeds) and compare them in a report",
    "fork": "go on from one checkpoint in several ways that see the same batches",
    "generate": "complete prompts with a trained policy, next to its reference if you like",
    "export": "write the adapter, or a merged model that was compared with it, with a model card",
    "configs": "list the configuration files that come along; print one; copy them all",
    "completion": "print a script that completes commands and options in bash or zsh",
}
"""Each a module of `lit_dpo.tools` with a `main`."""

_GROUPS = {
    "train and measure": ("fit", "validate", "test", "predict"),
    "look at data": ("inspect", "audit"),
    "compare": ("ablate", "fork"),
    "use what was trained": ("generate", "export"),
    "settings": ("configs", "completion"),
}

FIRST = (
    ("--model.policy.model", "required", "the model: a hub id, a folder, or lit-dpo/quickstart"),
    ("--data.train", "required", "your pairs: a file, a folder, a hub data set as name:split"),
    ("--data.val", "null", "pairs to validate on; or a share of train with --data.val_split 0.1"),
    ("--trainer.max_epochs", "required", "how long to train; or --trainer.max_steps"),
    ("--model.loss", "DPOLoss", "a class, yours too, or a file: `lit-dpo configs`, --model.loss.help IPOLoss"),
    ("--model.loss.beta", "0.1", "how strongly the policy is held to the reference"),
    ("--model.reference", "null", "null is the base model, or the adapter that is continued; CachedReference is quick"),
    ("--model.optimizer.lr", "1e-05", "the learning rate; another class: --model.optimizer torch.optim.Muon"),
    ("--model.lr_scheduler", "linear", "linear, cosine, constant, wsd, or a class of PyTorch"),
    ("--model.warmup_ratio", "0.0", "the share of the steps in which the rate rises"),
    ("--model.policy.quantization", "nf4", "of the base: nf4, int8 or none"),
    ("--model.policy.r", "16", "the rank of the adapters; with it --model.policy.alpha"),
    ("--model.policy.target_modules", "all-linear", "which layers get an adapter"),
    ("--model.policy.adapter_path", "null", "an adapter to go on with, which is then the reference"),
    ("--data.batch_size", "null", "pairs of a batch; null is 8, or as many as --data.max_tokens allows"),
    ("--trainer.accumulate_grad_batches", "1", "batches of a step"),
    ("--model.microbatch_tokens", "null", "tokens in memory at a time, the same steps; null is 1024, on a GPU 16384"),
    ("--data.max_length", "1024", "tokens of prompt and completion; what is longer: --data.truncation"),
    ("--trainer.precision", "null", "null is bf16-mixed where the GPU has it"),
    ("--ckpt_path", "null", "a checkpoint to go on from, or `last`"),
)
"""The twenty settings that people change first: option, default, what it does."""


def overview() -> str:
    """Write the help of `lit-dpo`."""
    every = {**COMMANDS, **TOOLS}
    lines = ["usage: lit-dpo COMMAND [--config FILE] [--key value ...]", ""]
    lines += ["Direct Preference Optimization for PyTorch Lightning.", ""]
    for group, names in _GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<12}{every[name]}" for name in names), ""]
    return "\n".join(lines) + "\n" + _START


_START = """\
options:
  -h, --help  this text; `lit-dpo COMMAND --help` lists the settings of a command
  --version   print the version

start here:
  lit-dpo fit --config configs/quickstart.yaml            no network, no GPU, a few minutes
  lit-dpo fit --config configs/quickstart.yaml --print_config
  lit-dpo inspect --data.train pairs.jsonl --out report   your data, before anything else
  lit-dpo fit --config configs/quickstart.yaml --plan     will it fit, how long will it take
"""


def first_settings(command: str) -> str:
    """Write what stands before the long list of a command's settings."""
    wide = max(len(option) for option, *_ in FIRST)
    lines = [f"usage: lit-dpo {command} [--config FILE] [--key value ...]", ""]
    lines += [f"{COMMANDS[command].capitalize()}.", "", "what people change first, with its default:"]
    lines += [f"  {option:<{wide}} {default:<10} {what}" for option, default, what in FIRST]
    return "\n".join(lines) + _MORE.format(command=command)


_MORE = """

more of one thing:
  --model.help                    all settings of the module; --data.help those of the data
  --model.loss.help IPOLoss       those of one class; likewise --model.policy.help, --model.reference.help CLASS,
                                  --data.format.help CLASS, --trainer.logger.help CLASS; without a class, of the default
  --print_config                  the whole configuration that is typed, as a file; --config FILE reads it
  lit-dpo configs                 the files that come along

all settings of `lit-dpo {command}`:

"""
