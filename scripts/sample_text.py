"""Let checkpoints continue the same prompt, so that a person sees what pruning did to the text.

    python scripts/sample_text.py PARENT CHILD [--prompt TEXT]

GGUF files that lie in a checkpoint's directory are run in llama.cpp too, and the commands that serve them printed.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from llmprune.core.errors import ModelError
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.measure.speed.llamacpp import GgufModel
from llmprune.models.loading import load_model

PROMPT = "The city of Venice is built on"
NEW_TOKENS = 48
REPETITION_PENALTY = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Hub ids, checkpoint directories or GGUF files")
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    for path in arguments.models:
        model, tokenizer = load_model(ModelRecipe(path=path))
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=REPETITION_PENALTY
            )
        print(f"{path}\n  {tokenizer.decode(output[0], skip_special_tokens=True)!r}")
        for file in sorted(Path(path).glob("*.gguf")) if Path(path).is_dir() else ():
            print(f"{file} in llama.cpp{in_llamacpp(file, tokenizer, arguments.prompt)}")
            print("\n".join(f"  {command}" for command in commands(file, arguments.prompt)))


def in_llamacpp(file: Path, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What llama.cpp makes of the prompt, and how fast; or why it does not."""
    try:
        with GgufModel(file) as model:
            ids, seconds = continued(model, tokenizer(prompt)["input_ids"])
    except ModelError as error:
        return f": {error}"
    tokens_per_s = (len(ids) - 1) / seconds if seconds else 0.0
    text = tokenizer.decode([*tokenizer(prompt)["input_ids"], *ids], skip_special_tokens=True)
    return f", {tokens_per_s:.0f} tokens/s\n  {text!r}"


def continued(model: GgufModel, prompt: list[int]) -> tuple[list[int], float]:
    """Tokens that follow the prompt, chosen as `generate` does above, and the seconds of decoding them."""
    punished = RepetitionPenaltyLogitsProcessor(REPETITION_PENALTY)
    found: list[int] = []
    started = time.perf_counter()
    with model.session(1, len(prompt) + NEW_TOKENS, torch.get_num_threads()) as session:
        session.read([prompt])
        started = time.perf_counter()
        while len(found) < NEW_TOKENS:
            logits = torch.from_numpy(session.logits())[None]
            found.append(int(punished(torch.tensor([[*prompt, *found]]), logits).argmax()))
            if model.is_end(found[-1]):
                break
            session.read([[found[-1]]])
    return found, time.perf_counter() - started


def commands(file: Path, prompt: str) -> list[str]:
    """How people run a GGUF file with llama.cpp's own programs."""
    return [
        f"llama-cli -m {shlex.quote(str(file))} -p {shlex.quote(prompt)} -n {NEW_TOKENS}",
        f"llama-server -m {shlex.quote(str(file))} -c 2048 --port 8080",
    ]


if __name__ == "__main__":
    main()
