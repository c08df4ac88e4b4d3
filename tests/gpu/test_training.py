"""Training on a GPU: step 0, rows, precisions, exact resume, references that move or are stored, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import tiny
from lit_dpo import BaseReference, CachedReference, EMAReference, LoRAPolicy, ModelReference
from lit_dpo.cli import main
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.memory import Lengths, LiveBytes, estimate_step, stored_bytes
from lit_dpo.policy.adapters import adapter_parameters
from training import Trace, adapter, data, module, trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def few(pairs_file, tmp_path):
    """Eight pairs: an epoch of two steps."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:8]))
    return path


@pytest.fixture
def fit(gpu, pairs_file, tmp_path):
    """A run on the device; the losses of its steps, and its module."""

    def run(model, root="run", ckpt_path=None, trained_on=None, **given):
        names = {"precision", "max_steps", "max_epochs", "deterministic", "callbacks", "enable_checkpointing"}
        options = {name: given.pop(name) for name in names & given.keys()}
        trace = Trace()
        options["callbacks"] = [trace, *options.get("callbacks", [])]
        accelerator = {"accelerator": gpu.type, "devices": 1, "num_sanity_val_steps": 0}
        dpo = module(model, **given)
        trainer(tmp_path / root, **accelerator, **options).fit(dpo, trained_on or data(pairs_file), ckpt_path=ckpt_path)
        return trace.losses, dpo

    return run


class _Rewards(Callback):
    """What the first batch is before a step."""

    def __init__(self):
        self.largest = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.largest:
            with trainer.precision_plugin.train_step_context():
                self.largest += [float(one.abs().max()) for one in pl_module.loss.rewards(pl_module.batch_logps(batch))]


@pytest.mark.parametrize(
    ("precision", "quantization", "reference"),
    [
        ("32-true", "none", "base"),
        ("bf16-true", "nf4", "base"),
        ("bf16-mixed", "none", "base"),
        ("16-mixed", "nf4", "base"),
        ("bf16-mixed", "none", "ema"),
        ("bf16-true", "nf4", "cached"),
    ],
)
def test_before_the_first_step_every_reward_is_zero(fit, tiny_model, tmp_path, precision, quantization, reference):
    references = {
        "base": BaseReference(),
        "ema": EMAReference(every=1),
        "cached": CachedReference(directory=str(tmp_path / "cache")),
    }
    rewards = _Rewards()
    policy = {"quantization": quantization}
    fit(
        tiny_model,
        policy=policy,
        reference=references[reference],
        max_steps=1,
        precision=precision,
        callbacks=[rewards],
    )
    assert rewards.largest == [0.0, 0.0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "auto"), ("bf16-mixed", "float32"), ("bf16-true", "auto"), ("16-mixed", "auto")],
)
def test_a_precision_trains_as_float32_does_and_takes_the_kernel(fit, tiny_model, precision, dtype, kernel_calls):
    expected, _ = fit(tiny_model, "a", lr=1e-3, max_steps=5, precision="32-true", policy={"dtype": "float32"})
    assert not kernel_calls
    found, dpo = fit(tiny_model, "b", lr=1e-3, max_steps=5, precision=precision, policy={"dtype": dtype})
    assert set(kernel_calls) <= {torch.bfloat16, torch.float16}
    assert kernel_calls
    assert found == pytest.approx(expected, abs=2e-2)
    assert all(p.dtype == torch.float32 for p in adapter(dpo).values())


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 2e-2)])
def test_a_batch_in_rows_is_the_same_step(fit, tiny_model, precision, tolerance):
    policy = {"dtype": "float32"} if precision == "32-true" else {}
    given = {"lr": 1e-3, "max_steps": 4, "precision": precision, "policy": policy}
    whole, _ = fit(tiny_model, "whole", **given)
    rows, _ = fit(tiny_model, "rows", microbatch_tokens=1, **given)
    assert rows == pytest.approx(whole, abs=tolerance)


