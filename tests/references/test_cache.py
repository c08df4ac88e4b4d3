"""The reference that is computed once: the same numbers, no forward, and never those of something else."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

import lit_dpo.references.base as references
import tiny
from lit_dpo import AdapterReference, BaseReference, CachedReference, EMAReference, IPOLoss, ModelReference, NoReference
from lit_dpo.data.batch import EncodedPrompt, collate
from lit_dpo.errors import PolicyError
from lit_dpo.logps import Field
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.policy import LoRAPolicy
from training import Trace, adapter, data, trainer
from training import light as module

ALL = 42  # completions of the file's 21 pairs
PAIRS = tiny.pairs((7, 5, 9), (3, 1, 4), (1, 12, 2, 6))


@pytest.fixture
def forwards(monkeypatch):
    """Lengths of the completions that references have run, in a list that grows."""
    counted = []

    def counting(model, batch, **options):
        counted.extend(batch.completion_lengths.tolist())
        return completion_logps(model, batch, **options)

    monkeypatch.setattr(references, "completion_logps", counting)
    return counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("model") / "base")


def _policy(folder, **options):
    return LoRAPolicy(str(folder), **{"quantization": "none", "r": 2, **options})


def _attached(reference, policy):
    reference.check(policy)
    model = policy.load()
    reference.attach(model, policy)
    choose_layout(model)
    return model


def _same(found, expected):
    for field in ("total", "length", "per_token"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


# ---- the numbers ----


def test_what_is_read_is_what_was_computed_to_the_bit(folder, tmp_path, forwards):
    reference = CachedReference(BaseReference(), str(tmp_path))
    model, batch = _attached(reference, _policy(folder)), collate(PAIRS)
    expected = BaseReference().logps(model, batch)
    forwards.clear()
    _same(reference.logps(model, batch), expected)
    lengths = batch.completion_lengths.tolist()
    assert forwards == lengths
    tiny.randomize(model)
    for again in (model, _attached(reference, _policy(folder, r=4, alpha=1))):
        _same(reference.logps(again, batch), expected)
    assert forwards == lengths


def test_only_what_is_missing_is_computed(folder, tmp_path, forwards):
    reference = CachedReference(BaseReference(), str(tmp_path))
    model = _attached(reference, _policy(folder))
    (known, _), (first, second, third) = PAIRS[1].completions, PAIRS[2].completions
    reference.logps(model, collate([EncodedPrompt(PAIRS[1].prompt, [known])._replace(comparisons=())]))
    mixed = collate([PAIRS[2], PAIRS[1], PAIRS[0]])
    found = reference.logps(model, mixed)
    assert forwards[1:] == [len(one) for one in (first, second, third, PAIRS[1].completions[1], *PAIRS[0].completions)]
    expected = BaseReference().logps(model, mixed)
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.per_token, expected.per_token, rtol=0, atol=1e-5)


def test_what_a_completion_is_compared_with_does_not_matter(folder, tmp_path, forwards):
    """Pairs, then the same completions as a list, in another order: nothing is computed again."""
    reference = CachedReference(BaseReference(), str(tmp_path))
    model = _attached(reference, _policy(folder))
    expected = reference.logps(model, collate(tiny.written_out(PAIRS)))
    count = len(forwards)
    listed = [EncodedPrompt(one.prompt, one.completions[::-1]) for one in PAIRS]
    found = reference.logps(model, collate(listed))
    assert len(forwards) == count
    assert {float(one) for one in found.total} == {float(one) for one in expected.total}
    moved = [
        EncodedPrompt([*one.prompt, first[0]], [first[1:]], ())
        for one in PAIRS
        for first in one.completions
        if len(first) > 1
    ]
    reference.logps(model, collate(moved))  # the same tokens, but the prompt ends elsewhere
    assert len(forwards) == count + len(moved)


def test_a_pair_in_a_batch_twice_is_right_twice(folder, tmp_path):
    reference = CachedReference(BaseReference(), str(tmp_path))
    model = _attached(reference, _policy(folder))
    twice = collate([PAIRS[0], PAIRS[0]])
    for _ in range(2):
        first, second = reference.logps(model, twice).total.chunk(2)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_sums_alone_can_be_stored_and_losses_that_read_tokens_then_refuse(folder, tmp_path):
    sums, whole = (CachedReference(BaseReference(), str(tmp_path), per_token=tokens) for tokens in (False, True))
    model, batch = _attached(sums, _policy(folder)), collate(PAIRS)
    expected = BaseReference().logps(model, batch)
    for _ in range(2):
        found = sums.logps(model, batch)
        assert torch.equal(found.total, expected.total)
        assert found.per_token is None
    bytes_of = {True: 0, False: 0}
    for file in tmp_path.glob("*/*.logps"):
        bytes_of[json.loads((file.parent / "reference.json").read_text())["per_token"]] += file.stat().st_size
    assert bytes_of == {False: 7 * 4, True: 0}
    assert sums.provides == {Field.REFERENCE}
    assert whole.provides == {Field.REFERENCE, Field.REFERENCE_PER_TOKEN}
    assert "kl" not in module(folder, reference=sums).train_metrics
    assert "kl" in module(folder, reference=whole).train_metrics


# ---- a second run ----


def _fit(
    model, file, root, forwards, *, loss=None, reference=None, policy=None, lr=1e-2, epochs=2, validates=True, **options
):
    trace, start = Trace(), len(forwards)
    dpo = module(model, lr=lr, policy=policy, reference=reference, **({} if loss is None else {"loss": loss}))
    run = trainer(root, callbacks=[trace], max_epochs=epochs)
    options |= {"val": str(file), "eval_batch_size": 21} if validates else {}
    run.fit(dpo, data(file, **options))
    return trace.losses, adapter(dpo), len(forwards) - start


def test_the_first_epoch_fills_and_another_loss_beta_and_rate_then_run_no_reference(
    tiny_model, pairs_file, tmp_path, forwards
):
    policy, root = {"quantization": "nf4", "dropout": 0.1}, tmp_path / "run"
    cached = CachedReference(directory=str(tmp_path / "cache"))
    plain, weights, passes = _fit(tiny_model, pairs_file, root, forwards, policy=policy)
    assert passes > 4 * ALL, "two epochs and their validations, the check before validation aside"
    first, found, passes = _fit(tiny_model, pairs_file, root, forwards, policy=policy, reference=cached)
    assert passes == ALL, "every completion once"
    assert first == pytest.approx(plain, abs=1e-6)
    assert all(torch.allclose(found[name], p, atol=1e-5) for name, p in weights.items())
    for change in (
        {"loss": IPOLoss(beta=0.3)},
        {"lr": 1e-3},
        {"policy": policy | {"r": 8, "dropout": 0.0}},
        {"batch_size": 7, "seed": 5},
    ):
        given = {"policy": policy, "epochs": 1, "validates": False, **change}
        expected, _, _ = _fit(tiny_model, pairs_file, root, forwards, **given)
        losses, _, passes = _fit(tiny_model, pairs_file, root, forwards, reference=cached, **given)
        assert passes == 0, change
        assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_what_changes_the_numbers_runs_all_of_them(tiny_model, pairs_file, tmp_path, forwards):
    """Another model, quantisation or truncation; and the same again runs none."""
    cached = CachedReference(directory=str(tmp_path / "cache"))
    moved = tmp_path / "copy"
    shutil.copytree(tiny_model, moved)

    def passes(model=tiny_model, policy=None, **options):
        given = {"reference": cached, "policy": policy, "epochs": 1, "batch_size": 21, "validates": False, **options}
        return _fit(model, pairs_file, tmp_path / "run", forwards, **given)[2]

    assert passes() == ALL
    assert passes(moved) == 0, "the same content elsewhere"
    assert passes(policy={"quantization": "nf4"}) == ALL
    assert passes(policy={"quantization": "nf4", "double_quantization": False}) == ALL
    assert passes(policy={"quantization": "int8"}) == ALL
    assert passes(policy={"dtype": "bfloat16"}) == ALL
    changed = passes(max_length=25, truncation="truncate_completion")
    assert 0 < changed <= ALL, "those that are cut"
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 0x01  # one bit of one weight
    weights.write_bytes(content)
    assert passes(moved) == ALL
    assert passes() == 0
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_changed_chat_template_runs_all_of_them(quickstart, tmp_path, forwards):
    rows = [json.loads(line) for line in (quickstart / "train.jsonl").read_text().splitlines()[:9]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = tmp_path / "changed"
    shutil.copytree(quickstart / "model", changed)
    for template in changed.glob("chat_template.jinja"):
        template.write_text(template.read_text().replace("'<|'", "' <|'"))
    given = {"reference": CachedReference(directory=str(tmp_path / "cache")), "epochs": 1, "validates": False}
    for model, passes in ((quickstart / "model", 18), (changed, 18), (quickstart / "model", 0)):
        assert _fit(model, file, tmp_path / "run", forwards, **given)[2] == passes


def test_another_adapter_as_the_reference_runs_all_of_them(folder, tmp_path, forwards):
    batch, totals = collate(PAIRS), []
    for seed in (1, 2):
        tiny.lora(AutoModelForCausalLM.from_pretrained(folder), seed=seed).save_pretrained(tmp_path / f"{seed}")
        policy = LoRAPolicy(str(folder), quantization="none", adapter_path=str(tmp_path / f"{seed}"))
        for reference in (CachedReference(directory=str(tmp_path)), CachedReference(AdapterReference(), str(tmp_path))):
            totals.append(reference.logps(_attached(reference, policy), batch).total)
    assert forwards == 2 * batch.completion_lengths.tolist()
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[2], totals[3])
    assert not torch.equal(totals[0], totals[2])
    bare = CachedReference(BaseReference(), str(tmp_path))
    bare.logps(_attached(bare, _policy(folder)), batch)
    assert len(forwards) == 3 * 7


def test_another_model_can_be_remembered_too(folder, tmp_path, forwards):
    """Its own quantisation, dtype and adapter are what it is known by."""
    other = tiny.directory(tmp_path / "other", "qwen3", seed=5)
    batch = collate(PAIRS)
    for seed in (1, 2):
        tiny.lora(AutoModelForCausalLM.from_pretrained(other), seed=seed).save_pretrained(tmp_path / f"{seed}")
    for given, passes in (
        ({"quantization": "none"}, 1),
        ({"quantization": "none"}, 1),
        ({"quantization": "nf4"}, 2),
        ({"quantization": "none", "dtype": "bfloat16"}, 3),
        ({"quantization": "none", "adapter_path": str(tmp_path / "1")}, 4),
        ({"quantization": "none", "adapter_path": str(tmp_path / "2")}, 5),
        ({"quantization": "none", "adapter_path": str(tmp_path / "1")}, 5),
    ):
        inner = ModelReference(str(other), **given)
        reference = CachedReference(inner, str(tmp_path / "cache"))
        model = _attached(reference, _policy(folder))
        _same(reference.logps(model, batch), reference.logps(model, batch))
        assert len(forwards) == 7 * passes


def test_autocast_is_not_float32(folder, tmp_path, forwards):
    reference = CachedReference(BaseReference(), str(tmp_path))
    model, batch = _attached(reference, _policy(folder)), collate(PAIRS)
    plain = reference.logps(model, batch).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reference.logps(model, batch).total
    assert len(forwards) == 14
    assert not torch.equal(plain, rounded)
    assert torch.equal(reference.logps(model, batch).total, plain)


def test_damage_is_noticed_and_mended_while_training(tiny_model, pairs_file, tmp_path, forwards):
    cached = CachedReference(directory=str(tmp_path / "cache"))
    whole, _, _ = _fit(tiny_model, pairs_file, tmp_path / "run", forwards, reference=cached, epochs=1)
    (values,) = (tmp_path / "cache").glob("*/*.logps")
    content = bytearray(values.read_bytes())
    content[100] ^= 0x40
    values.write_bytes(content[:-4])
    with tiny.records("lit_dpo.references.store") as lines:
        again, _, passes = _fit(tiny_model, pairs_file, tmp_path / "run", forwards, reference=cached, epochs=1)
    assert passes == 2, "the pair with the changed byte, and the one that is cut"
    assert again == pytest.approx(whole, abs=1e-6)
    assert [line.getMessage() for line in lines] == [f"{values} is damaged; what it held is computed again."]
    assert _fit(tiny_model, pairs_file, tmp_path / "run", forwards, reference=cached, epochs=1)[2] == 0


def test_it_works_with_a_stream(tiny_model, tmp_path, forwards):
    """No length, no order, no rows: pairs are known by their tokens."""

    class Stream(IterableDataset):
        def __iter__(self):
            for start in range(0, 12, 4):
                yield tiny.batch(*[(3 + n % 4, 2 + n % 3, 4) for n in range(start, start + 4)], seed=start)

    losses = []
    for _ in range(2):
        trace = Trace()
        dpo = module(tiny_model, reference=CachedReference(directory=str(tmp_path / "cache")))
        run = trainer(tmp_path, callbacks=[trace], max_epochs=2)
        run.fit(dpo, DataLoader(Stream(), batch_size=None))
        losses.append(trace.losses)
        assert len(forwards) == 24
    assert losses[0] == losses[1]


# ---- configuration ----


@pytest.mark.parametrize("inner", [EMAReference(), NoReference(), CachedReference()], ids=repr)
def test_what_cannot_be_remembered_is_refused(inner):
    with pytest.raises(PolicyError, match="stay as they are"):
        CachedReference(inner)


def test_a_directory_that_takes_no_files_is_refused_before_weights_load(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match=r"`reference.directory` '.*file' but"):
        CachedReference(BaseReference(), str(tmp_path / "file")).check(_policy(folder))


def test_an_adapter_that_is_not_there_or_not_known_by_its_content_is_refused_before_weights_load(folder, tmp_path):
    absent = CachedReference(AdapterReference(str(tmp_path / "nothing")), str(tmp_path / "cache"))
    with pytest.raises(PolicyError, match="no such directory"):
        absent.check(_policy(folder))
    trained = tiny.lora(AutoModelForCausalLM.from_pretrained(folder))
    trained.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    pickled = CachedReference(AdapterReference(str(tmp_path / "pickled")), str(tmp_path / "cache"))
    with pytest.raises(PolicyError, match=r"has no adapter_model.safetensors"):
        pickled.check(_policy(folder))
    with pytest.raises(PolicyError, match=r"with \*.safetensors"):
        _policy(folder).adapter_content(str(tmp_path / "pickled"))


def test_it_starts_where_what_it_remembers_starts():
    assert CachedReference().starts_at_policy
    assert CachedReference(BaseReference()).starts_at_policy
    assert not CachedReference(ModelReference("x")).starts_at_policy


def test_a_policy_with_a_cache_can_be_copied(folder, tmp_path, forwards):
    reference = CachedReference(BaseReference(), str(tmp_path))
    model, batch = _attached(reference, _policy(folder)), collate(PAIRS)
    expected = reference.logps(model, batch)
    _same(reference.logps(copy.deepcopy(model), batch), expected)
    assert len(forwards) == 7


def test_under_autocast_too_every_pair_runs_once(tiny_model, pairs_file, tmp_path, forwards):
    """The check before the first step is made in the precision of training."""
    dpo = module(tiny_model, reference=CachedReference(directory=str(tmp_path / "cache")))
    trainer(tmp_path, precision="bf16-mixed").fit(dpo, data(pairs_file))
    assert len(forwards) == ALL
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_reference_that_cannot_say_what_it_depends_on_is_refused(folder, tmp_path):
    class Mine(BaseReference):
        def cache_identity(self, policy):
            return references.Reference.cache_identity(self, policy)

    reference = CachedReference(Mine(), str(tmp_path))
    with pytest.raises(PolicyError, match="`cache_identity`"):
        reference.check(_policy(folder))


def test_a_reference_without_tokens_is_cached_as_sums():
    class Sums(BaseReference):
        provides = frozenset({Field.REFERENCE})

    with pytest.raises(PolicyError, match=r"set `reference\.per_token` to false"):
        CachedReference(Sums())
    assert CachedReference(Sums(), per_token=False).provides == {Field.REFERENCE}


def test_a_checkpoint_goes_on_with_or_without_a_cache(tiny_model, pairs_file, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(root, reference, **options):
        trace, keep = Trace(), ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(root, callbacks=[trace, keep], enable_checkpointing=True, max_epochs=1)
        run.fit(module(tiny_model, reference=reference), data(pairs_file), **options)
        return trace.losses

    cached = CachedReference(directory=str(tmp_path / "cache"))
    whole = fit(tmp_path / "a", None)
    assert fit(tmp_path / "b", cached, ckpt_path=tmp_path / "a" / "step=3.ckpt") == pytest.approx(whole[3:], abs=1e-6)
    assert fit(tmp_path / "c", None, ckpt_path=tmp_path / "b" / "step=5.ckpt") == pytest.approx(whole[5:], abs=1e-6)


def test_it_is_a_frozen_value():
    reference = CachedReference(BaseReference(), "x")
    assert reference == copy.copy(reference) != CachedReference(BaseReference(), "y")
    assert hash(reference) == hash(copy.copy(reference))
    with pytest.raises(PolicyError, match="has no model to run"):
        reference.activated(None)


def test_a_full_disk_is_said(folder, tmp_path, monkeypatch):
    from lit_dpo.errors import TrainingError
    from lit_dpo.references.store import LogpStore

    def full(self, pairs):
        raise OSError(28, "No space left on device")

    reference = CachedReference(BaseReference(), str(tmp_path))
    model = _attached(reference, _policy(folder))
    monkeypatch.setattr(LogpStore, "put", full)
    with pytest.raises(TrainingError, match=r"No space left on device. Make room"):
        reference.logps(model, collate(PAIRS))
