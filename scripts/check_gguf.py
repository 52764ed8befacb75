"""Hold the GGUF files of a checkpoint, and of its parent, to transformers: text, perplexity and speed in llama.cpp.

    python scripts/check_gguf.py PARENT CHILD --text assets/demo/wikipedia.jsonl [--types f32 f16 q8_0] [--json]

For each type of weights: how many of ten prompts llama.cpp continues greedily with the same 64 tokens as transformers
does, with llama.cpp's defaults (a float16 cache), and with a float32 cache against transformers on the weights as the
file holds them; both models' perplexity in llama.cpp over that in transformers (eight windows of the text), and the
child's speed-up over its parent in llama.cpp. The speed-up in torch stands beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.core.recipe import GgufType, WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.formats.gguf import write_gguf
from llmprune.measure.quality import perplexity
from llmprune.measure.speed.llamacpp import GgufModel, greedy, window_nats
from llmprune.measure.speed.throughput import Speed, Workload, measure_paired
from llmprune.models.expected import PROOF_TEXT
from llmprune.models.loading import load_model
from llmprune.models.surgery import register_pruned_classes

PROMPTS = 10
PROMPT_TOKENS = 32
NEW_TOKENS = 64
WINDOWS = 8
WINDOW_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", help="checkpoint directory or GGUF file")
    parser.add_argument("child", help="checkpoint directory")
    parser.add_argument("--text", type=Path, required=True, help="a .jsonl file with documents under 'text'")
    parser.add_argument("--types", nargs="+", choices=get_args(GgufType), default=list(get_args(GgufType)))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    register_pruned_classes()
    (parent, tokenizer), (child, _) = (
        load_model(ModelRecipe(path=path, device="cpu")) for path in (arguments.parent, arguments.child)
    )
    # Windows and prompts do not overlap.
    ids = text_ids(arguments.text, tokenizer, WINDOWS * WINDOW_TOKENS + PROMPTS * PROMPT_TOKENS)
    rows = [
        {"engine": "torch", "weights": "float32", **speeds(parent, child, arguments.threads, arguments.repeats, None)}
    ]
    for weights in arguments.types:
        rows.append(
            {
                "engine": "llama.cpp",
                "weights": weights,
                **{
                    f"{name}_{figure}": value
                    for name, model in (("parent", parent), ("child", child))
                    for figure, value in compared(model, tokenizer, ids, weights, arguments.threads).items()
                },
                **speeds(parent, child, arguments.threads, arguments.repeats, weights),
            }
        )
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))


def text_ids(path: Path, tokenizer: PreTrainedTokenizerBase, needed: int) -> torch.Tensor:
    """The first tokens of a text file."""
    found: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            found += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            if len(found) >= needed:
                return torch.tensor(found[:needed])
    raise SystemExit(f"{path} has {len(found)} tokens, {needed} are needed")


def compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, weights: GgufType, threads: int
) -> dict[str, Any]:
    """What llama.cpp makes of a model's file, beside what transformers makes of the model."""
    windows_NT = ids[: WINDOWS * WINDOW_TOKENS].reshape(WINDOWS, WINDOW_TOKENS)
    prompts_BT = ids[WINDOWS * WINDOW_TOKENS :].reshape(PROMPTS, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(model, tokenizer, path, weights)
        with GgufModel(path) as loaded:
            nats = window_nats(loaded, windows_NT, threads)

            def same(reference: PreTrainedModel, *, exact: bool) -> int:
                return sum(
                    greedy(loaded, prompt_T.tolist(), NEW_TOKENS, threads, exact=exact)
                    == continued(reference, prompt_T, loaded)
                    for prompt_T in prompts_BT
                )

            return {
                "megabytes": round(path.stat().st_size / 1e6, 1),
                "same_texts": same(model, exact=False),
                "same_texts_of_stored_weights": same(stored(model, weights), exact=True),
                "ppl_ratio": math.exp(
                    float((nats - perplexity.window_nats(model, windows_NT)).sum()) / (WINDOWS * (WINDOW_TOKENS - 1))
                ),
                "same_token_ids": loaded.tokenize(PROOF_TEXT)
                == tokenizer(PROOF_TEXT, add_special_tokens=False)["input_ids"],
                "chat_template": loaded.chat_template == tokenizer.chat_template,
            }


def stored(model: PreTrainedModel, weights: GgufType) -> PreTrainedModel:
    """The model with its matrices as a file of this type holds them, in float32."""
    kind = getattr(GGMLQuantizationType, weights.upper())
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.from_numpy(dequantize(quantize(parameter.detach().numpy(), kind), kind).copy())
    rounded.tie_weights()
    return rounded


@torch.inference_mode()
def continued(model: PreTrainedModel, prompt_T: torch.Tensor, loaded: GgufModel) -> list[int]:
    """transformers' greedy text, which ends where llama.cpp's would."""
    output = model.generate(  # type: ignore[operator]
        prompt_T[None],
        attention_mask=torch.ones_like(prompt_T)[None],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = output[0, len(prompt_T) :].tolist()
    end = next((i for i, token in enumerate(found) if loaded.is_end(token)), NEW_TOKENS)
    return found[: end + 1]  # type: ignore[no-any-return]


def speeds(
    parent: PreTrainedModel, child: PreTrainedModel, threads: int, repeats: int, weights: GgufType | None
) -> dict[str, Any]:
    """Parent and child side by side, in torch (`weights` None) or in llama.cpp."""
    rules = WorkloadRecipe(engine="llamacpp" if weights else "torch", threads=threads)
    workload = Workload.from_recipe(rules, "float32", "cpu", weights or "f16")
    of_parent, (of_child,) = measure_paired(parent, [child], workload, repeats)

    def figures(speed: Speed) -> dict[str, float]:
        return {
            "decode_tokens_per_s": speed.decode_tokens_per_s.median,
            "prefill_tokens_per_s": speed.prefill_tokens_per_s.median,
        }

    return {
        **{f"parent_{name}": value for name, value in figures(of_parent).items()},
        **{f"child_{name}": value for name, value in figures(of_child).items()},
        "decode_speedup": of_child.decode_speedup.median,
        "prefill_speedup": of_child.prefill_speedup.median,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, one column a figure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [f"{row[name]:.4g}" if type(row.get(name)) is float else str(row.get(name, "-")) for name in names]
        for row in rows
    ]
    return "\n".join(f"{name:>28}  " + "  ".join(f"{row[i]:>10}" for row in cells) for i, name in enumerate(names))


if __name__ == "__main__":
    main()
