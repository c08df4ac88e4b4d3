"""The model card: what it was made of and by, what was measured, and how to make it again. No row's text."""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from pathlib import Path
from typing import Any

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.environment import FILE, starts
from lit_dpo.hub import looks_like_id
from lit_dpo.tools.export.certificate import Certificate
from lit_dpo.tools.trained import Trained

CONFIG = "training.yaml"
"""Copy of the run's configuration file, next to the card."""

_PACKAGES = ("lit_dpo", "torch", "lightning", "transformers", "peft", "bitsandbytes")
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!])")
_ARXIV = re.compile(r"arXiv[: ]+(\d{4}\.\d{4,5})")


def write_card(folder: Path, trained: Trained, data: Mapping[str, Any], certificate: Certificate | None) -> None:
    """Write `README.md`, and the run's configuration next to it.

    Args:
        folder: what is exported.
        trained: what it was made of.
        data: counts of the run's splits where the run itself does not say them; see `data_facts`.
        certificate: of a merge.
    """
    if trained.config is not None:
        (folder / CONFIG).write_bytes(trained.config.read_bytes())
    (folder / "README.md").write_text(card(trained, data, certificate), encoding="utf-8", newline="\n")


def card(trained: Trained, data: Mapping[str, Any], certificate: Certificate | None) -> str:
    """Return the card's text: YAML that the hub reads, and Markdown in which all text of others is escaped."""
    from huggingface_hub import ModelCard

    data = trained.said.get("data") or data
    sections = [
        _head(trained, certificate),
        _method(trained),
        _data(data),
        _measures(measures(trained)),
        [] if certificate is None else _certified(certificate),
        _again(trained, certificate),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    front = _metadata(trained, data, merged=certificate is not None).to_yaml()
    content = f"---\n{front}\n---\n\n{text}\n"
    return str(ModelCard(content))  # reads the front matter, and raises if it is none


def plain_markdown(text: object) -> str:
    r"""Return text in which nothing is Markdown, HTML or a control character; in one line.

    Example:
        >>> print(plain_markdown("<b>a|b</b>\n# c"))
        \<b\>a\|b\</b\> \# c
    """
    said = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+", " ", str(text)).split())
    return _SPECIAL.sub(r"\\\1", said)


def _metadata(trained: Trained, data: Mapping[str, Any], *, merged: bool) -> Any:
    from huggingface_hub import ModelCardData

    base = _base(trained)
    names = [str(name).partition("@")[0].partition(":")[0] for one in data.values() for name in one.get("sources", ())]
    sets = sorted({name for name in names if looks_like_id(name) and not Path(name).exists() and "." not in name})
    return ModelCardData(
        base_model=base if looks_like_id(base) and base != "lit-dpo/quickstart" else None,
        datasets=sets or None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "lit_dpo", *([] if merged else ["lora"])],
    )


def _base(trained: Trained) -> str:
    known = trained.said.get("base", {}).get("model")
    return str(known or trained.policy.model)


def _head(trained: Trained, certificate: Certificate | None) -> list[str]:
    base, known = _base(trained), trained.said.get("base", {})
    what = "A LoRA adapter (PEFT)" if certificate is None else f"Merged weights ({certificate.dtype}, safetensors)"
    name = base if looks_like_id(base) else Path(base).name
    lines = [f"# {plain_markdown(name)}, preference-tuned", "", f"{what}, trained with lit_dpo.", "", "## Base", ""]
    rows = [("model", name), ("revision asked for", known.get("revision")), ("commit", known.get("commit"))]
    rows += [("content", known.get("fingerprint")), ("in training", _quantised(trained))]
    return lines + _table(("", ""), [row for row in rows if row[1]])


def _quantised(trained: Trained) -> str:
    policy = trained.policy
    double = ", scales quantised too" if policy.quantization == "nf4" and policy.double_quantization else ""
    return f"quantization {policy.quantization}{double}"


def _method(trained: Trained) -> list[str]:
    loss = trained.said.get("loss")
    lines = ["## Method", ""]
    if not loss:
        return [*lines, "The adapter does not say which loss it was trained with."]
    for name, arguments, papers in _losses(loss):
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        lines.append(f"- {plain_markdown(name)}({plain_markdown(given)}){f': {links}' if links else ''}")
    reference = trained.said.get("reference", {}).get("class_path")
    if reference:
        lines.append(f"- reference: {plain_markdown(str(reference).rpartition('.')[2])}")
    policy = trained.said.get("policy", {})
    shown = ("r", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "target_parameters")
    if options := ", ".join(f"{name}={policy[name]}" for name in shown if policy.get(name)):
        lines.append(f"- adapter: {plain_markdown(options)}")
    steps = trained.said.get("steps")
    # a checkpoint also keeps how its steps are made under this name
    return lines if not steps or isinstance(steps, Mapping) else [*lines, f"- {plain_markdown(steps)} optimizer steps"]


