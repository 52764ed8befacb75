"""Outlines know a model's shape without its weights, and stand-ins take its place where it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, IDS, LAYERS, VOCAB, Case, tiny_model
from tiny import tiny_tokenizer

from llmprune.choices.space import Space
from llmprune.core.errors import ModelError
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.forecast.rates import Asked, measure_rates
from llmprune.formats.gguf import tensor_bytes, write_gguf
from llmprune.formats.gguf_limits import gguf_problem
from llmprune.measure.room import Memory
from llmprune.measure.speed.throughput import Workload
from llmprune.models import loading, stand_in
from llmprune.models.parent import Parent, load_parent, outline_parent
from llmprune.models.sizes import size_of
from llmprune.models.stand_in import Part, drawn_to_whole, part_bytes, parts_of, whole_of
from llmprune.numerics.llamacpp_library import library

CPU = torch.device("cpu")


def outline_of(case: Case, directory: Path) -> Parent:
    """Of a config alone: there is no file of weights."""
    tiny_model(case).config.save_pretrained(directory)
    return outline_parent(ModelRecipe(path=str(directory), device="cpu"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_outline_has_the_sizes_of_the_model(case: Case, tmp_path: Path) -> None:
    tiny_model(case).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_parent(ModelRecipe(path=str(tmp_path / "model"), device="cpu"))
    outline = outline_of(case, tmp_path / "outline")
    assert outline.shape == loaded.shape and outline.model.dtype == loaded.model.dtype
    whole = loaded.shape.architecture
    assert size_of(outline.model, outline.shape, whole) == size_of(loaded.model, loaded.shape, whole)
    assert outline.vocabulary_names() == loaded.vocabulary_names()
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    if not gguf_problem(loaded.model.config, "f16"):
        assert tensor_bytes(outline.model, "f16") == tensor_bytes(loaded.model, "f16")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_stand_in_runs_as_its_model_does(case: Case, tmp_path: Path) -> None:
    outline = outline_of(case, tmp_path)
    model, ids = tiny_model(case), torch.arange(12).reshape(1, 12) * 7 % 100
    whole = stand_in.stand_in(outline, whole_of(outline), CPU)
    # Frequencies, scales and masks are not in a checkpoint: made of nothing, they would be whatever was in memory.
    of_model = dict(model.named_buffers())
    for name, buffer in whole.model.named_buffers():
        torch.testing.assert_close(buffer, of_model[name], msg=name)
    part = stand_in.stand_in(outline, Part(LAYERS - 1, 100), CPU)
    assert (part.shape.layers, replace(part.shape, layers=LAYERS)) == (LAYERS - 1, outline.shape)
    for parent, rows in ((whole, VOCAB), (part, 100)):
        with torch.inference_mode():
            logits = parent.model(input_ids=ids).logits
        assert logits.shape == (1, 12, rows) and logits.isfinite().all() and logits.std() > 0


def test_an_outline_is_in_the_dtype_of_a_run(tmp_path: Path) -> None:
    case = CASES[0]
    config = tiny_model(case).config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    # A CPU computes in float32, whatever the checkpoint is in.
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        outline = outline_parent(ModelRecipe.model_validate({"path": str(tmp_path), "device": "cpu", "dtype": asked}))
        assert outline.model.dtype == dtype
        assert stand_in.stand_in(outline, Part(1, 10), CPU).model.dtype == dtype


def test_a_gguf_file_has_an_outline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, file = next(case for case in CASES if case.model_type == "qwen3"), tmp_path / "model.gguf"
    # The only head_dim that transformers reads of this family's files.
    write_gguf(tiny_model(replace(case, values={**case.values, "head_dim": 128})), tiny_tokenizer(), file)
    recipe = ModelRecipe(path=str(file), device="cpu")
    loaded = load_parent(recipe)
    monkeypatch.setattr("gguf.dequantize", lambda *_: pytest.fail("a tensor is read"))
    outline = outline_parent(recipe, with_tokenizer=True)
    assert outline.shape == loaded.shape and outline.source == "model.gguf"
    whole = loaded.shape.architecture
    assert size_of(outline.model, outline.shape, whole) == size_of(loaded.model, loaded.shape, whole)
    assert outline.tokenizer is not None and loaded.tokenizer is not None
    assert outline.tokenizer("red bridge")["input_ids"] == loaded.tokenizer("red bridge")["input_ids"]


class TestParts:
    @pytest.fixture(autouse=True)
    def _outline(self, tmp_path: Path) -> None:
        self.outline = outline_of(CASES[0], tmp_path)

    def test_a_small_model_stands_whole(self) -> None:
        assert parts_of(self.outline) == [Part(LAYERS, VOCAB)]

    def test_of_a_large_one_as_much_as_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = part_bytes(self.outline, Part(0, 1))
        monkeypatch.setattr(stand_in, "STAND_IN_BYTES", 400 * row)
        # A quarter for rows, and three layers at the least.
        assert parts_of(self.outline) == [Part(3, 100), Part(1, 100), Part(1, 25)]
        monkeypatch.setattr(stand_in, "_ROWS_SHARE", 0.01)
        monkeypatch.setattr(stand_in, "STAND_IN_BYTES", part_bytes(self.outline, Part(LAYERS, 100)))
        assert [part.layers for part in parts_of(self.outline)] == [LAYERS] * 2
        monkeypatch.setattr(stand_in, "_ROWS_SHARE", 0.9)
        monkeypatch.setattr(stand_in, "STAND_IN_BYTES", part_bytes(self.outline, Part(3, VOCAB)))
        assert parts_of(self.outline) == [Part(3, VOCAB), Part(1, VOCAB)]

    @pytest.mark.parametrize("room", [1, 3000, 60_000, 90_000, 10**9])
    def test_what_grows_in_lines_is_drawn_exactly(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stand_in, "STAND_IN_BYTES", room)

        def measure(parent: Parent) -> Mapping[str, float]:
            layers, rows = whole_of(parent)
            return {"both": 3.0 + 5.0 * layers + 0.25 * rows, "neither": 7.0, "less": 100.0 - layers}

        found = drawn_to_whole(self.outline, CPU, measure)
        assert found["both"] == pytest.approx(3 + 5 * LAYERS + 0.25 * VOCAB) and found["neither"] == 7
        assert found["less"] == 100 - parts_of(self.outline)[0].layers, "no more of a model takes less time"


@pytest.mark.parametrize("engine", ["torch", "llamacpp"])
def test_rates_of_parts_are_whole(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, size = CASES[0], "medium"
    if engine == "llamacpp":
        library()
        # Of this family llama.cpp runs no child whose layers differ.
        case, size = next(case for case in CASES if case.model_type == "qwen3"), "small"
    values: dict[str, Any] = {**case.values, "hidden_size": 96, "intermediate_size": 128}
    outline = outline_of(replace(case, values=values), tmp_path)
    monkeypatch.setattr(stand_in, "STAND_IN_BYTES", 1)
    gguf: Any = {"engine": "llamacpp", "gguf_type": "f16"} if engine == "llamacpp" else {}
    workload = Workload(1, 8, 4, "float32", 1, "cpu", **gguf)
    asked = {"it": Asked(Space.of(outline.shape, 1, 32, size=size), workload, windows=2, seq_len=16, reach=True)}
    rates, reach = measure_rates(outline, CPU, asked)["it"]
    assert all(value > 0 for value in rates.to_json().values())
    assert reach is not None and all(phase.fastest > 0 and phase.halved > 0 for phase in reach.values())


def test_what_cannot_even_be_timed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outline = outline_of(CASES[0], tmp_path)
    monkeypatch.setattr("llmprune.forecast.rates.device_memory", lambda device: Memory(2**30, 1000))
    with pytest.raises(ModelError, match=r"4 layers of .* and 0\.0 GB of memory are free: nothing can be timed here"):
        measure_rates(outline, CPU, {})


def test_a_config_that_says_no_dtype_asks_for_one_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model(CASES[0]).config
    config.dtype = None
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "resolve_device", lambda name: torch.device("meta"))
    with pytest.raises(ModelError, match="does not say its dtype"):
        outline_parent(ModelRecipe(path=str(tmp_path)))
