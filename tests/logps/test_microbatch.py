"""Rows change what a step needs, not what it computes."""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from torch.utils._pytree import tree_leaves

import tiny
from lit_dpo import DPOLoss, DPOModule, IPOLoss, LoRAPolicy
from lit_dpo.data.batch import EncodedPrompt, collate, microbatch_borders
from lit_dpo.errors import PolicyError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.microbatch import GradientSum, join, microbatches, why_whole
from lit_dpo.losses import AOTLoss, BCOLoss, LDDPOLoss, MixtureLoss, SFTLoss, TDPOLoss, WPOLoss
from lit_dpo.memory import LiveBytes
from losses.test_contract import LOSSES, SETTINGS
from training import Trace, adapter, data, module, trainer

WHOLE = 10**9
FEW = ["q_proj", "v_proj"]
LENGTHS = ((9, 7, 5), (4, 3, 8), (20, 12, 10), (3, 1, 2), (6, 2, 9))


def test_rows_are_whole_pairs_in_order_and_full():
    random = np.random.default_rng(0)
    for limit in (1, 60, 100, 300, 10**6):
        lengths = random.integers(3, 120, 50)
        found = microbatch_borders(lengths, limit)
        assert (found[0], found[-1]) == (0, 50)
        rows = [lengths[a:b] for a, b in itertools.pairwise(found)]
        assert all(len(row) for row in rows)
        assert all(row.sum() <= limit or len(row) == 1 for row in rows)
        assert all(row.sum() + after[0] > limit for row, after in itertools.pairwise(rows))


def test_only_a_prompt_by_itself_runs_in_parts():
    """Two that fit together stay together, however little of one prompt may run at once."""
    ranked = collate([EncodedPrompt([1, 2, 3], [[4, 5], [6], [7, 8, 9]]), EncodedPrompt([1, 2], [[3], [4, 5], [6]])])
    assert [part.size for part in microbatches(ranked, WHOLE, 1)] == [ranked.size]
    assert len(microbatches(ranked, 1, 6)) > 2


def in_microbatches(parts, score, parameters, scale=1.0):
    """The sum of all losses, to run backward from; the losses, and the record."""
    sums, records = GradientSum(parameters, scale), []
    for part in parts:
        losses, pairs = score(part)
        sums.add(losses)
        records.append(pairs.detach())
        del losses, pairs
    return sums.total(), sums.losses, join(records)


def test_a_cut_batch_is_its_pairs():
    pairs = tiny.pairs(*LENGTHS)
    batch = collate(pairs, indices=[7, 3, 5, 1, 9], columns={"weight": [1.0, 2.0, 3.0, 4.0, 5.0]})
    rows = batch.cut(40)
    assert [row.size for row in rows] == [2, 1, 2]
    for row, numbers in zip(rows, ([0, 1], [2], [3, 4]), strict=True):
        weight = [1.0 + number for number in numbers]
        alone = collate([pairs[n] for n in numbers], [[7, 3, 5, 1, 9][n] for n in numbers], {"weight": weight})
        torch.testing.assert_close(row._asdict(), alone._asdict(), rtol=0, atol=0)
    assert batch.cut(WHOLE)[0].input_ids.data_ptr() == batch.input_ids.data_ptr()  # nothing is copied


def _module(name="llama", r=4, **sizes):
    made = DPOModule(LoRAPolicy("nowhere", quantization="none"))
    made.model = tiny.lora(tiny.model(name, **sizes), r=r)
    tiny.randomize(made.model)
    layout = choose_layout(made.model)
    assert layout == ("padded" if name == "falcon" else "flat")
    return made


def _score(dpo):
    def score(row):
        pairs = dpo.pair_logps(row)
        return dpo.compute_loss(pairs), pairs

    return score


@pytest.mark.parametrize("loss", [DPOLoss(), TDPOLoss(), WPOLoss(), LDDPOLoss(), MixtureLoss([IPOLoss(), SFTLoss()])])
@pytest.mark.parametrize("name", ["llama", "falcon"], ids=["flat", "padded"])
def test_losses_gradients_and_records_are_those_of_one_row(name, loss):
    """Everything that a loss may read, in both layouts, with weights, and with the gradient's scale of 16 bits."""
    dpo = _module(name)
    dpo.loss = loss
    batch = collate(tiny.pairs(*LENGTHS), columns={"weight": [1.0, 2.0, 0.5, 1.0, 3.0]})
    trained = {name: p for name, p in dpo.model.named_parameters() if p.requires_grad}
    pairs = dpo.pair_logps(batch)
    expected = dpo.compute_loss(pairs)
    (3 * expected.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    for limit, scale in ((1, 1.0), (40, 1.0), (40, 2.0**12)):
        for p in trained.values():
            p.grad = None
        rows = batch.cut(limit)
        assert len(rows) > 1
        total, losses, record = in_microbatches(rows, _score(dpo), [*trained.values()], scale)
        (3 * total).backward()
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-6)
        tiny.assert_same_gradients({name: p.grad for name, p in trained.items()}, gradients, 1e-5)
        _assert_same_record(record, pairs)
    dpo.microbatch_tokens = 40
    _assert_same_record(dpo.batch_logps(batch), pairs)


