"""Let checkpoints continue the same prompt, so that a person sees what pruning did to the text.

python scripts/sample_text.py PARENT CHILD [--prompt TEXT]
"""

from __future__ import annotations

import argparse

import torch

from llmprune.models.loading import load_model
from llmprune.recipe import ModelRecipe

PROMPT = "The city of Venice is built on"
NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Hub ids, checkpoint directories or GGUF files")
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    for path in arguments.models:
        model, tokenizer = load_model(ModelRecipe(path=path))
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.2)
        print(f"{path}\n  {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
