"""GGUF files side by side: read alike, timed in turns."""

from __future__ import annotations

import json
from pathlib import Path

import gguf_files
import pytest
import torch
from tiny import small_data_recipe, tiny_recipe, tiny_tokenizer, write_jsonl

from llmprune.data.store import save_token_splits
from llmprune.data.tokens import build_token_splits
from llmprune.formats.gguf import write_gguf
from llmprune.models.parent import load_parent
from llmprune.pipeline.run_directory import RunDirectory

pytest.importorskip("xllamacpp")


def test_files_are_read_and_timed_beside_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = load_parent(tiny_recipe(tmp_path).model)
    for name in ("f32", "f16"):
        write_gguf(parent.model, parent.tokenizer, tmp_path / f"{name}.gguf", name)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    texts = [f"ant{number}é bee{number}é " * 8 for number in range(60)]
    splits = build_token_splits(small_data_recipe(write_jsonl(tmp_path / "prose.jsonl", texts)), tiny_tokenizer())
    save_token_splits(splits, run.tokens)
    monkeypatch.setattr(gguf_files, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(gguf_files, "STEPS", 2)
    command = ["gguf_files.py", str(tmp_path / "f32.gguf"), str(tmp_path / "f16.gguf"), "--run", str(run.path)]
    monkeypatch.setattr("sys.argv", [*command, "--rounds", "2", "--threads", "1", "--json"])
    gguf_files.main()
    first, second = json.loads(capsys.readouterr().out)
    assert first["decode_speedup"] == [1.0, 1.0, 1.0] and second["bytes"] < first["bytes"]
    assert first["test_nats_over_reference"] == 0 and abs(second["test_nats_over_reference"]) < 0.01
    windows = splits["test"].sources["prose"].windows
    with torch.inference_mode():
        logits = parent.model(windows).logits[:, :-1]
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert first["test_nats"] == pytest.approx(expected, abs=0.01)
    monkeypatch.setattr("sys.argv", [*command, "--rounds", "1", "--threads", "1"])
    gguf_files.main()
    assert "f16.gguf" in capsys.readouterr().out
