"""lit_dpo compared with TRL on this card, and later epochs: `compare.py` and `epochs.py` at the sizes of a card."""

from __future__ import annotations

from pathlib import Path

import compare
from gpu_run import Run

ALL = ("lit_dpo", "trl", "trl-best")
FEW, ALONE = ("lit_dpo", "trl-best"), ("lit_dpo",)  # in a rehearsal, where imports are most of the time
CHAT, LONG = "300,250", "1500,150"  # mean tokens of a prompt and of an answer


def bf16_chat(run: Run) -> str:
    """The base in 16 bits, chat lengths."""
    return compared(run, CHAT, "none", 8, ALL)


def bf16_long(run: Run) -> str:
    """The base in 16 bits, long prompts."""
    return compared(run, LONG, "none", 4, ALONE if run.rehearsed else ALL)


def nf4_chat(run: Run) -> str:
    """The base in 4 bits, chat lengths."""
    return compared(run, CHAT, "nf4", 8, ALONE if run.rehearsed else ALL)


def nf4_long(run: Run) -> str:
    """The base in 4 bits, long prompts."""
    return compared(run, LONG, "nf4", 4, FEW if run.rehearsed else ALL)


def eight_billion(run: Run) -> str:
    """A larger shape in 4 bits, where memory is; both sides with activation checkpoints: two such models must fit."""
    return compared(run, CHAT, "nf4", 4, ("lit_dpo-checkpoints", "trl"), shape="8B", steps=4)


def compared(
    run: Run, made: str, quantization: str, batch: int, sides: tuple[str, ...], shape: str = "1B", steps: int = 10
) -> str:
    """Losses equal, then time, memory and model FLOP utilisation."""
    command = ["--device", run.device, "--shape", shape, "--made", made, "--quantization", quantization]
    command += ["--batch-size", str(batch), "--steps", str(steps), "--warmup", "3", "--max-length", "2048"]
    command += ["--threads", "4", "--store", str(store(run)), "--sides", *sides]
    if run.rehearsed:  # of an option that is given twice the last one holds
        short = {CHAT: "30,25", LONG: "75,8"}[made]
        command += ["--shape", "tiny", "--made", short, "--batch-size", "2", "--threads", "1", "--max-length", "256"]
        command += ["--steps", "2", "--warmup", "1"]
    found = compare.compare(compare.arguments(command))
    run.note(**found, command=command)
    notes = [f"{side} left out: {why}" for side, why in found["dropped"].items()]
    notes += [
        f"{side} without {kind}"
        for side, kinds in found["extras"].items()
        for kind, there in kinds.items()
        if not there
    ]
    if found["differs"]:
        run.note(line="; ".join(notes))
        raise RuntimeError(found["differs"])
    first, *others = found["sides"]
    mine = found["sides"][first]
    parts = [
        f"{first} {mine['pairs/s']:.4g} pairs/s, {mine['peak GiB']:.2f} GiB, {mine['of a matrix product']:.0%} MFU"
    ]
    for side in others:
        theirs, ratio = found["sides"][side], found[f"over {first}"][side]
        parts.append(
            f"{side} {ratio['time']:.2f}× the time ({theirs['pairs/s']:.4g} pairs/s), {ratio['peak memory']:.2f}× the "
            f"memory, {theirs['of a matrix product']:.0%} MFU, losses within {found['losses differ by'][side]:.1e}"
        )
    run.note(line="; ".join(parts + notes))
    # TRL not installed drops its side; TRL that fails is a failure
    if broken := [side for side, why in found["dropped"].items() if not why.endswith("not installed")]:
        raise RuntimeError(f"{', '.join(broken)} failed")
    return str(run.found["line"])


def epochs(run: Run) -> str:
    """The first epoch and later ones with the reference remembered; the pairs of `d-bf16-chat`."""
    import epochs as program

    pairs, batch = (8, 2) if run.rehearsed else (96, 8)
    command = ["--device", run.device, "--shape", "1B", "--vocabulary", "128256", "--made", CHAT, "--pairs", str(pairs)]
    command += ["--batch-size", str(batch), "--epochs", "3", "--repeats", "1", "--max-length", "2048"]
    command += ["--store", str(store(run))]
    if run.rehearsed:
        command += ["--shape", "tiny", "--vocabulary", "8192", "--made", "30,25", "--max-length", "256"]
    found = program.compare(program.arguments(command))
    rate = pairs / found["later epoch, cached"]
    run.note(**found, command=command, **{"pairs/s, later epochs": rate})
    line = (
        f"a later epoch {found['plain epoch'] / found['later epoch, cached']:.2f}× faster than a plain one "
        f"({rate:.4g} pairs/s), the first {found['first epoch, cached'] / found['plain epoch']:.2f}× its time; losses "
        f"within {found['losses differ by']:.1e}"
    )
    for side, theirs in run.before.get("d-bf16-chat", {}).get("sides", {}).items():
        if side.startswith("trl"):
            line += f"; {rate / theirs['pairs/s']:.2f}× {side}"
    return line


def store(run: Run) -> Path:
    """Where random weights stay for the phases that follow."""
    folder = run.folder / "weights"
    folder.mkdir(exist_ok=True)
    return folder
