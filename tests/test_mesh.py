"""Several devices: what each holds and receives, by closed forms, and as two processes count it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from torch import float32

import counted_step
import ranks
import tiny
from lit_dpo import LoRAPolicy
from lit_dpo.errors import TrainingError
from lit_dpo.plan import elsewhere
from lit_dpo.plan.mesh import Links, Mesh, Parts, Share, Traffic
from lit_dpo.plan.skeleton import skeleton

PARTS = Parts(layers=80_000, largest=1000, rest=4000, whole=600, trained=320)
MESHES = [Mesh(nodes, devices, shard) for nodes in (1, 4) for devices in (1, 8) for shard in ("none", "node", "all")]


# ---- closed forms ----


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shares_are_of_one_copy_and_what_is_whole_is_on_each(mesh):
    share = Share.of(mesh, PARTS)
    assert mesh.spread == {"none": 1, "node": mesh.devices, "all": mesh.ranks}[mesh.shard]
    assert share.base * mesh.spread == PARTS.spread  # these divide
    assert share.whole == PARTS.whole
    assert share.gathered == (0 if mesh.spread == 1 else 3 * PARTS.largest + PARTS.rest)
    assert share.buckets == (PARTS.trained if mesh.ranks > 1 else 0)
    # a reference that is a model of its own is spread alike, and gathered at another time
    both = Share.of(mesh, PARTS, PARTS._replace(trained=0))
    assert (both.base, both.whole, both.gathered) == (2 * share.base, 2 * share.whole, share.gathered)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_device_receives_what_it_has_not(mesh):
    traffic = Traffic.of(mesh, PARTS.trained, [PARTS.spread] * 3, links := Links(node=1000.0, network=10.0))
    assert traffic.gathered == pytest.approx([PARTS.spread - PARTS.spread / mesh.spread] * 3)
    assert traffic.reduced == pytest.approx(2 * (PARTS.trained - PARTS.trained / mesh.ranks))
    # rings pass all ports of a node at once, and its links one after another
    slowest = 1000.0 if mesh.nodes == 1 else min(1000.0, 10.0 * mesh.devices)
    assert links.bandwidth(mesh, mesh.ranks) == slowest
    assert traffic.reducing == pytest.approx(traffic.reduced / slowest)
    within = 1000.0 if mesh.shard != "all" else slowest
    assert traffic.gathering == pytest.approx([size / within for size in traffic.gathered])


def test_only_what_arithmetic_does_not_hide_is_waited_for():
    traffic = Traffic.of(Mesh(1, 4, "node"), 0, [400, 400, 800], Links(100.0, 1.0))  # 3, 3 and 6 seconds
    assert traffic.waiting([3, 4, 6]) == 0
    assert traffic.waiting([2, 4, 1]) == 1 + 0 + 5
    # a pass of T tokens hides its gather from T = bandwidth · bytes of a weight / (2 · rate), whatever the model
    for weights in (10**6, 10**9):
        links, rate, spread = Links(360e9, 40e9), 400e12, 1024
        found = Traffic.of(Mesh(1, spread, "all"), 0, [2 * weights], links)
        tokens = found.gathering[0] * rate / (2 * weights)
        assert tokens == pytest.approx(400e12 / 360e9, rel=0.01)
        assert found.waiting([2 * weights * 1.01 * tokens / rate]) == 0


# ---- two processes ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("sharded") / "model", vocab_size=300, max_position_embeddings=512)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_step_of_two_ranks_gathers_and_reduces_what_was_planned(model, pairs_file, tmp_path, quantization):
    policy = {"r": 4, "quantization": quantization, "shard": "all"}
    found = ranks.run(counted_step.step, 2, str(model), str(pairs_file), tmp_path, 100, policy, folder=tmp_path)
    parts = Parts.of(skeleton(LoRAPolicy(str(model), **policy), float32).model)
    share = Share.of(Mesh(1, 2, "all"), parts)
    for one in found:
        assert one["microbatches"] > 1
        # the reference, forward and backward of each micro-batch: embeddings and norms, then layer by layer
        assert sum(one["gathered"]) == one["microbatches"] * 3 * parts.spread
        assert max(one["reduced"]) == parts.trained  # and a few numbers, such as how many pairs there are
        assert sum(one["reduced"]) < parts.trained + 100
        assert one["trained"] == parts.trained
        tables = 14 * 4 * (16 + 256) if quantization == "nf4" else 0  # bitsandbytes' two of each layer
        assert one["frozen"] == pytest.approx(share.base + share.whole + tables, abs=100)


# ---- plans for machines that are not here ----


def test_devices_are_counted_as_a_trainer_names_them():
    for given, expected in ((8, 8), ("8", 8), ([0, 3], 2), ("0, 1, 5", 3), ("auto", 1), (-1, 1)):
        assert elsewhere.count(given) == expected


@pytest.mark.parametrize("strategy", ["deepspeed_stage_3", "fsdp"])
def test_what_the_run_would_refuse_is_not_planned(strategy):
    with pytest.raises(TrainingError, match=f"got {strategy}.*policy.shard"):
        elsewhere.settings({"strategy": strategy})


# ---- the page ----


ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="a source distribution has no benchmarks")
def test_the_table_of_the_page_is_what_the_code_says():
    """But for activations and arithmetic, which take probes of minutes: `python benchmarks/mesh.py`."""
    spec = importlib.util.spec_from_file_location("benchmarks_mesh", ROOT / "benchmarks" / "mesh.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    expected = [found.cells(row) for row in found.rows()]
    assert len(expected) == 22
    for before, after in expected:
        assert re.search(
            f"^{re.escape(before)} [0-9.]+ \\| [*0-9.]+ \\| {re.escape(after)} [0-9.]+ \\|$", page, re.M
        ), before
    # two layers and what a third one adds are the whole of a model
    assert found.sizes("8B", "nf4") == Parts.of(found.made("8B", "nf4", None).model)
