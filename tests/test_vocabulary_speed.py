"""Random models with fewer rows are timed beside whole ones."""

from __future__ import annotations

import json

import pytest
import vocabulary_speed
from transformers import LlamaConfig


def test_fewer_rows_of_most_of_a_model_are_faster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300_000, max_position_embeddings=256, **sizes)
    monkeypatch.setattr(vocabulary_speed.AutoConfig, "from_pretrained", lambda path: config)
    monkeypatch.setattr(
        "sys.argv", ["vocabulary_speed.py", "a", "--rows", "1000", "--engine", "torch", "--repeats", "2", "--json"]
    )
    vocabulary_speed.main()
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["torch"] and found["torch"]["decode_speedup"]["median"] > 1.5
    monkeypatch.setattr("sys.argv", ["vocabulary_speed.py", "a", "--rows", "300000"])
    with pytest.raises(SystemExit, match="below the config's 300,000, got 300,000"):
        vocabulary_speed.main()
