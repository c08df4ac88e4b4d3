"""A plan in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_dpo.memory import Lengths
from lit_dpo.plan.cards import GIB
from lit_dpo.plan.mesh import REACHED, Links

if TYPE_CHECKING:
    from lit_dpo.plan.plan import MeanStep, Plan
    from lit_dpo.policy import LoRAPolicy


def on_mesh(made: Plan, mean: MeanStep, rates: Sequence[float], network: float) -> dict[str, str]:
    """Say what several devices hold and send.

    Args:
        made: the plan.
        mean: step of the run.
        rates: operations a second, from and to.
        network: 10^9 bits a second of each device's port to other nodes.
    """
    mesh, share, traffic = made.mesh, made.share, made.traffic
    nodes = f"{mesh.nodes} node{'' if mesh.nodes == 1 else 's'} of {mesh.devices}"
    held = f"a share of the base over {mesh.spread}" if mesh.spread > 1 else "the base"
    gathered = f", gathered layers {share.gathered / GIB:.2f}" if mesh.spread > 1 else ""
    found = {
        "devices": f"{mesh.ranks}, {nodes}, `policy.shard` {mesh.shard}. GiB on each, within the above: {held} "
        f"{share.base / GIB:.2f}{gathered}, head and others {share.whole / GIB:.2f}, DDP's buckets "
        f"{share.buckets / GIB:.2f}",
        "reduce": f"{_bytes(traffic.reduced)} of adapters' gradients a step and device"
        f"{'' if traffic.reducing is None else f', {1000 * traffic.reducing:.2g} ms'}, after the last backward pass: "
        "nothing hides it",
    }
    if mesh.spread > 1:
        found["gather"] = (
            f"{_bytes(sum(traffic.gathered))} of the base a micro-batch and device, in {len(mean.passes)} passes; "
            f"{mean.microbatches:.3g} a step{_hides(made, mean, rates)}"
        )
    if made.device.card is not None:
        links = Links.of(made.device.card, network)
        across = f", {mesh.devices * links.network / 1e9:.0f} from node to node ({network:g} Gbit/s a device)"
        found["links"] = (
            f"{links.node / 1e9:.0f} GB/s in a node{across if mesh.nodes > 1 else ''}, in one direction: "
            f"{REACHED:.0%} of what is sold, not measured"
        )
    return found


def _hides(made: Plan, mean: MeanStep, rates: Sequence[float]) -> str:
    """Whether the gathers of a pass hide behind it, at the slowest and the fastest arithmetic."""
    if made.traffic.gathering is None:
        return ""
    passes = f"; of a forward pass {made.traffic.gathering[-2]:.2g} s, and its arithmetic " + " to ".join(
        f"{mean.passes[-2] / rate:.2g}" for rate in reversed(rates)
    )
    slow, fast = (mean.waiting(made.traffic, rate) - (made.traffic.reducing or 0.0) for rate in rates)
    return f"{passes}: hidden" if fast <= 0 else f"{passes}: a step waits {slow:.2g} to {fast:.2g} s for weights"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def text_of(made: Plan, policy: LoRAPolicy, wanted: int, rate: str, of_mesh: Mapping[str, str]) -> str:
    """Write a plan down.

    Args:
        made: the plan.
        policy: of the run.
        wanted: `microbatch_tokens` of the run.
        rate: where the operations a second come from.
        of_mesh: lines about several devices, by what they are called.
    """
    device, ranks = made.device, made.mesh.ranks
    prompt, *completions = made.tokens
    precision = str(device.dtype).removeprefix("torch.")
    cluster = f" on {ranks} devices" if ranks > 1 else ""
    lines = {
        "data": f"{_counted(made)} of {sum(made.tokens):,.0f} tokens (prompt {prompt:,.0f}, completions "
        f"{' and '.join(f'{mean:,.0f}' for mean in completions)}), the longest {made.longest:,}; {made.steps:,} steps, "
        f"{made.epochs:.3g} epoch{'' if made.epochs == 1 else 's'}",
        "model": f"{policy.model}: {made.parameters:,} parameters, {policy.quantization}, computing in {precision}; "
        f"{made.trained:,} train",
        "a step": str(made.step),
        "fits": f"{device.name}, {device.memory / GIB:.1f} GiB: {_fits(made, wanted)}",
        **of_mesh,
        "time": f"{_span(*made.seconds)}{cluster}: {made.arithmetic:.3g} operations, at {rate}",
    }
    return "\n".join(
        ["An estimate; no weights were read or downloaded.", *(f"{name:7} {said}" for name, said in lines.items())]
    )


def means(lengths: Lengths) -> tuple[float, ...]:
    """Average the tokens of prompts, and of first and second completions, or of all of a prompt."""
    if (lengths.completions_per_prompt == 2).all():
        completions = [lengths.completion[place::2].mean() for place in (0, 1)]
    else:
        completions = [lengths.completion.sum() / len(lengths.prompt)]
    return tuple(float(mean) for mean in (lengths.prompt.mean(), *completions))


def _counted(made: Plan) -> str:
    if len(made.tokens) == 3:
        return f"{made.pairs:,} training pairs"
    return f"{made.prompts:,} training prompts, with {made.completions:,} completions in {made.pairs:,} comparisons,"


def _fits(made: Plan, wanted: int) -> str:
    if made.fitting is None:
        return (
            "no, not even with gradient checkpointing, a pair at a time: lower `--data.max_length`, or take less model"
        )
    options = ["`--model.policy.gradient_checkpointing true`"] if made.checkpointing else []
    options += [f"`--model.microbatch_tokens {made.fitting}`"] if made.fitting != wanted else []
    return f"yes, with {' and '.join(options)}" if options else "yes"


def _span(low: float, high: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if high >= 2 * size:
            return f"{low / size:.2g} to {high / size:.2g} {unit}"
    return f"{low:.2g} to {high:.2g} seconds"
