"""The stage that lets the parent write: what children are judged by that shall write as it does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmprune.core.files import atomic_path
from llmprune.core.progress import Advance, Steps
from llmprune.core.recipe_inputs import AS_IT_IS
from llmprune.data.tokens import SourceTokens, Split, TokenSplits
from llmprune.models.own_text import ends_of, own_windows
from llmprune.models.parent import Parent
from llmprune.pipeline.run import Run


def in_parents_words(run: Run, parent: Parent, splits: TokenSplits, prompt_tokens: int) -> TokenSplits:
    """The splits with the parent's own text behind the first tokens of each window.

    What is written of a source in a split is kept until all is: a run that was stopped goes on there.
    """
    ours = {name: split for name, split in splits.splits.items() if name != AS_IT_IS}
    windows = sum(len(source.windows) for split in ours.values() for source in split.sources.values())
    with run.show("letting the parent write the text that children are judged by") as advance:
        steps = Steps(windows, advance)
        written = {name: _written(run, parent, split, prompt_tokens, steps) for name, split in ours.items()}
    return replace(splits, splits={**splits.splits, **written})


def forget_parts(run: Run) -> None:
    """The tokens are stored: what they were put together from is needed no more."""
    shutil.rmtree(run.directory.own_text, ignore_errors=True)


def _written(run: Run, parent: Parent, split: Split, prompt_tokens: int, steps: Steps) -> Split:
    sources = {}
    for name, source in split.sources.items():
        file = run.directory.own_text / f"{split.hash[:16]}-{name}-{prompt_tokens}.safetensors"
        try:
            windows_NT = load_file(file)["windows"].to(torch.int64)
        except (FileNotFoundError, SafetensorError, KeyError):
            windows_NT = own_windows(parent.model, source.windows, prompt_tokens, _counting(steps))
            with atomic_path(file) as temporary:
                save_file({"windows": windows_NT.to(torch.int32)}, temporary)
        steps.finish(len(windows_NT))
        steps.report(0)
        sources[name] = _source(parent, windows_NT, prompt_tokens)
    return replace(split, sources=sources, own_after=prompt_tokens)


def _counting(steps: Steps) -> Advance:
    return lambda done, total: steps.report(done)


def _source(parent: Parent, windows_NT: torch.Tensor, prompt_tokens: int) -> SourceTokens:
    tokenizer = parent.tokenizer
    assert tokenizer is not None, "a parent that was loaded has a tokenizer"
    texts = tokenizer.batch_decode(windows_NT[:, 1:].tolist(), skip_special_tokens=True)
    ends = torch.tensor(sorted(ends_of(parent.model) | {int(tokenizer.eos_token_id)}))
    own = torch.tensor(list(_lengths(windows_NT[:, prompt_tokens:], ends)))
    return SourceTokens(windows_NT, torch.tensor([max(1, len(text.encode())) for text in texts]), own)


def _lengths(written_NT: torch.Tensor, ends: torch.Tensor) -> Iterator[int]:
    """Tokens of each text up to its first end, which is one of them."""
    for written_T in written_NT:
        found = torch.isin(written_T, ends).nonzero()
        yield int(found[0]) + 1 if len(found) else len(written_T)
