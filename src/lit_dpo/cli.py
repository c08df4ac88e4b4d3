"""The `lit-dpo` command. Its help is instant: Lightning, torch and transformers load when there is work for them."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

_HELP = """usage: lit-dpo {fit,validate,test,predict,inspect,configs} [--config FILE] [--key value ...]

Direct Preference Optimization for PyTorch Lightning.

commands:
  fit         train a policy on preference pairs
  validate    measure a policy on the validation pairs
  test        measure a policy on the test pairs
  predict     write the rewards and margins of each pair to a file
  inspect     say what is wrong with preference data, and what to do about it; no weights are read
  configs     list the configuration files that come along; `lit-dpo configs copy` makes a folder of them

options:
  -h, --help  this text; `lit-dpo fit --help` lists the settings of fit
  --version   print the version

start here:
  lit-dpo fit --config configs/quickstart.yaml       no network, no GPU, a few minutes
  lit-dpo fit --config configs/quickstart.yaml --print_config
  lit-dpo inspect --data.train pairs.jsonl --out report   your data, before anything else
  lit-dpo fit --config configs/quickstart.yaml --plan     will it fit, how long will it take
"""


_TOOLS = ("configs", "inspect", "ablate", "fork", "audit", "generate", "export")
"""Each a module of `lit_dpo.tools` with a `main`."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `lit-dpo`; tests call it with a list of arguments.

    Exits with 1 after an error that the user can put right, printed without a traceback, with 2 after a mistake in the
    arguments, and with 143 after SIGTERM, as a shell says it.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    if given[0] == "--version":
        from lit_dpo import __version__

        print(f"lit_dpo {__version__}")
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `--model my_lab.Module` finds the project the user stands in
    from lit_dpo.errors import LitDPOError

    try:
        if given[0] not in ("configs",):  # which needs none of it
            _import_quickly()
        if given[0] in _TOOLS:
            from lit_dpo import tools

            importlib.import_module(f"{tools.__name__}.{given[0]}").main(given[1:])
            return
        from lit_dpo.lightning_cli import LitDPOCLI

        LitDPOCLI(args=None if args is None else given)
    except LitDPOError as error:
        sys.stderr.write(f"lit-dpo: error: {error}\n")
        raise SystemExit(1) from None
    except SystemExit as stop:  # Lightning's for SIGTERM has no status, and would look like success
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if isinstance(stop, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        raise


def _import_quickly() -> None:
    """Look for no garbage while modules are imported, nor among them later: they make a million objects, and none."""
    if "lit_dpo.lightning_cli" in sys.modules:  # what is there by now may be garbage one day
        return
    # of a kernel for inference, from a hub; on some CPUs it is asked for at import
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    collects = gc.isenabled()
    gc.disable()
    try:
        import peft  # noqa: F401 - the parser looks into it for each command

        import lit_dpo.lightning_cli  # noqa: F401
    finally:
        gc.freeze()
        if collects:
            gc.enable()
