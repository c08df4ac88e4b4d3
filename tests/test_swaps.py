"""Configuration never changes a number that nobody typed.

A class that is chosen has its own defaults and what was typed for it, whatever class, default or file stood there
before, in every spelling.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
import yaml

import lit_dpo.references as references
from lit_dpo import DPOModule
from swaps import (
    CONFIGS,
    LOSSES,
    Outer,
    Strong,
    StrongDPO,
    arguments_of,
    class_of,
    own_defaults,
    parser_of,
    path_of,
    plain,
    signature_defaults,
)

OPTIMIZERS = [
    one for _, one in sorted(vars(torch.optim).items()) if isinstance(one, type) and one is not torch.optim.Optimizer
    and issubclass(one, torch.optim.Optimizer)
] + [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Lion8bit]  # fmt: skip


# ---- losses ----


@pytest.fixture(scope="module")
def loss_of():
    parser = parser_of(DPOModule, "loss")
    return lambda *arguments: plain(parser.parse_args(list(arguments)).of.loss)


@pytest.mark.parametrize("loss", [*LOSSES, Strong, StrongDPO, Outer], ids=lambda one: one.__name__)
def test_a_loss_that_is_named_has_the_defaults_of_its_class(loss_of, loss):
    for name in (loss.__name__, path_of(loss)):
        found = loss_of(f"--of.loss={name}")
        assert class_of(found) is loss
        assert arguments_of(found) == own_defaults(loss)


def _befores(loss: type, here: Path) -> list[list[str]]:
    """How a loss, with something typed for it, may stand there: by a file, with its fragment if it has one, or not."""
    name, fragment = path_of(loss), CONFIGS / "losses" / f"{loss.__name__.removesuffix('Loss').lower()}.yaml"
    typed = {"beta": 0.77} if any(field.name == "beta" and field.init for field in dataclasses.fields(loss)) else {}
    spec = str(fragment) if fragment.is_file() else {"class_path": name, "init_args": typed}
    file = here / f"{loss.__name__}.yaml"
    file.write_text(yaml.safe_dump({"of": {"loss": spec}}))
    arguments = [f"--of.loss={name}", *(f"--of.loss.{key}={value}" for key, value in typed.items())]
    return [["--config", str(file)], arguments]


def _afters(loss: type, here: Path) -> list[list[str]]:
    """How another may be named after it, with nothing typed for it."""
    name, short = path_of(loss), loss.__name__
    spec = {"class_path": name}
    files = {
        "after.fragment": spec,
        "after": {"of": {"loss": spec}},
        "after.name": {"of": {"loss": short}},
        "after.empty": {"of": {"loss": {**spec, "init_args": {}}}},
    }
    for file, content in files.items():
        (here / f"{short}.{file}.yaml").write_text(yaml.safe_dump(content))
    return [
        [f"--of.loss={short}"],
        [f"--of.loss={name}"],
        ["--of.loss", json.dumps(spec)],
        [f"--of.loss={here}/{short}.after.fragment.yaml"],
        ["--of", json.dumps({"loss": spec})],
        *(["--config", f"{here}/{short}.{file}.yaml"] for file in list(files)[1:]),
    ]


def test_every_loss_after_every_other_has_its_own_defaults(loss_of, tmp_path):
    """All ordered pairs of arguments: each loss before and after one of every other kind, in turn, in all ways.

    Losses of the same arguments are of a kind: what one leaves and another takes is said by their names.
    """
    mine = [*LOSSES, Strong, StrongDPO, Outer]
    kinds: dict[tuple[str, ...], list[type]] = {}
    for one in mine:
        kinds.setdefault(tuple(sorted(field.name for field in dataclasses.fields(one) if field.init)), []).append(one)
    befores_of, afters_of = ({names: itertools.cycle(every) for names, every in kinds.items()} for _ in range(2))
    pairs = [(next(befores_of[one]), next(afters_of[two])) for one, two in itertools.permutations(kinds, 2)]
    pairs += [pair for every in kinds.values() for pair in itertools.pairwise([*every, every[0]]) if pair[0] != pair[1]]
    befores = {one: itertools.cycle(_befores(one, tmp_path)) for one in mine}
    afters = {one: itertools.cycle(_afters(one, tmp_path)) for one in mine}
    alone = {one: loss_of(f"--of.loss={path_of(one)}").get("init_args") for one in mine}
    for before, after in pairs:
        arguments = [*next(befores[before]), *next(afters[after])]
        found = loss_of(*arguments)
        assert class_of(found) is after, arguments
        assert found.get("init_args") == alone[after], arguments
    assert {before for before, _ in pairs} == {after for _, after in pairs} == {*mine}


@pytest.mark.parametrize("kind", range(8))
def test_what_is_typed_for_a_loss_holds_in_every_spelling(loss_of, tmp_path, kind):
    (tmp_path / "dpo.yaml").write_text("of:\n  loss: {class_path: DPOLoss, init_args: {beta: 0.3}}\n")
    (tmp_path / "fragment.yaml").write_text("class_path: SimPOLoss\ninit_args: {gamma: 3}\n")
    (tmp_path / "simpo.yaml").write_text("of:\n  loss: {class_path: SimPOLoss, init_args: {gamma: 3}}\n")
    (tmp_path / "later.yaml").write_text("of:\n  loss: {init_args: {gamma: 3}}\n")
    (tmp_path / "link.yaml").write_text("of:\n  loss: fragment.yaml\n")
    after = [
        ["--of.loss=SimPOLoss", "--of.loss.gamma=3"],
        ["--of.loss=lit_dpo.losses.SimPOLoss", "--of.loss.init_args.gamma=3"],
        ["--of.loss", '{"class_path": "SimPOLoss", "init_args": {"gamma": 3}}'],
        [f"--of.loss={tmp_path}/fragment.yaml"],
        [f"--config={tmp_path}/simpo.yaml"],
        ["--of.loss=SimPOLoss", f"--config={tmp_path}/later.yaml"],
        [f"--config={tmp_path}/link.yaml"],
        ["--of", '{"loss": {"class_path": "SimPOLoss", "init_args": {"gamma": 3}}}'],
    ][kind]
    for before in ([], [f"--config={tmp_path}/dpo.yaml"], ["--of.loss=IPOLoss", "--of.loss.beta=0.9"]):
        found = loss_of(*before, *after)
        assert found["init_args"] == {"beta": 2.0, "gamma": 3.0, "label_smoothing": 0.0, "link": "sigmoid"}
        assert loss_of(*before, *after, "--of.loss.beta=7")["init_args"]["beta"] == 7
        # named again, by whatever path, it is the same class
        for again in ("SimPOLoss", "lit_dpo.losses.SimPOLoss", "lit_dpo.losses.simpo.SimPOLoss"):
            assert loss_of(*before, *after, f"--of.loss={again}")["init_args"]["gamma"] == 3


def test_a_value_typed_before_the_class_is_not_that_classs(loss_of, caplog):
    caplog.set_level("INFO")
    assert loss_of("--of.loss.beta=0.3", "--of.loss=SimPOLoss")["init_args"]["beta"] == 2.0
    assert caplog.messages == ["SimPOLoss has its own defaults: dropped beta=0.3, given for DPOLoss"]


def test_files_in_their_order(loss_of, tmp_path):
    """The later one wins, and holds what is typed for its class; a third can go on with it."""
    (tmp_path / "a.yaml").write_text("of:\n  loss: {class_path: IPOLoss, init_args: {beta: 0.3, average: sum}}\n")
    (tmp_path / "b.yaml").write_text("of:\n  loss: {class_path: SimPOLoss, init_args: {gamma: 3}}\n")
    (tmp_path / "c.yaml").write_text("of:\n  loss: {init_args: {link: hinge}}\n")
    a, b, c = (f"--config={tmp_path}/{name}.yaml" for name in "abc")
    assert loss_of(a, b)["init_args"]["beta"] == 2.0
    assert loss_of(b, a)["init_args"] == {"beta": 0.3, "average": "sum"}
    assert loss_of(a, b, c)["init_args"] == {"beta": 2.0, "gamma": 3.0, "label_smoothing": 0.0, "link": "hinge"}


# ---- losses in losses ----


def test_nested_losses_have_their_own_defaults(loss_of, tmp_path):
    (tmp_path / "ld.yaml").write_text(
        "of:\n  loss:\n    class_path: LDDPOLoss\n    init_args:\n"
        "      loss: {class_path: IPOLoss, init_args: {beta: 0.9}}\n      surplus_weight: 0.25\n"
    )
    (tmp_path / "mix.yaml").write_text(
        "of:\n  loss:\n    class_path: MixtureLoss\n    init_args:\n      weights: [1, 2]\n"
        "      losses: [{class_path: DPOLoss, init_args: {beta: 0.9}}, SFTLoss]\n"
    )
    ld, mix = f"--config={tmp_path}/ld.yaml", f"--config={tmp_path}/mix.yaml"
    # the inner one alone is swapped: what was typed for the outer one stays
    found = loss_of(ld, "--of.loss.loss=SimPOLoss")["init_args"]
    assert found["loss"]["init_args"]["beta"] == 2.0
    assert found["surplus_weight"] == 0.25
    # outer loss to outer loss, both with an inner one
    assert loss_of(ld, "--of.loss=swaps.Outer")["init_args"]["part"]["init_args"] == {"beta": 5.0, "steps": 3}
    assert loss_of(mix, "--of.loss=LDDPOLoss")["init_args"]["loss"]["init_args"] == {"beta": 0.1}
    assert loss_of("--of.loss=swaps.Outer", "--of.loss.part=DPOLoss")["init_args"]["part"]["init_args"] == {"beta": 0.1}
    # in a list, at the same place
    two = ["SimPOLoss", "lit_dpo.losses.CalDPOLoss"]
    for spelling in (json.dumps(two), json.dumps([{"class_path": one} for one in two])):
        found = loss_of(mix, f"--of.loss.losses={spelling}")["init_args"]
        assert [one["init_args"]["beta"] for one in found["losses"]] == [2.0, 0.002]
        assert found["weights"] == [1, 2]
    found = loss_of(mix, "--of.loss.losses+=SimPOLoss")["init_args"]["losses"]
    assert [one["init_args"].get("beta") for one in found] == [0.9, None, 2.0]
    (tmp_path / "other.yaml").write_text(f"of:\n  loss:\n    init_args:\n      losses: {json.dumps(two)}\n")
    found = loss_of(mix, f"--config={tmp_path}/other.yaml")["init_args"]["losses"]
    assert [one["init_args"]["beta"] for one in found] == [2.0, 0.002]


# ---- optimizers ----


def test_every_optimizer_after_every_other_has_its_own_defaults(tmp_path):
    """`AdamW` is that of the parameter's default, from which learning rate and weight decay are documented."""
    parser = parser_of(DPOModule, "optimizer")
    expected = {one: signature_defaults(one) for one in OPTIMIZERS}
    expected[torch.optim.AdamW] |= {"lr": 1e-5, "weight_decay": 0.0}
    assert {torch.optim.Adafactor, torch.optim.Muon, torch.optim.SGD} < set(OPTIMIZERS)
    for before in OPTIMIZERS:
        content = {"class_path": path_of(before), "init_args": {"lr": 0.123}}
        (tmp_path / f"{before.__name__}.yaml").write_text(yaml.safe_dump({"of": {"optimizer": content}}))
    for number, (before, after) in enumerate(itertools.permutations(OPTIMIZERS, 2)):
        first = (
            [f"--config={tmp_path}/{before.__name__}.yaml"],
            [f"--of.optimizer={path_of(before)}", "--of.optimizer.lr=0.123"],
        )[number % 2]
        found = plain(parser.parse_args([*first, f"--of.optimizer={path_of(after)}"]).of.optimizer)
        assert class_of(found) is after
        assert found["init_args"] == expected[after], (before, after)
    typed = parser.parse_args(["--of.optimizer.lr=3", "--of.optimizer=torch.optim.Muon", "--of.optimizer.lr=0.5"])
    assert typed.of.optimizer.init_args.lr == 0.5


