"""Laws of checkpoints: adapters only, exact resume, strict identity, and an ordinary PEFT directory next to each."""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection

import tiny
from lit_dpo import CDPOLoss, DPOLoss, DPOModule, IPOLoss, LoRAPolicy
from lit_dpo.callbacks import AdapterExport, ExactResume
from lit_dpo.checkpoint.identity import check_belongs, check_readable, compare, compare_steps
from lit_dpo.checkpoint.position import measured, remeasure_share, rewind, take_settings
from lit_dpo.data.batch import EncodedPrompt, collate
from lit_dpo.errors import ResumeError, TrainingError, VersionError
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy.checks import keep_trainable
from lit_dpo.versions import CHECKPOINT
from training import Trace, adapter, data, module, trainer

FEW = ["q_proj", "v_proj"]


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
        limit_val_batches=2,
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


@pytest.fixture(scope="module")
def accumulated(tiny_model, pairs_file, tmp_path_factory):
    root, policy = tmp_path_factory.mktemp("accumulated"), {"dropout": 0.1}  # its masks continue as well
    return root, 2, policy, *_fit(tiny_model, pairs_file, root, accumulate=2, policy=policy)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_an_accumulation_gives_the_same_losses_and_weights(
    accumulated, tiny_model, pairs_file, tmp_path, step
):
    root, accumulate, policy, whole, weights, _ = accumulated
    torch.manual_seed(123)
    resumed, found, _ = _fit(
        tiny_model,
        pairs_file,
        tmp_path,
        ckpt_path=root / f"step={step}.ckpt",
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
        (
            {"microbatch_tokens": 100},
            r"training.microbatch_tokens: None in the checkpoint, 100 now",
        ),  # other dropout masks
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
    batch = collate([EncodedPrompt([0, 50, 60], [[70, 80], [90, 91, 92]])])
    dpo.model.eval()
    with torch.no_grad():
        here, there = completion_logps(dpo.model, batch), completion_logps(loaded.eval(), batch)
    torch.testing.assert_close(there.total, here.total, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(directory)("a").input_ids
    card = (directory / "README.md").read_text()
    assert f"base_model: {tiny_model}\n" in card
    assert "`lit-dpo export` writes a model card" in card
    assert "More Information Needed" not in card
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


# ---- what a run that goes on must agree in ----


def _lines(pairs_file, change):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    return "".join(json.dumps(change(row)) + "\n" for row in rows)


class Charged(DPOModule):
    def __init__(self, *args, charge: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.charge = charge


def _run(model, pairs_file, root, *, kind=DPOModule, ckpt_path=None, source=None, policy=None, lr=1e-2,
         optimizer=torch.optim.AdamW, changes=None, extra=None, **kwargs):  # fmt: skip
    """An epoch of six steps, a checkpoint at every one, with a schedule."""
    callbacks = [ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    callbacks += [] if changes is None else [ExactResume(changes=changes)]
    run = trainer(root, callbacks=callbacks, enable_checkpointing=True, **kwargs)
    torch.manual_seed(0)
    given = {"quantization": "none", "r": 4, "target_modules": FEW, **(policy or {})}
    dpo = kind(LoRAPolicy(str(model), **given), optimizer=functools.partial(optimizer, lr=lr), **(extra or {}))
    run.fit(dpo, source or data(pairs_file), ckpt_path=ckpt_path)
    return run, dpo


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One layer: these laws are about what is compared and kept, not about a model."""
    return tiny.directory(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def begun(small, pairs_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("begun")
    _run(small, pairs_file, root, extra={"warmup_ratio": 0.5})
    return root / "step=3.ckpt"


CHANGES = {
    "more epochs": ({"max_epochs": 2}, r"schedule had 6 steps but has 12 now"),
    "more steps": ({"max_epochs": -1, "max_steps": 9}, r"schedule had 6 steps but has 9 now"),
    "another schedule": (
        {"extra": {"lr_scheduler": "cosine", "warmup_ratio": 0.5}},
        r"training.lr_scheduler: 'linear'",
    ),
    "a warm-up": ({"extra": {"warmup_ratio": 0.2}}, r"training.warmup_ratio: 0.5 in the checkpoint, 0.2 now"),
    "accumulation": ({"accumulate_grad_batches": 2}, r"training.accumulate_grad_batches: 1 in the checkpoint, 2 now"),
    "fewer batches": ({"limit_train_batches": 5}, r"training.limit_train_batches: 1.0 in the checkpoint, 5 now"),
    "clipping": ({"gradient_clip_val": 1.0}, r"training.gradient_clip_val: None in the checkpoint, 1.0 now"),
    "another clipping": (
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        r"training.gradient_clip_algorithm: None in the checkpoint, 'value' now",
    ),
    "precision": ({"precision": "bf16-mixed"}, r"training.precision: '32-true' in the checkpoint, 'bf16-mixed' now"),
    "another optimizer": ({"optimizer": torch.optim.RAdam}, r"trained with torch.optim.adamw.AdamW but .*RAdam"),
    "another rate": ({"lr": 1e-3}, r"trained with lr=0.01 but the configuration says 0.001"),
    "a subclass": ({"kind": Charged}, r"module._class_path: .*DPOModule' in the checkpoint, .*Charged' now"),
    "another loss": ({"extra": {"loss": CDPOLoss(), "warmup_ratio": 0.5}}, r"loss.class_path"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_course_of_training_is_compared(begun, small, pairs_file, tmp_path, change):
    given, message = CHANGES[change]
    given = {"extra": {"warmup_ratio": 0.5}, **given}
    with pytest.raises(ResumeError, match=message) as refused:
        _run(small, pairs_file, tmp_path, ckpt_path=begun, **given)
    assert "--trainer.callbacks.changes=accept" in str(refused.value)


DATA = {
    "swapped sides": lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]},
    "another word": lambda row: row | {"prompt": row["prompt"].replace("20", "21")},
}


@pytest.mark.parametrize("change", [*DATA, "reversed rows", "truncation", "another seed"])
def test_other_data_are_refused(begun, small, pairs_file, tmp_path, change):
    other, options = tmp_path / "other.jsonl", {}
    other.write_text(_lines(pairs_file, DATA.get(change, dict)))
    if change == "reversed rows":
        other.write_text("".join(reversed(pairs_file.read_text().splitlines(keepends=True))))
    if change == "truncation":
        options = {"max_length": 30, "truncation": "truncate_prompt"}
    if change == "another seed":
        options = {"seed": 1}
    with pytest.raises(ResumeError, match=r"training\.data: |seed 0 -> 1"):
        _run(small, pairs_file, tmp_path, ckpt_path=begun, source=data(other, **options),
             extra={"warmup_ratio": 0.5})  # fmt: skip


def test_the_same_data_elsewhere_are_the_same(begun, small, pairs_file, tmp_path):
    copied = tmp_path / "copy.jsonl"
    shutil.copyfile(pairs_file, copied)
    run, _ = _run(small, pairs_file, tmp_path, ckpt_path=begun, source=data(copied), extra={"warmup_ratio": 0.5})
    assert run.global_step == 6


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"precision", "accumulation", "fewer batches"}))
def test_accepted_changes_hold_and_are_said(begun, small, pairs_file, tmp_path, change):
    given, _ = CHANGES[change]
    with tiny.records("lightning.pytorch.utilities.rank_zero") as said:
        run, dpo = _run(small, pairs_file, tmp_path, ckpt_path=begun, changes="accept",
                        **{"extra": {"warmup_ratio": 0.5}, **given})  # fmt: skip
    assert any("going on under other settings: " in record.getMessage() for record in said)
    assert run.global_step == {"more epochs": 12, "more steps": 9}.get(change, 6)
    group = run.optimizers[0].param_groups[0]
    assert group["initial_lr"] == given.get("lr", 1e-2)
    assert type(run.optimizers[0]) is given.get("optimizer", torch.optim.AdamW)
    assert group["lr"] == pytest.approx(0.0), "the new schedule ends where the new run does"
    assert dpo.loss == given.get("extra", {}).get("loss", DPOLoss())


def test_another_base_is_never_accepted(begun, small, pairs_file, tmp_path):
    with pytest.raises(ResumeError, match=r"base\.quantization"):
        _run(small, pairs_file, tmp_path, ckpt_path=begun, changes="accept", policy={"quantization": "nf4"})
    with pytest.raises(ResumeError, match=r"Expected `changes` to be refuse or accept but got 'perhaps'"):
        ExactResume(changes="perhaps")


OPTIMIZERS = [
    *(name for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon", "NAdam", "RAdam",
                        "RMSprop", "Rprop", "SGD") if hasattr(torch.optim, name)),
]  # fmt: skip
EIGHT_BITS = [
    *("Adam8bit", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "AdEMAMix8bit", "Lion8bit", "Lion32bit"),
    *("RMSprop8bit", "Adagrad8bit", "LAMB8bit", "LARS8bit", "SGD8bit"),
]


class Mine(torch.optim.Optimizer):
    """An optimizer of a user's own, without `differentiable` or the like among its defaults."""

    def __init__(self, params, lr=1e-2, keep=0.9):
        super().__init__(params, {"lr": lr, "keep": keep})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seen = self.state[p].setdefault("seen", torch.zeros_like(p))
                    seen.mul_(group["keep"]).add_(p.grad)
                    p.add_(seen, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize("name", [*OPTIMIZERS, *EIGHT_BITS, "Mine"])
def test_every_optimizer_goes_on_to_the_bit(small, pairs_file, tmp_path, name):
    import bitsandbytes.optim

    kind = Mine if name == "Mine" else getattr(torch.optim, name, None) or getattr(bitsandbytes.optim, name)
    kind = functools.partial(kind, momentum=0.9) if name in ("LARS8bit", "SGD8bit") else kind
    extra = {"optimizer": kind, "lr": 1e-3, "extra": {"lr_scheduler": "constant"}, "max_steps": 2}
    _, straight = _run(small, pairs_file, tmp_path / "a", **extra)
    _, resumed = _run(small, pairs_file, tmp_path / "b", ckpt_path=tmp_path / "a" / "step=1.ckpt", **extra)
    assert all(torch.equal(p, adapter(resumed)[name]) for name, p in adapter(straight).items())


def test_weights_alone_cannot_be_continued(tiny_model, pairs_file, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer(tmp_path, callbacks=[keep], enable_checkpointing=True).fit(module(tiny_model), data(pairs_file))
    with pytest.raises(ResumeError, match="holds weights alone"):
        trainer(tmp_path).fit(module(tiny_model), data(pairs_file), ckpt_path=tmp_path / "weights.ckpt")


def test_other_batches_may_follow_the_last_of_an_epoch(small, pairs_file, tmp_path):
    """Even if the checkpoint was written before the epoch had ended."""
    constant = {"extra": {"lr_scheduler": "constant"}}
    _run(small, pairs_file, tmp_path / "a", **constant)
    for step, message in ((5, "batch_size 4 -> 7"), (6, None)):
        given = {"ckpt_path": tmp_path / "a" / f"step={step}.ckpt", "max_epochs": 2, **constant}
        given["source"] = data(pairs_file, batch_size=7)
        if message:
            with pytest.raises(ResumeError, match=message):
                _run(small, pairs_file, tmp_path / "b", **given)
        else:
            run, _ = _run(small, pairs_file, tmp_path / "b", **given)
            assert run.global_step == 6 + 3


def test_a_last_checkpoint_that_is_a_link_has_its_folder(tiny_model, pairs_file, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
    trainer(tmp_path, callbacks=[keep], enable_checkpointing=True).fit(module(tiny_model), data(pairs_file))
    assert (tmp_path / "last").resolve() == tmp_path / "step=6"
    assert (tmp_path / "last" / "adapter_config.json").is_file()


def test_a_link_takes_the_place_of_a_folder_that_an_earlier_run_left(tiny_model, pairs_file, tmp_path):
    """`save_last=True` left one; no rename puts a link over a folder."""
    for last in (True, "link"):
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=last)
        run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=4)
        run.fit(module(tiny_model), data(pairs_file))
        if not (tmp_path / "last.ckpt").is_symlink():  # whoever wants a link makes room for it
            (tmp_path / "last.ckpt").unlink()
    assert (tmp_path / "last").is_symlink()
    assert (tmp_path / "last").resolve() == (tmp_path / "last.ckpt").resolve().with_suffix("")


def test_a_checkpoint_of_a_gpu_is_read_without_one(straight, tiny_model, pairs_file, tmp_path):
    """Its tensors say `cuda:0`, here in a copy of a file in which they said `cpu`."""
    path = tmp_path / "gpu.ckpt"
    with zipfile.ZipFile(straight[0] / "step=6.ckpt") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"X\x03\x00\x00\x00cpu") == 1  # later ones refer to it
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(entry.filename, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    pairs, found = data(pairs_file, val=str(pairs_file)), []
    for file in (path, straight[0] / "step=6.ckpt"):
        dpo = module(tiny_model, policy={"quantization": "nf4", "dropout": 0.1}, lr_scheduler="linear")
        found.append(trainer(tmp_path).validate(dpo, pairs, ckpt_path=file, verbose=False))
    assert found[0] == found[1]


def test_what_has_no_order_is_written_in_one():
    """Else a strategy with a set among its fields would be another one in the next process."""
    from lit_dpo.checkpoint import to_builtins

    names = {f"name {number}" for number in range(50)}
    assert to_builtins(names) == to_builtins(frozenset(names)) == sorted(names)


# ---- where a run stands, in numbers ----


def _loops(epoch, batches, before, stepped, validations):
    """Lightning's loops, inside an epoch: so many batches of it, after so many of earlier ones."""
    loops = {"fit_loop": trainer(Path()).fit_loop.state_dict()}
    fit = loops["fit_loop"]
    for part, count in (("total", before + batches), ("current", batches)):
        fit["epoch_loop.batch_progress"][part] = dict.fromkeys(("ready", "started", "processed", "completed"), count)
        fit["epoch_progress"][part] = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] = stepped
    fit["epoch_loop.val_loop.batch_progress"]["total"]["completed"] = validations
    return loops


@pytest.mark.parametrize(
    ("batches", "validated", "completed", "again"),
    [(3, True, 2, 0), (3, False, 3, 1), (6, True, 6, 0), (6, False, 6, 1)],
)
def test_loops_go_back_to_the_last_step_that_was_made(batches, validated, completed, again):
    """Of an epoch of six batches, the second, of which Lightning had begun one more than went into steps."""
    loops = _loops(1, batches + 1, before=6, stepped=9, validations=4)
    rewind(loops, 1, batches, 6, validated=validated)
    fit = loops["fit_loop"]
    done, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    for part, before in (("total", 6), ("current", 0)):
        counts = dict.fromkeys(("ready", "started", "processed"), before + batches)
        assert done[part] == {**counts, "completed": before + completed}
        assert epochs[part] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert done["is_last_batch"] == (batches == 6)
    assert fit["epoch_loop.state_dict"] == {"_batches_that_stepped": 8}
    validation = fit["epoch_loop.val_loop.batch_progress"]
    assert validation["total"] == {"ready": 4 + again, "started": 4 + again, "processed": 4, "completed": 4}
    assert validation["current"] == {"ready": again, "started": again, "processed": 0, "completed": 0}


def test_an_epoch_that_was_not_begun_begins():
    loops, same = (_loops(1, 0, before=6, stepped=9, validations=4) for _ in range(2))
    for one in (loops, same):  # Lightning has not begun it
        for part in ("total", "current"):
            one["fit_loop"]["epoch_progress"][part]["ready"] = 1
    rewind(loops, 1, 0, 6, validated=True)
    assert loops == same
    begun = _loops(1, 2, before=6, stepped=9, validations=4)
    rewind(begun, 1, 0, 6, validated=True)  # its first two batches went into no step: they come again
    assert begun["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 0
    assert begun["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 6
    assert begun["fit_loop"]["epoch_progress"]["current"]["ready"] == 1


def test_a_scheduler_of_another_kind_keeps_what_was_configured():
    """Rates of ours are functions of the step; what another one does in so many steps is not known."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    run = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"lr": 0.25, "params": [7]}
    checkpoint = {"optimizer_states": [saved], "lr_schedulers": [{"last_epoch": 5}]}
    take_settings(checkpoint, run, same=True)
    assert checkpoint["lr_schedulers"] == [scheduler.state_dict()]
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["params"] == [7]


class _Last(Metric):
    """What was seen last: of two, nobody can say which."""

    full_state_update = True

    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx=None)

    def update(self, value):
        self.seen = torch.as_tensor(value, dtype=torch.float32)

    def compute(self):
        return self.seen


def _counted(*values):
    metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric(), "last": _Last()})
    for value in values:
        metrics.update(float(value))
    return metrics


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_ranks_take_up_what_those_of_another_run_have_counted_each_share_once():
    """A sum and a list are put together; what cannot be is said, and begins anew."""
    shares = [measured(_counted(1, 2)), measured(_counted(6)), measured(_counted(10))]
    first, second = _counted(), _counted()
    assert remeasure_share(first, shares, 0, 2) == ["last"]
    assert remeasure_share(second, shares, 1, 2) == []
    assert float(first["mean"].compute()) == pytest.approx(13 / 3)
    assert sorted(first["all"].compute().tolist()) == [1.0, 2.0, 10.0]
    assert float(first["last"].compute()) == 0.0
    assert float(second["last"].compute()) == float(second["mean"].compute()) == 6.0
    late = _counted()
    assert remeasure_share(late, shares, 3, 4) == []
    assert late["mean"].metric_state["weight"] == 0
    # of a metric that was not there then there is nothing to take up
    first = _counted()
    assert remeasure_share(first, [shares[0], {"mean": shares[1]["mean"]}], 0, 1) == []
    assert float(first["mean"].compute()) == 3.0
    assert first["all"].compute().tolist() == [1.0, 2.0]
    first.update(100.0)
    assert [float(one) for one in shares[0]["all"]["value"]] == [1.0, 2.0], "copies"


# ---- what a file belongs to ----


def test_what_a_file_does_not_say_or_a_newer_release_says_is_refused():
    with pytest.raises(ResumeError, match="does not say what its weights belong to"):
        check_belongs({"state_dict": {}}, {}, training=False)
    check_belongs({"lit_dpo": {"base": {"content": "1"}}}, {"base": {"content": "1"}}, training=False)
    with pytest.raises(VersionError, match=r"last.ckpt was written by a newer lit_dpo"):
        check_readable({"lit_dpo": {"version": CHECKPOINT + 1}}, "last.ckpt")
    for known in ({}, {"lit_dpo": {}}, {"lit_dpo": {"version": CHECKPOINT}}, {"lit_dpo": "something else"}):
        check_readable(known, "last.ckpt")


def test_commits_are_compared_where_both_sides_are_of_a_hub():
    here = {"base": {"model": "a", "content": {"commit": "1", "sha": "2"}}}
    folder = {"base": {"model": "/b", "content": {"sha": "2"}}}
    for one, other in ((here, folder), (folder, here), (here, here)):
        compare(one, other, training=False)
    with pytest.raises(ResumeError, match=r"base.content.commit: '1' in the checkpoint, '9' now"):
        compare(here, {"base": {"content": {"commit": "9", "sha": "2"}}}, training=False)
    for said, now in (("'2'", "None"), ("None", "'2'")):  # anything else that one side alone says is a difference
        without = {"base": {"content": {"commit": "1"}}}
        with pytest.raises(ResumeError, match=rf"base.content.sha: {said} in the checkpoint, {now} now"):
            compare(*((here, without) if now == "None" else (without, here)), training=False)


def test_another_number_of_groups_is_named():
    saved = {"optimizer": "torch.optim.AdamW", "groups": [{"lr": 1.0}], "schedule": 5}
    assert compare_steps(saved, saved) == []
    assert compare_steps(saved, {**saved, "groups": [{"lr": 1.0}, {"lr": 2.0}]}) == [
        "its optimizer had 1 groups but has 2 now"
    ]
