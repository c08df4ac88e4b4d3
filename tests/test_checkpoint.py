"""Laws of checkpoints: adapters only, exact resume, strict identity, and an ordinary PEFT directory beside each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_dpo import CDPOLoss, DPOLoss, DPOModule, IPOLoss
from lit_dpo.callbacks import AdapterExport
from lit_dpo.data.batch import EncodedPair, collate_pairs
from lit_dpo.errors import ResumeError, TrainingError
from lit_dpo.logps.score import pair_logps
from lit_dpo.policy_checks import keep_trainable
from training import Trace, adapter, data, module, trainer


def _fit(model, pairs_file, root, *, ckpt_path=None, stop=None, accumulate=1, **kwargs):
    """Two epochs of 21 pairs in batches of 4, keeping a checkpoint at every step."""
    trace = Trace()
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        root,
        callbacks=[trace, keep],
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_epochs=2,
        max_steps=-1 if stop is None else stop,
        num_sanity_val_steps=0,
    )
    dpo = module(model, lr_scheduler="linear", **kwargs)
    run.fit(dpo, data(pairs_file, val=str(pairs_file)), ckpt_path=ckpt_path)
    return trace, adapter(dpo), dpo


@pytest.fixture(scope="module")
def straight(tiny_model, pairs_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    return root, *_fit(tiny_model, pairs_file, root, policy={"quantization": "nf4", "dropout": 0.1})


@pytest.mark.parametrize("step", [1, 3, 6, 8, 11])
def test_resuming_at_any_step_equals_not_having_stopped(straight, tiny_model, pairs_file, tmp_path, step):
    """The same rows, losses and weights to the last bit, for NF4 with dropout."""
    root, whole, weights, _ = straight
    torch.manual_seed(123)
    policy = {"quantization": "nf4", "dropout": 0.1}
    resumed, found, _ = _fit(tiny_model, pairs_file, tmp_path, ckpt_path=root / f"step={step}.ckpt", policy=policy)
    assert resumed.rows == whole.rows[step:]
    assert resumed.losses == whole.losses[step:]
    assert all(torch.equal(found[name], expected) for name, expected in weights.items())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_gives_the_same_losses_and_weights(tiny_model, pairs_file, tmp_path, step, accumulate):
    policy = {"dropout": 0.1}  # its masks continue as well
    whole, weights, _ = _fit(tiny_model, pairs_file, tmp_path / "a", accumulate=accumulate, policy=policy)
    torch.manual_seed(123)
    resumed, found, _ = _fit(
        tiny_model,
        pairs_file,
        tmp_path / "b",
        ckpt_path=tmp_path / "a" / f"step={step}.ckpt",
        accumulate=accumulate,
        policy=policy,
    )
    assert resumed.rows == whole.rows[-len(resumed.rows) :]
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    per_epoch = -(-6 // accumulate)
    consumed = 6 * (step // per_epoch) + accumulate * (step % per_epoch)
    assert len(resumed.rows) == 12 - consumed
    assert all(torch.equal(found[name], expected) for name, expected in weights.items())


def test_a_checkpoint_holds_adapters_and_builtins_only(straight):
    root, _, weights, _ = straight
    path = root / "step=12.ckpt"
    saved = torch.load(path, weights_only=True)
    assert {name.removeprefix("model.") for name in saved["state_dict"]} == set(weights)
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], p) for name, p in weights.items())
    assert saved["lit_dpo"]["loss"] == {"class_path": "lit_dpo.losses.dpo.DPOLoss", "init_args": {"beta": 0.1}}
    assert saved["lit_dpo"]["base"]["quantization"] == "nf4"
    assert not [left for left in root.iterdir() if left.name.startswith(".")], "nothing half-written stays"


def test_a_checkpoint_reloads_as_what_it_was(tiny_model, pairs_file, tmp_path):
    _, weights, _ = _fit(tiny_model, pairs_file, tmp_path, stop=2, loss=IPOLoss(beta=0.3, average="sum"))
    again = DPOModule.load_from_checkpoint(tmp_path / "step=2.ckpt")
    assert again.loss == IPOLoss(beta=0.3, average="sum")
    assert again.policy.r == 4
    assert all(torch.equal(p, weights[name]) for name, p in adapter(again).items())


def test_continuing_with_another_loss_stops_and_names_it(straight, tiny_model, pairs_file, tmp_path):
    policy = {"quantization": "nf4", "dropout": 0.1}
    for change, message in [
        ({"loss": CDPOLoss()}, r"loss.class_path: 'lit_dpo.losses.dpo.DPOLoss' in the checkpoint"),
        ({"loss": DPOLoss(beta=0.5)}, r"loss.init_args.beta: 0.1 in the checkpoint, 0.5 now"),
        ({"lr": 1e-3}, r"trained with lr=0.01 but the configuration says 0.001"),
        ({"warmup_ratio": 0.5}, r"training.warmup_ratio: 0.0 in the checkpoint, 0.5 now"),
        ({"row_tokens": 100}, r"training.row_tokens: None in the checkpoint, 100 now"),  # other dropout masks
        ({"policy": policy | {"r": 8}}, r"policy.r: 4 in the checkpoint, 8 now"),
        ({"policy": policy | {"quantization": "none"}}, r"base.quantization: 'nf4' in the checkpoint, 'none' now"),
    ]:
        with pytest.raises(ResumeError, match=message):
            _fit(tiny_model, pairs_file, tmp_path, ckpt_path=straight[0] / "step=3.ckpt", **{"policy": policy} | change)


@pytest.mark.parametrize(
    ("option", "was", "now"),
    [("gradient_clip_val", 0.5, 0.25), ("gradient_clip_val", None, 0.25), ("precision", "32-true", "bf16-mixed")],
)
def test_continuing_with_another_clipping_or_precision_stops_and_names_it(
    tiny_model, pairs_file, tmp_path, option, was, now
):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, max_steps=1, callbacks=[keep], enable_checkpointing=True, **{option: was})
    run.fit(module(tiny_model), data(pairs_file))
    for value in (now, was):
        resumed = trainer(tmp_path, max_steps=1, **{option: value})
        if value == was:
            resumed.fit(module(tiny_model), data(pairs_file), ckpt_path=tmp_path / "step=1.ckpt")
            continue
        with pytest.raises(ResumeError, match=rf"{option}: {was!r} in the checkpoint, {now!r} now"):
            resumed.fit(module(tiny_model), data(pairs_file), ckpt_path=tmp_path / "step=1.ckpt")


def test_adapters_do_not_go_onto_another_base(straight, tiny_model, pairs_file, tmp_path):
    """A moved directory is the same base; the same directory with other weights is not."""
    from safetensors.torch import load_file, save_file

    policy = {"quantization": "nf4", "dropout": 0.1}
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    dpo = module(moved, policy=policy)
    trainer(tmp_path).validate(dpo, data(pairs_file, val=str(pairs_file)), ckpt_path=straight[0] / "step=3.ckpt")
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"base\.fingerprint"):
        trainer(tmp_path).validate(
            module(moved, policy=policy), data(pairs_file, val=str(pairs_file)), ckpt_path=straight[0] / "step=3.ckpt"
        )


def test_a_checkpoint_with_missing_or_unknown_keys_is_refused(straight):
    _, _, _, dpo = straight
    state = dpo.state_dict()
    name = next(iter(state))
    with pytest.raises(ResumeError, match=f"missing {name}"):
        dpo.load_state_dict({other: tensor for other, tensor in state.items() if other != name})
    with pytest.raises(ResumeError, match=r"unknown model\.extra"):
        dpo.load_state_dict({**state, "model.extra": torch.zeros(1)})
    with pytest.raises(ResumeError, match=r"\(1,\) instead of"):
        dpo.load_state_dict({**state, name: torch.zeros(1)})


def test_the_directory_beside_a_checkpoint_is_an_ordinary_peft_model(straight, tiny_model):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, BitsAndBytesConfig, pipeline

    root, _, _, dpo = straight
    directory = root / "step=12"
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(directory, quantization_config=quantized, dtype=torch.float32)
    keep_trainable(loaded)  # some CPUs would repack it and compute in bfloat16
    batch = collate_pairs([EncodedPair([0, 50, 60], [70, 80], [90, 91, 92])])
    dpo.model.eval()
    with torch.no_grad():
        here, there = pair_logps(dpo.model, batch), pair_logps(loaded.eval(), batch)
    torch.testing.assert_close(there[0].total, here[0].total, atol=1e-4, rtol=0)
    torch.testing.assert_close(there[1].total, here[1].total, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(directory)("a").input_ids
    answer = pipeline("text-generation", model=str(directory))("How many", max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"].startswith("How many")


def test_a_checkpoint_that_goes_takes_its_directory_along(tiny_model, pairs_file, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, monitor="step", mode="max")
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True)
    run.fit(module(tiny_model), data(pairs_file))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["adapter", "step=6", "step=6.ckpt"]


def test_an_adapter_replaces_an_adapter_and_nothing_else(tiny_model, pairs_file, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("x")
    keep = ModelCheckpoint(tmp_path, filename="data")
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(TrainingError, match="something else is there"):
        run.fit(module(tiny_model), data(pairs_file))
    run = trainer(tmp_path, callbacks=[AdapterExport(str(tmp_path / "data"))])
    with pytest.raises(TrainingError, match="something else is there"):
        run.fit(module(tiny_model), data(pairs_file))
    assert (tmp_path / "data" / "precious.txt").read_text() == "x"


def test_a_reloaded_module_saves_what_reloads_again(tiny_model, pairs_file, tmp_path):
    _fit(tiny_model, pairs_file, tmp_path / "a", stop=1)
    again = DPOModule.load_from_checkpoint(tmp_path / "a" / "step=1.ckpt")
    keep = ModelCheckpoint(tmp_path / "b", filename="{step}")
    trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1).fit(again, data(pairs_file))
    third = DPOModule.load_from_checkpoint(tmp_path / "b" / "step=1.ckpt")
    assert all(torch.equal(p, adapter(again)[name]) for name, p in adapter(third).items())


def test_a_trainer_exports_the_module_it_trains(tiny_model, pairs_file, tmp_path):
    from safetensors.torch import load_file

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True)
    run.fit(module(tiny_model), data(pairs_file))
    second = module(tiny_model, lr=1e-3)
    run.fit_loop.max_epochs = 2
    run.fit(second, data(pairs_file))
    (last,) = tmp_path.glob("step=12")
    saved = load_file(last / "adapter_model.safetensors")
    for name, p in adapter(second).items():
        assert torch.equal(saved[name.replace(".default", "")], p)


def test_starting_again_from_the_adapter_is_a_new_run(straight, tiny_model, pairs_file, tmp_path):
    """A warm start is not a resume: step 0, the adapter as its own reference, any loss."""
    policy = {"quantization": "nf4", "adapter_path": str(straight[0] / "step=12"), "dropout": 0.0}
    _, weights, dpo = _fit(tiny_model, pairs_file, tmp_path, stop=2, policy=policy, loss=IPOLoss())
    assert type(dpo.reference).__name__ == "AdapterReference"
    assert all(torch.isfinite(p).all() for p in weights.values())
    assert Path(tmp_path / "adapter").is_dir()
