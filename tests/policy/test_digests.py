"""What a directory's digest sees: its content, all of it, and not its place."""

from __future__ import annotations

import json
import shutil

import pytest

from lit_dpo.policy.digests import sampled_digest, whole_digest


@pytest.fixture
def folder(tmp_path):
    """Weights of 9 MiB, which the samples do not cover."""
    found = tmp_path / "model"
    found.mkdir()
    (found / "model.safetensors").write_bytes(bytes(range(256)) * (9 * 2**12))
    for name in ("config.json", "adapter_config.json", "modeling.py", "README.md"):
        (found / name).write_text("{}")
    return found


@pytest.mark.parametrize("digest", [sampled_digest, whole_digest])
def test_the_same_content_elsewhere_is_the_same(folder, tmp_path, digest):
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(folder)


@pytest.mark.parametrize("place", [0, 2**20 + 1, 5 * 2**20 - 7, 9 * 2**20 - 1])
def test_any_changed_byte_of_the_weights_is_another_whole(folder, place):
    before = whole_digest(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert whole_digest(folder) != before


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "modeling.py"])
def test_configuration_and_code_count_and_a_readme_does_not(folder, name):
    before = whole_digest(folder)
    (folder / "README.md").write_text("new")
    assert whole_digest(folder) == before
    (folder / name).write_text("[]")
    assert whole_digest(folder) != before


@pytest.mark.parametrize("digest", [sampled_digest, whole_digest])
def test_weights_that_are_not_loaded_do_not_count(folder, digest):
    """A repository may hold them twice, and a cache only some of its files."""
    before = digest(folder)
    (folder / "consolidated.safetensors").write_bytes(b"twice")
    assert digest(folder) == before


@pytest.mark.parametrize("digest", [sampled_digest, whole_digest])
def test_every_shard_counts(folder, digest):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"b")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    before = digest(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"c")
    assert digest(folder) != before


@pytest.mark.parametrize("digest", [sampled_digest, whole_digest])
def test_weights_under_a_name_of_their_own_count(folder, digest):
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    before = digest(folder)
    (folder / "own.safetensors").write_bytes(b"other")
    assert digest(folder) != before