def _losses(loss: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yield a loss's name, plain arguments and papers; then those of the losses that it is made of."""
    path, arguments = str(loss.get("class_path", "")), dict(loss.get("init_args") or {})
    inner = [one for value in arguments.values() for one in (value if isinstance(value, list) else [value])]
    inner = [one for one in inner if isinstance(one, Mapping) and "class_path" in one]
    own = {
        key: value
        for key, value in arguments.items()
        if not isinstance(value, Mapping)
        and not (isinstance(value, list) and any(isinstance(v, Mapping) for v in value))
    }
    yield path.rpartition(".")[2], own, _papers(path)
    for one in inner:
        yield from _losses(one)


def _papers(path: str) -> list[str]:
    """List what the docstring of one of our losses cites; the file of a stranger imports nothing else."""
    if not path.startswith("lit_dpo.losses."):
        return []
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return []
    return list(dict.fromkeys(_ARXIV.findall(getdoc(found) or "")))


def _data(data: Mapping[str, Any]) -> list[str]:
    if not data:
        return ["## Data", "", "What it was trained on is not recorded."]
    rows = [
        (
            split,
            ", ".join(map(str, one.get("sources", ()))),
            *(one.get(name) for name in ("rows", "dropped", "prompts", "comparisons")),
        )
        for split, one in data.items()
    ]
    return ["## Data", "", *_table(("split", "sources", "rows", "dropped", "prompts", "comparisons"), rows)]


def measures(trained: Trained) -> dict[str, float]:
    """Return what was measured last on held-out pairs: by the run's record, or its TensorBoard files."""
    if (said := trained.said.get("measures")) is not None:
        return {name: value for name, value in said.items() if name.startswith(("val/", "test/"))}
    if trained.config is None or not any(trained.config.parent.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(trained.config.parent), {"scalars": 0})
    events.Reload()
    until, found = trained.said.get("steps") if trained.kind == "checkpoint" else None, {}
    for name in events.Tags()["scalars"]:
        values = [one.value for one in events.Scalars(name) if until is None or one.step <= until]
        if values and name.startswith(("val/", "test/")):
            found[name] = values[-1]
    return found


def _measures(found: Mapping[str, float]) -> list[str]:
    if not found:
        return []
    rows = [(name, f"{value:.4g}") for name, value in sorted(found.items())]
    return [
        "## Measures",
        "",
        "Last values of the run, on pairs that were held out.",
        "",
        *_table(("measure", "value"), rows),
    ]


def _certified(c: Certificate) -> list[str]:
    rows: list[Sequence[Any]] = [
        ("reward accuracy", f"{c.before.accuracy:.4f}", f"{c.after.accuracy:.4f}"),
        ("mean margin to the base (nats)", f"{c.before.margin:.4f}", f"{c.after.margin:.4f}"),
    ]
    drifts: list[Sequence[Any]] = [
        ("rounding to " + c.dtype, f"{c.rounding.mean:.2g}", f"{c.rounding.largest:.2g}", f"largest ≤ {c.max_drift:g}"),
        (
            "from what was trained",
            f"{c.gap.mean:.2g}",
            f"{c.gap.largest:.2g}",
            "" if c.max_gap is None else f"mean ≤ {c.max_gap:g}",
        ),
        ("of the bases alone, by quantisation", f"{c.base_gap.mean:.2g}", f"{c.base_gap.largest:.2g}", ""),
    ]
    untied = (
        ["", "Embeddings and head were one weight, and are two here: the adapter changes one of them."]
        if c.untied
        else []
    )
    return [
        "## Certificate of the merge",
        "",
        f"{c.pairs} comparisons ({plain_markdown(c.probe)}; {c.completions} completions, {c.tokens} tokens), scored "
        "before merging, and from the merged files.",
        "",
        f"Trained on {plain_markdown(c.trained_as)}; merged into {plain_markdown(c.base)}.",
        "",
        *_table(("", "before", "after"), rows),
        "",
        f"Comparisons that are preferred the other way round: {c.turned}.",
        "",
        *_table(("drift of log-probs, nats per token", "mean", "largest completion", "bound"), drifts),
        *untied,
    ]


def _again(trained: Trained, certificate: Certificate | None) -> list[str]:
    lines = ["## Made by", ""]
    if trained.config is not None:
        merged = "" if certificate is None else f" --merge --dtype {certificate.dtype}"
        lines += ["```bash", f"lit-dpo fit --config {CONFIG}", f"lit-dpo export runs/version_0 OUT{merged}", "```", ""]
    exported = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    if (said := _environment(trained)) is None:
        return [*lines, exported]
    return [*lines, f"Trained with {said}.", "", f"Exported with {exported}."]


def _environment(trained: Trained) -> str | None:
    """Say with which versions, at which commit and on what the run was made, by the last start of its training."""
    with alone(f"The {FILE} of the run"):  # it only shows; a file of a stranger may hold anything
        found = [] if trained.config is None else starts(trained.config.parent)
        last = next((one for one in reversed(found) if one.get("stage") == "fit"), None)
        if last is None:
            return None
        versions = {**last["packages"], "lit_dpo": last["lit_dpo"]["version"]}
        commit, hardware = last["lit_dpo"]["commit"], last["hardware"]
        changed = ", changed" if last["lit_dpo"]["changed"] else ""
        gpus = Counter(one["name"] for one in hardware.get("gpus", ()))
        said = [f"Python {last['python']}", *(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)]
        if commit:
            said[1] += f" (commit {commit:.12}{changed})"
        on = ", ".join(f"{count} × {name}" for name, count in gpus.items()) or hardware["processor"]
        return plain_markdown(f"{', '.join(said)}; {hardware['ranks']} process(es) on {on}")
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _table(head: Iterable[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(plain_markdown(cell) for cell in row)} |" for row in rows]
