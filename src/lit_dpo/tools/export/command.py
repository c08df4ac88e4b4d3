from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from lit_dpo import hub
from lit_dpo.errors import LitDPOError, PolicyError, ResumeError
from lit_dpo.tools import trained
from lit_dpo.tools.export.card import write_card
from lit_dpo.tools.export.certificate import MAX_DRIFT, MAX_GAP, Certificate
from lit_dpo.tools.export.merging import merge, write_adapter
from lit_dpo.tools.export.probe import probe
from lit_dpo.tools.export.push import check_push, push
from lit_dpo.tools.generate.prompts import set_template
from lit_dpo.writing import written_whole

log = logging.getLogger(__name__)

_OF_MERGE = ("dtype", "max_drift", "max_gap", "probe", "probe_pairs", "merge_base")
_TURNED = 0.05
_DEFAULTS = {"dtype": "bfloat16", "probe_pairs": 64}


@trained.quiet()
def main(args: Sequence[str]) -> None:
    """Run `lit-dpo export`.

    Args:
        args: the command line after `export`.

    Raises:
        LitDPOError: for what cannot be exported, or a merge that drifts; nothing is written then.
    """
    given = _parser().parse_args(args)
    _check(given)
    out = Path(given.out)
    found = trained.find(given.run, given)
    if not found.has_reference:
        raise LitDPOError(
            f"Expected an adapter, a checkpoint or a run but {found.name} is a whole model: nothing to export."
        )
    tokenizer = trained.tokenizer(found)
    set_template(tokenizer, given.chat_template)
    device = trained.device_of(given.device)
    certificate, data = None, {}
    with written_whole(out, new=True) as fresh:
        if given.merge:
            pairs = probe(found, tokenizer, given.probe, given.probe_pairs)
            data = pairs.data if given.probe is None else {}
            certificate = merge(found, tokenizer, pairs, given, fresh, device)
        else:
            _say_if_changed(found)
            write_adapter(found, tokenizer, fresh, device)
        write_card(fresh, found, data, certificate)
    if certificate is not None:
        print(table(certificate))
        _say_turned(certificate)
    print(f"{'merged weights' if given.merge else 'adapter'}, tokenizer and model card are in {out}")
    if given.push:
        print(push(out, given.push, private=given.private, existing=given.push_to_existing))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-dpo export",
        usage="lit-dpo export RUN OUT [--merge] [--push ORG/NAME] [--option value ...]",
        description="Write what was trained to a new folder: the adapter, or with --merge whole weights and a "
        "certificate of what merging changed; with tokenizer, chat template and a model card.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run's folder, an adapter's, a .ckpt, or a hub id of an adapter")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--merge", action="store_true", help="merge into a freshly loaded base that is not quantised")
    group = parser.add_argument_group("with --merge")
    group.add_argument("--dtype", choices=tuple(MAX_DRIFT), help="of what is written; default: bfloat16")
    group.add_argument(
        "--max_drift",
        type=float,
        help="most nats per token that rounding may move a completion's log-probs; default: "
        + ", ".join(f"{bound:g} ({name})" for name, bound in MAX_DRIFT.items()),
    )
    group.add_argument(
        "--max_gap",
        type=float,
        help=f"most mean nats per token between what was trained and what is merged; default: {MAX_GAP:g} where the "
        "base is not known to be the one that was trained on",
    )
    group.add_argument(
        "--probe", help="pairs to certify on: any source that `data.train` reads; default: held-out ones of the run"
    )
    group.add_argument("--probe_pairs", type=int, help="most prompts of them; default: 64")
    group.add_argument(
        "--merge_base", help="the base to merge into, where it was trained on weights that are quantised on the disk"
    )
    parser.add_argument("--chat_template", help="a file with another chat template, in Jinja, to go along")
    hub = parser.add_argument_group("the hub")
    hub.add_argument("--push", metavar="ORG/NAME", help="upload the folder to a new repository")
    hub.add_argument("--private", action="store_true", help="the new repository is private")
    hub.add_argument("--push_to_existing", action="store_true", help="add a commit to a repository that is there")
    trained.add_arguments(parser)
    return parser


def _check(given: argparse.Namespace) -> None:
    """See that what is typed goes together, and that nothing is in the way, before anything is read."""
    typed = [name for name in _OF_MERGE if getattr(given, name) is not None]
    if typed and not given.merge:
        raise LitDPOError(f"`--{typed[0]}` has no effect without `--merge`: leave it out.")
    if (given.private or given.push_to_existing) and not given.push:
        name = "private" if given.private else "push_to_existing"
        raise LitDPOError(f"`--{name}` has no effect without `--push`: leave it out.")
    for name, value in _DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for name in ("max_drift", "max_gap"):
        if (value := getattr(given, name)) is not None and not value > 0:
            raise LitDPOError(f"Expected `--{name}` > 0 but got {value}.")
    if given.probe_pairs < 1:
        raise LitDPOError(f"Expected `--probe_pairs` >= 1 but got {given.probe_pairs}.")
    if Path(given.out).exists() or Path(given.out).is_symlink():
        raise LitDPOError(f"Expected a new folder to export to but {given.out} is there: name another.")
    if given.push:
        check_push(given.push)


def _say_if_changed(found: trained.Trained) -> None:
    """Say that the base on this machine is no longer the one that was trained on; the adapter is right all the same."""
    try:
        if hub.has_weights(found.policy.place.folder):
            trained.check_base(found)
    except ResumeError as error:
        log.warning("%s", error)
    except PolicyError:  # it is not on this machine, and is not needed
        pass


def _say_turned(c: Certificate) -> None:
    """Say what to do where quantisation was worth more than a few preferences."""
    if c.turned > _TURNED * c.pairs:
        log.warning(
            "%d of %d comparisons are preferred the other way round: what was learned on %s does not hold without its "
            "quantisation. Serve the adapter on that, or train with `--model.policy.quantization none`",
            c.turned,
            c.pairs,
            c.trained_as,
        )


def table(c: Certificate) -> str:
    """Write what the certificate says, for a terminal."""
    bound = "" if c.max_gap is None else f" (of {c.max_gap:g})"
    rows = [
        ("", "before", "after"),
        ("reward accuracy", f"{c.before.accuracy:.4f}", f"{c.after.accuracy:.4f}"),
        ("margin to the base, nats", f"{c.before.margin:.4f}", f"{c.after.margin:.4f}"),
        ("drift, nats per token", "mean", "largest"),
        (f"  rounding to {c.dtype}", f"{c.rounding.mean:.2g}", f"{c.rounding.largest:.2g} (of {c.max_drift:g})"),
        ("  from what was trained", f"{c.gap.mean:.2g}{bound}", f"{c.gap.largest:.2g}"),
        ("  of the bases alone", f"{c.base_gap.mean:.2g}", f"{c.base_gap.largest:.2g}"),
    ]
    lines = [f"{one:<26} {two:>18} {three:>18}" for one, two, three in rows]
    said = f"certified on {c.pairs} comparisons, {c.probe}; preferred the other way round: {c.turned}"
    return "\n".join([said, *lines])
