"""The `lit-dpo` command. Its help is instant: Lightning, torch and transformers load when there is work for them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lit_dpo import tools
from lit_dpo.commands import COMMANDS, TOOLS, first_settings, overview
from lit_dpo.errors import LitDPOError, explanation, printable
from lit_dpo.names import did_you_mean, nearest
from lit_dpo.writing import refusal

_LIGHT = ("configs", "completion")  # these need neither torch nor Lightning


def main(args: Sequence[str] | None = None) -> None:
    """Run `lit-dpo`; tests call it with a list of arguments.

    Exits with 1 after an error that the user can put right, printed without a traceback, with 2 after a mistake in the
    arguments, and as a shell says it after a signal: with 143 after SIGTERM, with 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(overview(), end="")
        return
    if given[0] == "--version":
        from lit_dpo import __version__

        print(f"lit_dpo {__version__}")
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `--model my_lab.Module` finds the project the user stands in
    if given[0] in COMMANDS and {"-h", "--help"} & {*given[1:]}:
        print(first_settings(given[0]), end="", flush=True)  # at once; the long list takes seconds
    try:
        _run(given, args is None)
    except LitDPOError as error:
        sys.stderr.write(f"lit-dpo: error: {printable(str(error))}\n")
        raise SystemExit(1) from None
    except BrokenPipeError:  # `lit-dpo configs | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        sys.stderr.write("lit-dpo: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as stop:  # Lightning's for SIGTERM has no status, and would look like success; for Ctrl-C it is 1
        if type(stop).__name__ == "SIGTERMException":
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except Exception as error:
        # of a library, about something outside that a callback has put into words; of a disk, wherever it came up
        if not (said := explanation(error) or refusal(error)):
            raise
        sys.stderr.write(f"lit-dpo: error: {said}\n")
        raise SystemExit(1) from None


def _run(given: list[str], from_shell: bool) -> None:
    name = given[0]
    if name in TOOLS and importlib.util.find_spec(f"{tools.__name__}.{name}") is not None:
        if name not in _LIGHT:
            _import_quickly()
        with _sigterm_ends():
            importlib.import_module(f"{tools.__name__}.{name}").main(given[1:])
        return
    if name not in COMMANDS and not name.startswith("-"):
        guess = did_you_mean(nearest(name, [*COMMANDS, *TOOLS])) or ": `lit-dpo --help` lists the commands."
        sys.stderr.write(printable(f"lit-dpo: error: There is no command {name}{guess}\n"))
        raise SystemExit(2)
    _import_quickly()
    from lit_dpo.lightning_cli import LitDPOCLI

    LitDPOCLI(args=None if from_shell else given)


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Let a tool clear away what is half-written after SIGTERM, as after Ctrl-C; Lightning has a way of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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
