"""A policy of one's own: trained, named in its checkpoints, loaded and continued as what it is."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_dpo import DPOModule, LoRAPolicy
from lit_dpo.cli import main
from lit_dpo.errors import PolicyError, ResumeError
from training import adapter, data, trainer

DOWNSTREAM = Path(__file__).parents[1] / "downstream"


@pytest.fixture(autouse=True)
def _my_lab(monkeypatch):
    monkeypatch.syspath_prepend(str(DOWNSTREAM))


def _policy(model, kind=None, **options):
    from my_lab import FrozenA

    own = {"a_scale": 2.0} if kind is None else {}
    return (kind or FrozenA)(str(model), **{"quantization": "nf4", "r": 4, **own, **options})


def _fit(policy, pairs_file, root, *, ckpt_path=None, steps=2):
    torch.manual_seed(0)
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    dpo = DPOModule(policy, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2), lr_scheduler="constant")
    run = trainer(root, callbacks=[keep], enable_checkpointing=True, max_steps=steps)
    run.fit(dpo, data(pairs_file), ckpt_path=ckpt_path)
    return dpo


@pytest.fixture(scope="module")
def trained(tiny_model, pairs_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOWNSTREAM))
        return root, _fit(_policy(tiny_model), pairs_file, root)


def test_it_is_named_in_its_checkpoint_and_loads_as_what_it_is(trained):
    root, dpo = trained
    assert adapter(dpo)
    assert all("lora_B" in name for name in adapter(dpo)), "what the subclass says, trains"
    saved = torch.load(root / "step=2.ckpt", weights_only=True)
    assert saved["lit_dpo"]["policy"]["class_path"] == "my_lab.policy.FrozenA"
    assert saved["lit_dpo"]["policy"]["a_scale"] == 2.0
    again = DPOModule.load_from_checkpoint(root / "step=2.ckpt")
    assert again.policy == dpo.policy
    state = dpo.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_it_goes_on_to_the_bit_and_not_as_another_class(trained, tiny_model, pairs_file, tmp_path):
    root, dpo = trained
    policy = _policy(tiny_model)
    resumed = _fit(policy, pairs_file, tmp_path / "a", ckpt_path=root / "step=1.ckpt")
    assert all(torch.equal(p, adapter(dpo)[name]) for name, p in adapter(resumed).items())
    for other, said in (
        (
            _policy(tiny_model, LoRAPolicy),
            r"policy.class_path: 'my_lab.policy.FrozenA' in the checkpoint, .*LoRAPolicy",
        ),
        (type(policy)(str(tiny_model), r=4, a_scale=3.0), r"policy.a_scale: 2.0 in the checkpoint, 3.0 now"),
    ):
        with pytest.raises(ResumeError, match=said):
            _fit(other, pairs_file, tmp_path / "b", ckpt_path=root / "step=1.ckpt")


@pytest.mark.parametrize("again", [1, 2])
def test_a_policy_may_be_given_as_an_object_when_a_checkpoint_is_loaded(
    trained, tiny_model, pairs_file, tmp_path, again
):
    """And what is loaded so is saved in builtins, and loads again."""
    root, dpo = trained
    policy = _policy(tiny_model, gradient_checkpointing=True)
    module = DPOModule.load_from_checkpoint(root / "step=2.ckpt", policy=policy)
    assert module.policy is policy
    if again == 2:
        keep = ModelCheckpoint(tmp_path, filename="x")
        trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1).fit(module, data(pairs_file))
        module = DPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
        assert module.policy == policy
        return
    assert all(torch.equal(tensor, dpo.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_an_object_on_another_base_is_refused(trained, tiny_model):
    with pytest.raises(ResumeError, match=r"base\.quantization: 'nf4' in the checkpoint, 'none' now"):
        DPOModule.load_from_checkpoint(
            trained[0] / "step=2.ckpt", policy=LoRAPolicy(str(tiny_model), quantization="none", r=4)
        )


@pytest.mark.parametrize("path", ["pathlib.Path", "my_lab.TargetHingeLoss", "my_lab.Nothing", "subprocess.Popen"])
def test_a_checkpoint_names_policies_and_nothing_else(trained, tmp_path, path):
    saved = torch.load(trained[0] / "step=2.ckpt", weights_only=True)
    saved["hyper_parameters"]["policy"] = {"class_path": path, "init_args": {"args": ["touch", str(tmp_path / "ran")]}}
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="policy"):
        DPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spelling", [["--model.policy=my_lab.FrozenA"], ["--model.policy.class_path=my_lab.FrozenA"]])
def test_the_command_trains_it(spelling, tiny_model, pairs_file, tmp_path, monkeypatch):
    """Whatever was typed for a policy before the class was named stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model: {{policy: {{model: {tiny_model}, quantization: none, r: 2}}}}\n")
    given = ["--config=run.yaml", *spelling, "--model.policy.a_scale=3", f"--data.train={pairs_file}"]
    main(["fit", *given, "--trainer.max_steps=1", "--trainer.accelerator=cpu"])
    policy = yaml.safe_load((tmp_path / "runs" / "version_0" / "config.yaml").read_text())["model"]["init_args"][
        "policy"
    ]
    assert policy["class_path"] == "my_lab.FrozenA"
    assert (policy["init_args"]["r"], policy["init_args"]["a_scale"]) == (2, 3.0)
    (checkpoint,) = (tmp_path / "runs" / "version_0").rglob("last.ckpt")
    again = DPOModule.load_from_checkpoint(checkpoint)
    assert type(again.policy).__name__ == "FrozenA"
    assert again.policy.a_scale == 3


def test_no_policy_at_all_is_said_as_the_option_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--data.train=x", "--trainer.max_steps=1"])
    assert "Expected `--model.policy.model` but it was not given." in capsys.readouterr().err


def test_a_subclass_checks_its_base_s_fields(tiny_model):
    with pytest.raises(PolicyError, match="`r` >= 1"):
        _policy(tiny_model, r=0)
