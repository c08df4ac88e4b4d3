"""The two sides of a comparison: each trains in a process of its own and waits for a word before every step."""

from __future__ import annotations

import itertools
import os
import resource
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

from material import Spec


class Gate:
    """Stops a side before each step, and reports what the step before it took and computed."""

    def __init__(self, connection: Any, device: str) -> None:
        self.connection, self.device = connection, device
        self.cpu = self.wall = 0.0
        self.loss: Any = None
        self.pairs: Callable[[], Any] | None = None  # called when the clocks have been read
        self.tokens = 0
        self.lists = False  # whether completions of a prompt are together
        self.loading, self.resident = 0.0, _resident()

    def wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        report = None
        if self.pairs is not None:
            report = {"cpu": cpu, "wall": wall, "loss": float(self.loss), "pairs": self.pairs(), "tokens": self.tokens}
        else:
            self.begin()
        self.connection.send({"report": report, "memory": self.memory()})
        try:
            go = self.connection.recv()
        except EOFError:  # the parent is gone
            go = False
        if not go:
            os._exit(0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def begin(self) -> None:
        """Loading is over: what it took is not the training's."""
        self.resident = _resident()
        if self.device == "cuda":
            import torch

            self.loading, self.resident = float(torch.cuda.max_memory_allocated()), float(torch.cuda.memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        """Bytes: the peak, what was there when training began, and on a GPU, apart, the peak until then."""
        if self.device == "cuda":
            import torch

            peak = float(torch.cuda.max_memory_allocated())
            return {"peak": peak, "start": self.resident, "loading": self.loading}
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "start": self.resident}


def missing(side: str) -> str | None:
    """Why a side cannot be had here, or None."""
    return "trl is not installed" if side.startswith("trl") and not find_spec("trl") else None


def extras(side: str, device: str) -> dict[str, bool]:
    """What makes a side faster, and whether it is there: kernels for a GPU."""
    if side != "trl-best" or device != "cuda":
        return {}
    return {"flash attention": bool(find_spec("flash_attn")), "Liger": bool(find_spec("liger_kernel"))}


def _resident() -> float:
    with open("/proc/self/statm") as stream:
        return float(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(side: str, spec: Spec, steps: int, connection: Any) -> None:
    """The body of a child process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(spec.threads)
    gate = Gate(connection, spec.device)
    spec.best |= side == "trl-best"
    gate.lists = side == "lit_dpo-lists"
    spec.checkpointing |= side in ("trl", "lit_dpo-checkpoints")  # TRL's default
    try:
        (_trl if side.startswith("trl") else _lit_dpo)(spec, steps, gate)
    except Exception as error:
        traceback.print_exc()
        connection.send(
            {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        )


def same_start(model: Any) -> None:
    """LoRA weights that depend on nothing but their name's place; bfloat16 holds them exactly."""
    import torch

    random = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            # Lightning makes its device the default while a model is configured
            values = torch.rand(parameter.shape, generator=random, device="cpu") * 2 - 1
            parameter.data.copy_((values / parameter.shape[1] ** 0.5).bfloat16())


def _lit_dpo(spec: Spec, steps: int, gate: Gate) -> None:
    import functools

    import lightning.pytorch as pl
    import torch

    from lit_dpo import DPOLoss, DPOModule, LoRAPolicy, PreferenceDataModule

    class Module(DPOModule):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                same_start(self.model)

    class Data(PreferenceDataModule):
        def _sampler(self, *args: Any, **kwargs: Any) -> Any:
            sampler = super()._sampler(*args, **kwargs)
            sampler.bucket = sampler.bucket if spec.order == "bucketed" else 0
            return sampler

    class Steps(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            gate.wait()
            gate.pairs, gate.tokens = (lambda: flat_pairs(batch)), batch.input_ids.numel()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            gate.loss = outputs["loss"]

    policy = LoRAPolicy(
        spec.model,
        quantization=spec.quantization,
        r=spec.r,
        alpha=spec.r,
        target_modules=list(spec.targets),
        dtype=spec.dtype,
        gradient_checkpointing=spec.checkpointing,
    )
    optimizer = functools.partial(torch.optim.AdamW, lr=spec.lr, weight_decay=0.0)
    module = Module(policy, DPOLoss(beta=spec.beta), optimizer=optimizer, lr_scheduler="constant")
    trainer = pl.Trainer(
        accelerator=spec.device,
        devices=1,
        precision="32-true" if spec.device == "cpu" else "bf16-mixed",
        max_epochs=-1,
        max_steps=steps,
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, listed(spec, gate.lists) if spec.lists else ready(Data, spec))


def listed(spec: Spec, as_lists: bool) -> Any:
    """Batches of prompts with all their completions, or of all pairs of these written out."""
    from torch.utils.data import DataLoader

    from lit_dpo.data.batch import EncodedPrompt, collate

    made = []
    for batch in spec.lists:
        given = []
        for prompt, completions in batch:
            compared = [*itertools.combinations(range(len(completions)), 2)]
            if as_lists:
                given.append(EncodedPrompt(prompt, completions, compared))
            else:
                given += [EncodedPrompt(prompt, [completions[one], completions[other]]) for one, other in compared]
        made.append(collate(given))
    return DataLoader(cast(Any, made), batch_size=None, shuffle=False)


def ready(kind: Any, spec: Spec) -> Any:
    return kind(
        train=spec.train,
        tokenizer=spec.model,
        max_length=spec.max_length,
        truncation="truncate_prompt",
        batch_size=spec.batch_size,
    )


def flat_pairs(batch: Any) -> list[list[list[int]]]:
    """Token ids of each comparison: prompt, chosen, rejected."""
    from lit_dpo.logps.layouts import segments

    ids, found, comparisons = batch.input_ids[0].tolist(), [], iter(batch.comparisons.tolist())
    for s, count in zip(segments(batch), batch.comparisons_per_prompt.tolist(), strict=True):
        for pair in itertools.islice(comparisons, count):
            sides = [ids[begin:end] for begin, end in (s.spans[place] for place in pair)]
            found.append([ids[s.start : s.start + s.prompt], *sides])
    return found


def _trl(spec: Spec, steps: int, gate: Gate) -> None:
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the same token ids as on the other side

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            seen.append((loss.detach(), inputs))
            gate.loss = sum(one for one, _ in seen) / len(seen)
            gate.pairs = lambda: [pair for _, one in seen for pair in _padded_pairs(one)]
            gate.tokens = sum(one["input_ids"].numel() for _, one in seen)
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.wait()
            seen.clear()

    seen: list[tuple[Any, Any]] = []  # of the step
    at_once = spec.at_once or spec.batch_size
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, pair, strict=True)) for batch in spec.batches for pair in batch]
    quantization = None
    if spec.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        )
    on_gpu = spec.device == "cuda"
    loading: dict[str, Any] = {"dtype": spec.dtype, **({"device_map": {"": 0}} if on_gpu else {})}
    kernels = extras("trl-best" if spec.best else "trl", spec.device)
    if kernels.get("flash attention"):
        loading["attn_implementation"] = "flash_attention_2"
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=spec.batch_size // at_once,
            max_steps=steps,
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            beta=spec.beta,
            max_length=spec.max_length,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=spec.checkpointing,
            train_sampling_strategy="sequential",
            model_init_kwargs=loading,
            use_liger_kernel=kernels.get("Liger", False),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=spec.r, lora_alpha=spec.r, target_modules=list(spec.targets), task_type="CAUSAL_LM")
        trainer = Trainer(
            spec.model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec.model),
            quantization_config=quantization,
            peft_config=lora,
            callbacks=[Steps()],
        )
        same_start(trainer.model)
        trainer.train()


def _padded_pairs(inputs: Any) -> list[list[list[int]]]:
    ids, masks, seen = (inputs[name].tolist() for name in ("input_ids", "completion_mask", "attention_mask"))
    rows = [
        ([i for i, c, a in zip(*row, strict=True) if a and not c], [i for i, c, a in zip(*row, strict=True) if c])
        for row in zip(ids, masks, seen, strict=True)
    ]
    size = len(rows) // 2
    return [[rows[n][0], rows[n][1], rows[size + n][1]] for n in range(size)]
