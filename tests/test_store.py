"""Token splits on disk: they come back as they were, or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import numbered_documents, small_data_recipe, tiny_tokenizer, write_jsonl

from llmprune.core.errors import RunDirectoryError
from llmprune.core.recipe_inputs import SPLIT_NAMES
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import TokenSplits, build_token_splits


@pytest.fixture
def saved(
    tmp_path: Path,
) -> tuple[TokenSplits, Path]:
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", numbered_documents(name)) for name in ("a", "b", "c")]
    unseen = {"unseen": (sources.pop(),), "unseen_seq_len": 48, "unseen_tokens": 96}
    recipe = small_data_recipe(*sources, bos=True, recovery_tokens=64, **unseen)
    splits = build_token_splits(recipe, tiny_tokenizer())
    path = tmp_path / "run" / "tokens.safetensors"
    save_token_splits(splits, path)
    return splits, path


def test_splits_survive_the_disk(saved: tuple[TokenSplits, Path]) -> None:
    splits, path = saved
    loaded = load_token_splits(path)
    assert list(path.parent.iterdir()) == [path]
    assert loaded.provenance == splits.provenance
    assert loaded.splits.keys() == splits.splits.keys() == set(SPLIT_NAMES)
    for name in SPLIT_NAMES:
        assert loaded[name].hash == splits[name].hash
        assert (loaded[name].seq_len, loaded[name].bos) == (48 if name == "unseen" else 16, True)
        for source, tokens in splits[name].sources.items():
            assert torch.equal(loaded[name].sources[source].windows, tokens.windows)
            assert torch.equal(loaded[name].sources[source].bytes, tokens.bytes)
            assert loaded[name].sources[source].windows.dtype == torch.int64


def test_splits_of_the_first_version_are_read(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", numbered_documents("ant"))
    splits, path = build_token_splits(small_data_recipe(source), tiny_tokenizer()), tmp_path / "tokens.safetensors"
    save_token_splits(splits, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["llmprune_tokens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for split in header["splits"]:
        del split["seq_len"], split["bos"]
    first = json.dumps({**header, "version": 1, "seq_len": 16, "bos": False})
    digest = hashlib.sha256(first.encode()).hexdigest()
    save_file(tensors, path, {"llmprune_tokens": first, "header_sha256": digest})
    loaded = load_token_splits(path)
    assert {name: split.hash for name, split in loaded.splits.items()} == {
        name: split.hash for name, split in splits.splits.items()
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_or_cut_file_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("run")
    path = directory / "tokens.safetensors"
    source = write_jsonl(directory / "a.jsonl", numbered_documents("ant", 40))
    save_token_splits(build_token_splits(small_data_recipe(source), tiny_tokenizer()), path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"tokens\.safetensors .*delete it and start again"):
        load_token_splits(path)


def test_a_missing_file_of_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"tokens\.safetensors"):
        load_token_splits(tmp_path / "tokens.safetensors")