@pytest.mark.parametrize("policy", [{"quantization": "nf4", "dropout": 0.1}, {"gradient_checkpointing": True}])
def test_resuming_is_exact_to_the_bit(fit, tiny_model, few, tmp_path, monkeypatch, policy):
    """With deterministic kernels, which a GPU must be asked for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    given = {"policy": policy, "max_epochs": 3, "deterministic": True, "lr_scheduler": "linear"}
    try:
        whole, trained = fit(
            tiny_model, "a", trained_on=data(few), callbacks=[keep], enable_checkpointing=True, **given
        )
        torch.manual_seed(123)
        start = tmp_path / "kept" / "step=3.ckpt"
        losses, resumed = fit(tiny_model, "b", trained_on=data(few), ckpt_path=start, **given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == whole[3:]
    assert len(losses) == 3
    found, expected = adapter(resumed), adapter(trained)
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_reference_that_moves_is_the_average(fit, tiny_model):
    averages = []

    class Follow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            policy = [p.detach().clone() for p in adapter_parameters(pl_module.model).values()]
            before = averages[-1] if averages else [torch.zeros_like(p) for p in policy]
            averages.append([old.lerp(new, 0.5) for old, new in zip(before, policy, strict=True)])

        def on_train_start(self, trainer, pl_module):
            averages.append([p.detach().clone() for p in adapter_parameters(pl_module.model, "reference").values()])

    _, dpo = fit(tiny_model, reference=EMAReference(alpha=0.5, every=1), max_steps=4, callbacks=[Follow()])
    found = adapter_parameters(dpo.model, "reference").values()
    for mine, expected in zip(found, averages[-1], strict=True):
        # after a run Lightning moves a module to the CPU
        torch.testing.assert_close(mine.cpu(), expected.cpu())


def test_a_stored_reference_is_the_same_in_every_epoch(fit, tiny_model, few, tmp_path):
    given = {"lr": 1e-3, "max_epochs": 2, "policy": {"quantization": "nf4", "dtype": "float32"}}
    expected, _ = fit(tiny_model, "a", trained_on=data(few), **given)
    stored = CachedReference(directory=str(tmp_path / "cache"))
    found, _ = fit(tiny_model, "b", trained_on=data(few), reference=stored, **given)
    assert found == pytest.approx(expected, abs=1e-4)


def test_another_model_as_reference_lies_beside_the_policy(fit, tiny_model, gpu):
    losses, dpo = fit(tiny_model, reference=ModelReference(str(tiny_model)), max_steps=2)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-2)
    assert {p.device for p in dpo.model.__dict__["lit_dpo_reference"].parameters()} == {gpu}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_needs_the_memory_that_was_estimated(gpu, tmp_path, quantization, checkpointing):
    """Within a tenth: of what the allocator counts, or on a CPU of what operations make, which has no counter."""
    large = gpu.type == "cuda"
    width, vocabulary, prompt = (1024, 32_000, 900) if large else (128, 1500, 60)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "vocab_size": vocabulary}
    base = tiny.directory(tmp_path / "base", max_position_embeddings=2048, **sizes)
    policy = LoRAPolicy(str(base), quantization=quantization, gradient_checkpointing=checkpointing)
    lengths = [(prompt, prompt // 2, prompt // 3)] * (6 if large else 2)
    small, batch = tiny.batch((4, 3, 2)).to(gpu), tiny.batch(*lengths).to(gpu)
    before = torch.cuda.memory_allocated() if large else 0
    model = policy.load(gpu)
    choose_layout(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step(given):
        tiny.weighted(completion_logps(model, given).total).backward()

    step(small)  # gradients, workspaces of libraries
    optimizer.step()  # what it keeps
    estimate = estimate_step(model, [Lengths.of([(prompt, rest) for prompt, *rest in lengths])])
    if large:
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        measured = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as memory:
            step(batch)
        frozen, trained = stored_bytes(model)
        measured = frozen + 4 * trained + memory.peak
    assert estimate.total == pytest.approx(measured, rel=0.1)


def test_the_command_trains_validates_tests_and_predicts(gpu, tiny_model, pairs_file, tmp_path, monkeypatch, capsys):
    """`lit-dpo` with the default precision; what is written is read back."""
    monkeypatch.chdir(tmp_path)
    where = ["--trainer.accelerator", "gpu" if gpu.type == "cuda" else "cpu", "--trainer.devices=1"]
    where += ["--trainer.enable_progress_bar=false", f"--model.policy.model={tiny_model}"]
    where += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.num_sanity_val_steps=0"]
    rows = [f"--data.{name}={pairs_file}" for name in ("val", "test", "predict")]
    given = [*where, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01", "--data.batch_size=4", *rows]
    main(["fit", *given, f"--data.train={pairs_file}", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    capsys.readouterr()
    for command in ("validate", "test", "predict"):
        main([command, *given, f"--ckpt_path={checkpoint}"])
    assert "reward_accuracy" in capsys.readouterr().out
    (predictions,) = tmp_path.rglob("predictions.jsonl")
    found = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(found) == 21
    assert np.mean([row["margin"] > 0 for row in found]) > 0.9