def _assert_same_record(found, expected):
    torch.testing.assert_close(_tensors(found), _tensors(expected.detach()), rtol=1e-5, atol=1e-5)
    assert not any(field.requires_grad for field in _tensors(found))


def _tensors(record):
    return [field for field in tree_leaves(tuple(record)) if field is not None]


def test_parameters_that_some_rows_or_all_leave_out():
    """A gradient that two parameters share is not added to twice."""
    one, two, late, unused = (torch.tensor([2.0], requires_grad=True) for _ in range(4))
    record = tiny.at_margin(0.0)
    rows = [1.0, 2.0, 3.0]

    def score(row):
        return (one + two) * row + (late * row if row > 1 else 0), record

    total, losses, joined = in_microbatches(rows, score, [one, two, late, unused])
    total.backward(retain_graph=True)
    assert [float(p.grad) for p in (one, two, late)] == [6, 6, 5]
    assert unused.grad is None
    assert losses.tolist() == [4, 12, 18]
    assert joined.policy_chosen.total.shape == (3,)
    with pytest.raises(RuntimeError, match="handed over once"):
        total.backward()


def test_autocast_and_bfloat16_compute_what_they_would_in_one_row():
    dpo = _module()
    batch = tiny.batch(*LENGTHS)
    trained = {name: p for name, p in dpo.model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", torch.bfloat16):
        expected = dpo.compute_loss(dpo.pair_logps(batch)).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    dpo.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        total, *_ = in_microbatches(batch.cut(1), _score(dpo), [*trained.values()])
    total.backward()
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=2e-2)
    for name, p in trained.items():
        assert p.grad.dtype == torch.float32
        assert torch.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), dim=0) > 0.99, name


def test_a_step_holds_the_graph_of_one_row():
    """Eight pairs need what the longest needs, besides gradients that add up."""
    dpo = _module(max_position_embeddings=512, num_hidden_layers=4, r=64)
    trained = [p for p in dpo.model.parameters() if p.requires_grad]
    copies = sum(p.numel() * p.element_size() for p in trained)

    def peak(count, limit):
        batch = tiny.batch(*[(60, 40, 40)] * count)
        with LiveBytes() as memory:
            in_microbatches(batch.cut(limit), _score(dpo), trained)[0].backward()
        dpo.zero_grad()
        return memory.peak

    alone = peak(1, WHOLE)
    assert peak(8, WHOLE) > 5 * alone
    assert peak(8, 140) < alone + 1.5 * copies


# --- training -------------------------------------------------------------------------------------------------------


def _train(model, pairs_file, root, microbatch_tokens, given, **options):
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    dpo, trace = module(model, microbatch_tokens=microbatch_tokens, optimizer=sgd, **copy.deepcopy(given)), Trace()
    run = trainer(root, num_sanity_val_steps=0, callbacks=[trace], **options)
    run.fit(dpo, data(pairs_file, val=str(pairs_file), batch_size=5))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    predictions = run.predict(dpo, data(pairs_file, predict=str(pairs_file), batch_size=5))
    return trace.losses, adapter(dpo), metrics, torch.cat([one["margin"] for one in predictions])


CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        *(({}, layout) for layout in ("auto", "sdpa")),
        *(({"loss": AOTLoss()}, layout) for layout in ("auto", "sdpa")),
        (CLIPPED, "auto"),
        ({"loss": BCOLoss()}, "auto"),
    ],
    ids=["plain-auto", "plain-sdpa", "coupled-auto", "coupled-sdpa", "accumulated and clipped", "remembering"],
)
def test_training_validation_and_predictions_are_those_of_one_row(tiny_model, pairs_file, tmp_path, options, layout):
    """Small micro-batches with activation checkpoints, and whole batches: losses, adapters, metrics, margins."""
    options = dict(options)
    given = {
        "policy": {"attention": layout, "target_modules": FEW},
        **({"loss": options.pop("loss")} if "loss" in options else {}),
    }
    whole = _train(tiny_model, pairs_file, tmp_path, WHOLE, given, **options)
    given["policy"]["gradient_checkpointing"] = True
    rows = _train(tiny_model, pairs_file, tmp_path, 100, given, **options)
    for found, expected in zip(rows, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class _Half(DPOModule):
    """Its gradient passes through float16, where 1e-8 is 0."""

    couples_pairs = False

    def __init__(self):
        super().__init__(LoRAPolicy("lit-dpo/quickstart"))
        self.weight = torch.nn.Parameter(torch.ones(()))

    def pair_logps(self, batch):
        return tiny.at_margin(*[0.0] * batch.size)

    def compute_loss(self, pairs):
        return (self.weight.half().expand(len(pairs.margin)).float() * 1e-8).double()


@pytest.mark.parametrize("scale", [None, 2.0**16, 2.0**12])
def test_a_microbatchs_gradients_are_taken_at_the_scale_of_the_trainers_scaler(scale, tmp_path):
    """As `16-mixed` does on a GPU: the gradient of a micro-batch is there before Lightning scales the loss."""
    module = _Half()
    run = trainer(tmp_path)
    run.precision_plugin.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    module._trainer = run
    batch = tiny.batch(*LENGTHS)
    total, losses, _ = module.accumulate(batch.cut(40))
    total.backward()
    torch.testing.assert_close(losses, torch.full((5,), 1e-8, dtype=torch.float64))
    torch.testing.assert_close(module.weight.grad, torch.tensor(0.0 if scale is None else 5e-8), rtol=1e-2, atol=0)


def test_a_loss_that_couples_pairs_sees_them_together_and_models_see_them_apart(tiny_model, pairs_file, tmp_path):
    seen, measured, compared = [], [], []

    class Seen(DPOModule):
        couples_pairs = False

        def forward(self, batch):
            (seen if torch.is_grad_enabled() else measured).append(batch.size)
            return super().forward(batch)

        def compute_loss(self, pairs):
            compared.append(len(pairs.margin))
            return super().compute_loss(pairs)

    policy = LoRAPolicy(str(tiny_model), quantization="none", target_modules=FEW)
    for loss, sizes in ((AOTLoss(), [5, 5, 5, 5, 1]), (DPOLoss(), [1] * 21)):
        seen.clear()
        compared.clear()
        with tiny.records("lightning.pytorch.utilities.rank_zero") as found:
            run, pairs = trainer(tmp_path), data(pairs_file, predict=str(pairs_file), batch_size=5)
            run.fit(dpo := Seen(policy, loss, microbatch_tokens=1), pairs)
        assert not [record for record in found if "`microbatch_tokens`" in record.getMessage()]
        assert seen == [1] * 21
        assert [size for size in compared if size in sizes][-len(sizes) :] == sizes
        run.predict(dpo, pairs)
        assert set(measured) == {1}


def test_why_a_batch_stays_whole():
    device = SingleDeviceStrategy()
    for strategy in (FSDPStrategy, DeepSpeedStrategy):  # the second is a DDPStrategy
        assert strategy.__name__ in str(why_whole(object.__new__(strategy), []))
    parameter = torch.zeros(1, requires_grad=True)
    assert why_whole(device, [parameter]) is None
    parameter.register_hook(lambda gradient: 2 * gradient)
    assert "hook" in str(why_whole(device, [parameter]))


# --- two passes -----------------------------------------------------------------------------------------------------


@functools.cache
def _policy(dropout):
    """One for all losses: no step is made."""
    model = tiny.lora(tiny.model(), r=4, lora_dropout=dropout)
    tiny.randomize(model)
    choose_layout(model)
    return model


def _with_loss(loss, tmp_path, dropout=0.0):
    made = DPOModule(LoRAPolicy("nowhere", quantization="none"), loss=loss)
    made.model = _policy(dropout)
    made.model.zero_grad()
    made._trainer = trainer(tmp_path)
    made.train()
    return made


@pytest.mark.parametrize("kind", sorted(LOSSES, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_two_passes_give_the_gradients_of_the_whole_batch(kind, tmp_path):
    """For every loss with each of its settings, whether or not it couples pairs."""
    for settings in [{}, *SETTINGS.get(kind, [])]:
        columns = {"weight": [1.0, 2.0, 0.5, 1.0, 3.0], "score_margin": [1.0, 2.0, 3.0, 0.5, 1.5]}
        columns["probability"] = [0.9, 0.6, 0.7, 0.8, 0.95]
        batch = collate(tiny.pairs(*LENGTHS), columns=columns)
        found = []
        for parts in ([batch], batch.cut(40)):
            torch.manual_seed(0)
            dpo = _with_loss(kind(**settings), tmp_path)
            trained = [p for p in dpo.model.parameters() if p.requires_grad]
            if len(parts) == 1:
                record = dpo.passes.remember(dpo.pair_logps(batch))
                losses = dpo.losses_of(record)
                total = losses.sum()
            else:
                total, losses, record = dpo.passes.in_two_passes(parts, batch, GradientSum(trained))
            total.backward()
            found.append((tiny.gradients(dpo.model), losses.detach(), record.margin.detach() if record[2] else None))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)


def test_the_second_pass_draws_the_masks_of_the_first(tmp_path):
    """Else gradients would belong to other log-probs than the losses; and what is drawn afterwards goes on."""
    dpo = _with_loss(AOTLoss(), tmp_path, dropout=0.5)
    seen = []
    forward = dpo.forward
    dpo.forward = lambda batch: seen.append(forward(batch)) or seen[-1]
    batch = tiny.batch(*LENGTHS)
    parts = batch.cut(40)
    start = torch.get_rng_state()
    dpo.passes.in_two_passes(parts, batch, GradientSum([p for p in dpo.model.parameters() if p.requires_grad]))
    first, second = seen[: len(parts)], seen[len(parts) :]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.per_token, other.per_token)
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    with torch.no_grad():
        for part in parts:
            forward(part)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("loss", [AOTLoss(), BCOLoss()], ids=str)
def test_a_loss_that_couples_pairs_needs_the_memory_of_one_microbatch(loss, tmp_path):
    dpo = DPOModule(LoRAPolicy("nowhere", quantization="none"), loss=loss)
    dpo.model = _module(max_position_embeddings=512, num_hidden_layers=4, r=64).model
    dpo._trainer = trainer(tmp_path)
    trained = [p for p in dpo.model.parameters() if p.requires_grad]
    copies = sum(p.numel() * p.element_size() for p in trained)

    def peak(count, limit):
        batch = tiny.batch(*[(60, 40, 40)] * count)
        with LiveBytes() as memory:
            if limit == WHOLE:
                dpo.losses_of(dpo.passes.remember(dpo.pair_logps(batch))).sum().backward()
            else:
                dpo.accumulate(batch.cut(limit))[0].backward()
        dpo.zero_grad()
        return memory.peak

    alone = peak(2, WHOLE) / 2
    assert peak(8, WHOLE) > 5 * alone
    assert peak(8, 140) < 1.1 * alone + 2.5 * copies


class Together(DPOModule):
    """Weighs a pair by how it compares with the others of its batch."""

    def compute_loss(self, pairs):
        losses = super().compute_loss(pairs)
        return losses * torch.softmax(losses.detach(), 0) * len(losses)


class Apart(Together):
    couples_pairs = False


class Logging(DPOModule):
    couples_pairs = True


def test_evaluation_keeps_pairs_together_for_such_an_override(tiny_model, pairs_file, tmp_path):
    sizes = []

    class Mixing(DPOModule):
        def forward(self, batch):
            sizes.append(batch.size)
            return super().forward(batch)

    dpo = Mixing(LoRAPolicy(str(tiny_model), quantization="none"), microbatch_tokens=1)
    trainer(tmp_path).validate(dpo, data(pairs_file, val=str(pairs_file), batch_size=21))
    assert sizes == [21]


@pytest.mark.parametrize(("kind", "whole"), [(Together, False), (Apart, False), (Logging, True), (DPOModule, False)])
def test_an_override_that_may_couple_pairs_sees_them_together(tiny_model, pairs_file, tmp_path, kind, whole):
    """What the package cannot know it does not cut, unless the class says that it may."""
    policy = LoRAPolicy(str(tiny_model), quantization="none", target_modules=FEW)
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    adapters = []
    for microbatch_tokens in (WHOLE, 1):
        torch.manual_seed(0)
        dpo = kind(policy, optimizer=sgd, microbatch_tokens=microbatch_tokens)
        with tiny.records("lightning.pytorch.utilities.rank_zero") as found:
            trainer(tmp_path, max_epochs=2).fit(dpo, data(pairs_file, batch_size=21))  # all weigh the same at first
        adapters.append(torch.cat([p.flatten() for p in adapter(dpo).values()]))
    said = [record.getMessage() for record in found if "`microbatch_tokens`" in record.getMessage()]
    assert [kind.__name__ in line and "`couples_pairs = False`" in line for line in said] == [True] * whole
    assert torch.allclose(*adapters, rtol=0, atol=1e-5) is (kind is not Apart)


def test_a_row_holds_a_token(tiny_model):
    with pytest.raises(PolicyError, match="Expected `microbatch_tokens` >= 1 but got 0"):
        module(tiny_model, microbatch_tokens=0)


def test_joining_one_record_or_records_of_sums():
    record = tiny.at_margin(1.0, 2.0)
    assert join([record]) is record
    joined = join([record._replace(state=torch.ones(1)), tiny.at_margin(3.0)])
    assert joined.margin.tolist() == [1.0, 2.0, 3.0]
    assert joined.policy_chosen.per_token is None or len(joined.policy_chosen.per_token) >= 3
    assert joined.state is not None
    assert joined.state.tolist() == [1.0]
