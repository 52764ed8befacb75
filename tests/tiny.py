"""Small stand-ins that several test files share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.core.recipe import Recipe, SpaceSize
from llmprune.core.recipe_inputs import DataRecipe, SourceRecipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.measure.quality.perplexity import SourceQuality
from llmprune.measure.record import MeasuredOn, Record, child_id
from llmprune.measure.speed.throughput import Speed, Spread
from llmprune.pipeline.exports import write_children
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.tables.costs import CostTable

SMALL_SPLITS = {
    "calibration_tokens": 256,
    "estimate_tokens": 64,
    "search_tokens": 64,
    "validation_tokens": 64,
    "test_tokens": 64,
    "seq_len": 16,
}

MEASURED_ON = MeasuredOn(
    dataset="unit",
    split="search",
    seq_len=16,
    tokens=60,
    bos=False,
    workload={"batch": 1, "prompt_tokens": 8, "generated_tokens": 4, "dtype": "float32", "threads": 1, "device": "cpu"},
    repeats=1,
    host={"cpu": "of no make", "logical_cores": 2},
)

_SENTENCES = (
    "The river was wide and slow, and the boats on it were older than the town.",
    "She counted the lamps along the quay: eleven, then twelve, then none at all.",
    "Nobody in the town remembered who had built the bridge or why it had been painted red.",
    "In winter the ice carried carts, horses and, once, a small brass band.",
    "A café by the naïve façade sold crêpes for 3 € and tea for 2 €.",
)


@cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, a new one each time, with `<s>` 0, `</s>` 1 and `<pad>` 2. At least 259 tokens."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def write_jsonl(path: Path, texts: list[str]) -> SourceRecipe:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return SourceRecipe(name=path.stem, path=str(path))


def numbered_documents(prefix: str, count: int = 60) -> list[str]:
    """Documents in which every word names its document, so that any piece of one can be traced back."""
    return [" ".join([f"{prefix}{number}é"] * 8) for number in range(count)]


def small_data_recipe(*sources: SourceRecipe, **changes: Any) -> DataRecipe:
    return DataRecipe(sources=sources, **{**SMALL_SPLITS, **changes})


def tiny_space(
    layers: int = 3, kv_groups: int = 2, ffn_width: int = 32, *, ffn_step: int = 16, size: SpaceSize = "medium"
) -> Space:
    shape = ParentShape(
        layers=layers, hidden_size=24, kv_groups=kv_groups, queries_per_group=2, head_dim=6, ffn_width=ffn_width
    )
    return Space.of(shape, 1, ffn_step, size=size)


def linear_costs(space: Space, attention: float = 0.1, ffn: float = 0.2) -> CostTable:
    """Savings in proportion to the rows that leave; a whole block saves this share of the parent's decode time.

    In prefill attention and FFN change places.
    """

    def savings(**whole: float) -> dict[Choice, float]:
        rows = space.shape.rows
        return {
            choice: whole[kind] * (1 - rows(choice) / rows(space.shape.full(kind)))
            for kind in BLOCK_KINDS
            for choice in space.ladder(kind)
        }

    return CostTable(
        space, {"decode": savings(attention=attention, ffn=ffn), "prefill": savings(attention=ffn, ffn=attention)}
    )


def spread(median: float) -> Spread:
    return Spread(median, 0.9 * median, 1.1 * median)


def record_of(
    architecture: Architecture, nats: float, decode: float, prefill: float = 1.0, name: str = "", **others: Any
) -> Record:
    """A record with these figures, and with whatever else is told."""
    figures: dict[str, Any] = {
        "name": name,
        "id": child_id(architecture.hash, "a library"),
        "hash": architecture.hash,
        "architecture": architecture,
        "params": sum(choice.units for _, choice in architecture.blocks()),
        "bytes": 4,
        "stored_as": "float32",
        "kv_bytes_per_token": 2,
        "decode_bytes": 4,
        "nats_per_token": nats,
        "nats_per_byte": nats / 4,
        "ppl": 2.0**nats,
        "ppl_ratio": nats,
        "per_source": {"unit": SourceQuality(nats, nats / 4, 2.0**nats, 60)},
        "prefill_tokens_per_s": spread(10 * prefill),
        "decode_tokens_per_s": spread(decode),
        "prefill_speedup": spread(prefill),
        "decode_speedup": spread(decode),
        "measured_on": MEASURED_ON,
    }
    return Record(**{**figures, **others})


def save_tiny_llama(directory: Path, texts: Sequence[str]) -> Path:
    """A Llama of three layers that has learnt a little of `texts`, and its tokenizer, as a checkpoint.

    In a random model every block does harm, and the smallest child is the best.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model, tokenizer = LlamaForCausalLM(config), tiny_tokenizer()
    ids = torch.tensor([token for text in texts for token in (*tokenizer(text)["input_ids"], 1)])
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = windows[torch.randint(len(windows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_recipe(root: Path) -> Recipe:
    """A recipe whose model and texts are written into `root`; a whole run of it takes seconds."""
    texts = {name: numbered_documents(name) for name in ("ant", "bee")}
    sources = [write_jsonl(root / f"{name}.jsonl", documents) for name, documents in texts.items()]
    parent = save_tiny_llama(root / "parent", [text for documents in texts.values() for text in documents])
    return parse_recipe(
        {
            "model": {"path": str(parent), "device": "cpu"},
            "data": small_data_recipe(*sources).model_dump(),
            "workload": {"prompt_tokens": 8, "generated_tokens": 4, "repeats": 1},
            "space": {"ffn_step": 16},
            "search": {"population": 4, "trials": 5, "targets": [1.2]},
            "recover": {"refit": False},
            "front": {"size": 2, "repeats": 1, "baselines_at": 1.2, "random_draws": 2},
            "export": {"pick": "ppl_ratio<=1000"},
        },
        origin="tiny",
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def paired_by_bytes(
    reference: PreTrainedModel, candidates: Sequence[PreTrainedModel], *rest: Any
) -> tuple[Speed, list[Speed]]:
    """Stands in for `measure_paired`: a model is as fast as it is small, always."""

    def speed(model: PreTrainedModel) -> Speed:
        ratio = _numbers(reference) / _numbers(model)
        return Speed(
            *(
                Spread(median=value, low=0.9 * value, high=1.1 * value)
                for value in (1000 * ratio, 100 * ratio, ratio, ratio)
            )
        )

    one = Spread(1.0, 1.0, 1.0)
    return replace(speed(reference), prefill_speedup=one, decode_speedup=one), [speed(model) for model in candidates]


def _numbers(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write_front(run: Run) -> list[Path]:
    """Write the checkpoints of a run's front."""
    return write_children(run, Judges(run, stock_up(run)), read_front(run.directory))
