"""The stage that lets the parent write: what children are judged by that shall write as it does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmprune.core.files import atomic_path
from llmprune.core.progress import Steps
from llmprune.core.recipe_inputs import AS_IT_IS
from llmprune.data.tokens import SourceTokens, Split, TokenSplits
from llmprune.models.own_text import ends_of, own_windows, windows_together
from llmprune.models.parent import Parent
from llmprune.pipeline.run import Run


def in_parents_words(run: Run, parent: Parent, splits: TokenSplits, prompt_tokens: int) -> TokenSplits:
    """The splits with the parent's own text behind the first tokens of each window.

    Windows of all splits are written together. What is written is kept until all is: a run that was stopped goes on
    there.
    """
    ours = {name: split for name, split in splits.splits.items() if name != AS_IT_IS}
    places = [(name, source) for name, split in ours.items() for source in split.sources]
    known = {place: ours[place[0]].sources[place[1]].windows for place in places}
    with run.show("letting the parent write the text that children are judged by") as advance:
        steps = Steps(sum(map(len, known.values())), advance)
        written: dict[tuple[str, str], torch.Tensor] = {}
        for length in sorted({windows_NT.shape[1] for windows_NT in known.values()}):
            alike = [place for place in places if known[place].shape[1] == length]
            whole_NT = _all_written(run, parent, torch.cat([known[place] for place in alike]), prompt_tokens, steps)
            parts = torch.split(whole_NT, [len(known[place]) for place in alike])
            written |= dict(zip(alike, parts, strict=True))
    found = {name: _of_split(parent, name, split, written, prompt_tokens) for name, split in ours.items()}
    return replace(splits, splits={**splits.splits, **found})


def forget_parts(run: Run) -> None:
    """The tokens are stored: what they were put together from is needed no more."""
    shutil.rmtree(run.directory.own_text, ignore_errors=True)


def _all_written(run: Run, parent: Parent, windows_NT: torch.Tensor, prompt_tokens: int, steps: Steps) -> torch.Tensor:
    written: list[torch.Tensor] = []
    for batch_BT in torch.split(windows_NT, windows_together(windows_NT.shape[1])):
        key = hashlib.sha256(batch_BT.numpy().tobytes()).hexdigest()[:16]
        file = run.directory.own_text / f"{key}-{prompt_tokens}.safetensors"
        try:
            written.append(load_file(file)["windows"].to(torch.int64))
        except (FileNotFoundError, SafetensorError, KeyError):
            written.append(own_windows(parent.model, batch_BT, prompt_tokens))
            with atomic_path(file) as temporary:
                save_file({"windows": written[-1].to(torch.int32)}, temporary)
        steps.finish(len(batch_BT))
        steps.report(0)
    return torch.cat(written)


def _of_split(
    parent: Parent, name: str, split: Split, written: dict[tuple[str, str], torch.Tensor], prompt_tokens: int
) -> Split:
    sources = {source: _source(parent, written[name, source], prompt_tokens) for source in split.sources}
    return replace(split, sources=sources, own_after=prompt_tokens)


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