# ---- references ----


def test_every_reference_after_every_other_has_its_own_defaults(tmp_path):
    parser = parser_of(DPOModule, "reference")
    every = [getattr(references, name) for name in references.__all__ if name.endswith("Reference")]
    every = [one for one in every if one is not references.Reference and not inspect.isabstract(one)]
    required = {"ModelReference": {"model": "some/model"}}
    for before, after in itertools.permutations(every, 2):
        typed = dict.fromkeys(own_defaults(before).keys() & {"quantization"}, "int8")
        typed |= required.get(before.__name__, {})
        (tmp_path / "before.yaml").write_text(
            yaml.safe_dump({"of": {"reference": {"class_path": path_of(before), "init_args": typed}}})
        )
        given = [f"--of.reference.{key}={value}" for key, value in required.get(after.__name__, {}).items()]
        found = plain(
            parser.parse_args([f"--config={tmp_path}/before.yaml", f"--of.reference={after.__name__}", *given])
        )
        alone = plain(parser.parse_args([f"--of.reference={after.__name__}", *given]))
        assert found["of"]["reference"] == alone["of"]["reference"]
    nested = ["--of.reference=CachedReference", "--of.reference.reference=ModelReference"]
    nested += ["--of.reference.reference.model=a", "--of.reference.reference.quantization=int8"]
    found = parser.parse_args([*nested, "--of.reference.reference=BaseReference"]).of.reference.init_args
    assert class_of(found.reference) is references.BaseReference
    assert "init_args" not in found.reference
