"""Everything that a GPU must show, in one command: a table, and every figure in a file.

    python benchmarks/gpu.py --out results            # what fits in eight minutes of one GPU; nothing is downloaded
    python benchmarks/gpu.py --minutes 20             # all of it
    python benchmarks/gpu.py --rehearse               # the same functions on a CPU, with tiny shapes
    python benchmarks/gpu.py --only d-8b --minutes 5  # one phase

Phases come in order of value, since a card may be at hand for minutes only. First whether it is right: the card (`a`),
the laws (`b`), the quickstart to its accuracy (`c`). Then one answer to each question: is it faster and smaller than
TRL (`d-bf16-chat`), is the memory estimate right (`g`), where does the time of a step go (`e`), what do later epochs
cost (`d-epochs`), what do 4 bits and long prompts change (`d-nf4-long`), which defaults are best (`f`). Then the second
look at what was answered, and the 8B shape last: it takes longest and says least that is new.

Each phase has a process group of its own, which is ended with its children when its time is over. What it has found is
in `gpu.json` as soon as it is known, so a program that is stopped or killed leaves the finished phases. The status is 0
if all phases ended well or were left out by name: no time, or a package that is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from gpu_run import Phase, Run, main


def of(module: str, name: str) -> Callable[[Run], str]:
    """A function that is imported in the phase's own process: what starts phases stays light."""

    def run(run: Run) -> str:
        found: str = getattr(import_module(module), name)(run)
        return found

    return run


# Builds the quickstart's model on the CPU while the phases before it use the card.
QUICKSTART = "from lit_dpo.quickstart import quickstart_directory; quickstart_directory()"

# Seconds that each may take in any case, more than expected: on a GPU, and in a rehearsal.
PHASES = [
    Phase("a-card", of("gpu_machine", "card"), 30, 10),
    Phase("b-tests", of("gpu_machine", "laws"), 130, 60),
    Phase("c-quickstart", of("gpu_machine", "quickstart"), 60, 45, QUICKSTART),
    Phase("d-bf16-chat", of("gpu_compare", "bf16_chat"), 110, 40),
    Phase("g-memory", of("gpu_steps", "memory"), 80, 20),
    Phase("e-step", of("gpu_profile", "kernels"), 65, 15),
    Phase("d-epochs", of("gpu_compare", "epochs"), 110, 15),
    Phase("d-nf4-long", of("gpu_compare", "nf4_long"), 100, 25),
    Phase("f-sweeps", of("gpu_steps", "sweeps"), 130, 20),
    Phase("d-nf4-chat", of("gpu_compare", "nf4_chat"), 100, 25),
    Phase("d-bf16-long", of("gpu_compare", "bf16_long"), 100, 25),
    Phase("d-8b", of("gpu_compare", "eight_billion"), 150, 25),
]

if __name__ == "__main__":
    sys.exit(main(PHASES, __doc__))
