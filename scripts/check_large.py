"""Hold a forecast to the first stages of a run on a parent that is large for this machine: a random model of a real
shape, in bfloat16.

    python scripts/check_large.py --tokenizer FILE.gguf --text FILE.jsonl --out DIR [--shape qwen3-1.7b] [--json]

Library, estimate and one child with half of every FFN, written and proven; each beside what `--dry-run` says of it.
Memory is what the process holds, sampled ten times a second, less what Python and torch hold: allocated pages, and of
mapped files as much as the parent has (the library's own are mapped too, and not in a forecast). A search is not run.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from check_forecast import disk_bytes, table
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from llmprune.choices.ffn import FfnChoice
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.models.checkpoint import write_checkpoint
from llmprune.models.surgery import prune
from llmprune.pipeline.inspection import forecast_run
from llmprune.pipeline.prepare import cut_text, lay_ground, solve_blocks
from llmprune.pipeline.run import Run
from llmprune.tables.estimate import estimate

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151_936},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 49_152},
}
CALIBRATION_TOKENS, ESTIMATE_TOKENS = 4096, 1024
_SAMPLE_S = 0.1


def write_parent(shape: str, tokenizer: Path, directory: Path) -> None:
    """A random Qwen 3 of that shape in bfloat16, and a tokenizer that has no more tokens than it has rows."""
    torch.manual_seed(0)
    heads = max(2, SHAPES[shape]["hidden_size"] // 128)
    config = Qwen3Config(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer.parent, gguf_file=tokenizer.name).save_pretrained(directory)


def recipe_of(parent: Path, text: Path) -> Recipe:
    data = {
        "sources": [{"name": "text", "path": str(text)}],
        "seq_len": 512,
        "calibration_tokens": CALIBRATION_TOKENS,
        "estimate_tokens": ESTIMATE_TOKENS,
        "search_tokens": 1024,
        "validation_tokens": 1024,
        "test_tokens": 1024,
    }
    model = {"path": str(parent), "dtype": "bfloat16", "device": "cpu"}
    front = {"size": 1, "baselines": [], "checkpoints": "none"}
    tables = {"tokens": ESTIMATE_TOKENS}
    return parse_recipe({"model": model, "data": data, "front": front, "tables": tables}, origin="check_large")


class Watch:
    """Seconds and memory of the stages of this process."""

    def __init__(self, parent_bytes: int) -> None:
        self._process, self._parent_bytes, self._stage = psutil.Process(), parent_bytes, ""
        self._base = self._process.memory_info()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started, self._stage = time.monotonic(), name
        yield
        self.seconds[name], self._stage = time.monotonic() - started, ""

    def _sample(self) -> None:
        while True:
            found = self._process.memory_info()
            mapped = min(found.shared - self._base.shared, self._parent_bytes)
            held = found.rss - found.shared - (self._base.rss - self._base.shared) + mapped
            self.peak_bytes[self._stage] = max(self.peak_bytes.get(self._stage, 0), held)
            time.sleep(_SAMPLE_S)


def check(shape: str, tokenizer: Path, text: Path, out: Path) -> dict[str, Any]:
    parent_path, run_path = out / "parent", out / "run"
    if not parent_path.is_dir():
        write_parent(shape, tokenizer, parent_path)
    recipe = recipe_of(parent_path, text)
    said = {stage["stage"]: stage for stage in forecast_run(run_path, recipe, "export")["stages"]}
    watch = Watch(disk_bytes(parent_path, ["model.safetensors"]))
    run = Run.start(run_path, recipe)
    ground = lay_ground(run)
    tokens = cut_text(run, ground)
    with watch.stage("library"):
        library = solve_blocks(run, ground, tokens)
    with watch.stage("estimate"):
        found = estimate(ground.parent, tokens["estimate"], library, tokens=ESTIMATE_TOKENS)
    assert all(nats == nats for nats in found.delta_nats.values()), "an estimate is no number"
    shape_of = ground.parent.shape
    half = FfnChoice(next(c.units for c in ground.space.ffn if 2 * c.units >= shape_of.ffn_width))
    architecture = shape_of.architecture.with_choices((layer, half) for layer in range(shape_of.layers))
    with watch.stage("checkpoints"):
        child = prune(ground.parent, architecture, library)
        write_checkpoint(child, ground.parent.tokenizer, architecture, {}, run_path / "export")
    rows = [
        {
            "stage": name,
            "forecast_seconds": said[name]["seconds"],
            "actual_seconds": watch.seconds[name],
            "forecast_memory_bytes": said[name]["peak_memory_bytes"],
            "actual_memory_bytes": watch.peak_bytes[name],
            "forecast_disk_bytes": said[name]["disk_bytes"],
            "actual_disk_bytes": disk_bytes(run_path, places) if places else None,
        }
        for name, places in (("library", ["library"]), ("estimate", []), ("checkpoints", ["export"]))
    ]
    parent_bytes = disk_bytes(parent_path, ["model.safetensors"])
    return {
        "stages": rows,
        "parent_bytes": parent_bytes,
        "library_share": disk_bytes(run_path, ["library"]) / parent_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file whose tokenizer is used")
    parser.add_argument("--text", type=Path, required=True, help="documents, as a data source reads them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = check(arguments.shape, arguments.tokenizer, arguments.text, arguments.out)
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(table(result["stages"])))


if __name__ == "__main__":
    main()
