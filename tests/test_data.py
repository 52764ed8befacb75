"""Token splits: disjoint, shared out by weight, with exact byte counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SMALL_SPLITS, numbered_documents, small_data_recipe, tiny_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llmprune.core.errors import DataError
from llmprune.core.recipe_inputs import DataRecipe, SourceRecipe
from llmprune.data.bos import opening_with_bos, puts_bos
from llmprune.data.tokens import TokenSplits, build_token_splits, divide_windows, encode_with_bytes


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def decoded(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    text = tokenizer.decode(ids.flatten().tolist())
    assert isinstance(text, str)
    return text


def texts_of(splits: TokenSplits, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """Per split and source, the text of all windows in a row."""
    return {
        f"{name}/{source}": decoded(tokenizer, tokens.windows).split("</s>")
        for name, split in splits.splits.items()
        for source, tokens in split.sources.items()
    }


@pytest.fixture
def two_sources(tmp_path: Path) -> tuple[SourceRecipe, SourceRecipe]:
    return write_jsonl(tmp_path / "a.jsonl", numbered_documents("ant")), write_jsonl(
        tmp_path / "b.jsonl", numbered_documents("bee")
    )


def test_no_document_is_in_two_splits(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    splits = build_token_splits(small_data_recipe(*two_sources), tokenizer)
    words = {
        place: {word for document in documents for word in document.split()[1:-1]}
        for place, documents in texts_of(splits, tokenizer).items()
    }
    assert len(words) == 10 and all(words.values())
    for place, here in words.items():
        for other, there in words.items():
            assert place == other or not here & there


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=200, max_size=240), seq_len=st.integers(8, 40), bos=st.booleans())
def test_a_document_is_one_run_of_tokens_in_one_split(
    lengths: list[int], seq_len: int, bos: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = tiny_tokenizer()
    # One character for each document, three tokens long, so that every run of it is seen.
    documents = {chr(0x4E00 + number): length for number, length in enumerate(lengths)}
    texts = [character * length for character, length in documents.items()]
    source = write_jsonl(tmp_path_factory.mktemp("data") / "s.jsonl", texts)
    splits = build_token_splits(small_data_recipe(source, seq_len=seq_len, bos=bos), tokenizer)
    used: list[str] = []
    for name in splits.splits:
        windows = splits[name].sources["s"].windows
        assert windows.shape[1] == seq_len and windows.numel() >= SMALL_SPLITS[f"{name}_tokens"]
        ids = windows[:, int(bos) :]
        runs = re.findall(r"((\w)\2*)�*(</s>)?", decoded(tokenizer, ids))
        for run, character, eos in runs:
            assert 3 * len(run) <= max(ids.shape[1], ids.numel() // 16)
            assert len(run) <= documents[character] and (not eos or len(run) == documents[character])
        used += [character for _, character, _ in runs]
    assert len(used) == len(set(used))


@pytest.fixture
def unseen(tmp_path: Path) -> dict[str, Any]:
    """An unseen source, half of which are copies of what the sources have."""
    copies = numbered_documents("ant", 30)
    source = write_jsonl(tmp_path / "u.jsonl", [*copies, *numbered_documents("cow", 60)])
    return {"unseen": (source,), "unseen_seq_len": 40, "unseen_tokens": 200}


def test_unseen_text_is_a_split_of_its_own_and_shares_no_document(
    two_sources: tuple[SourceRecipe, SourceRecipe], unseen: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # All of the first source's documents are taken, so that a copy of any of them would be a leak.
    taken = small_data_recipe(*two_sources, calibration_tokens=1700)
    without = build_token_splits(taken, tokenizer)
    splits = build_token_splits(taken.model_copy(update=unseen), tokenizer)
    assert "unseen" not in without.splits and list(splits.splits)[-1] == "unseen"
    assert {name: splits[name].hash for name in without.splits} == {n: s.hash for n, s in without.splits.items()}
    split = splits["unseen"]
    assert (split.name, split.seq_len, split.dataset, split.weights) == ("unseen", 40, "u", {"u": 1.0})
    assert split.sources["u"].windows.shape == (5, 40) and split.tokens == 200
    texts = texts_of(splits, tokenizer)
    here = {word for text in texts.pop("unseen/u") for word in text.split()[1:-1]}
    there = {word for documents in texts.values() for text in documents for word in text.split()}
    assert here and not here & there
    assert splits.provenance["documents"]["unseen"]["u"] >= 1 and "u" in splits.provenance["sources"]
    with pytest.raises(DataError, match=r"there is no unseen text here, .*name its sources in data\.unseen"):
        without["unseen"]


def test_a_run_keeps_its_tokens_when_a_later_version_knows_more_keys(
    two_sources: tuple[SourceRecipe, SourceRecipe], unseen: dict[str, Any]
) -> None:
    recipe = small_data_recipe(*two_sources, bos=False)
    first_version = {"sources", "seq_len", "bos", *(f"{n}_tokens" for n in recipe.splits), "seed"}
    assert recipe.identity().keys() == first_version
    later = recipe.model_copy(update={**unseen, "recovery_tokens": 64, "own_text_after": 8})
    assert later.identity().keys() == set(DataRecipe.model_fields)


def test_long_documents_are_cut_at_the_end_of_a_window(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [chr(0x4E00 + number) * 500 for number in range(40)])
    splits = build_token_splits(small_data_recipe(source, calibration_tokens=640), tokenizer)
    windows = splits["calibration"].sources["s"].windows
    assert windows.shape == (40, 16) and splits.provenance["documents"]["calibration"] == {"s": 20}
    assert all(len(set(decoded(tokenizer, pair)) - {"�"}) == 1 for pair in windows.reshape(20, 32))
    assert tokenizer.eos_token_id not in windows


def test_the_seed_decides_which_documents_are_where(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    one, again, other = (
        build_token_splits(small_data_recipe(*two_sources, seed=seed), tokenizer) for seed in (1, 1, 2)
    )
    for name in one.splits:
        assert one[name].hash == again[name].hash
        assert one[name].hash != other[name].hash


def test_more_calibration_text_leaves_the_scored_splits_alone(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    less, more = (
        build_token_splits(small_data_recipe(*two_sources, calibration_tokens=n), tokenizer) for n in (256, 512)
    )
    same = {name: less[name].hash == more[name].hash for name in less.splits}
    assert same == {name: name != "calibration" for name in less.splits}


def test_hash_covers_windows_weights_and_bytes(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    def built() -> TokenSplits:
        return build_token_splits(small_data_recipe(*two_sources), tokenizer)

    one, two, three = built()["test"], built()["test"], built()["test"]
    one.sources["a"].windows[0, 0] += 1
    two.sources["b"].bytes[0] += 1
    assert len({one.hash, two.hash, three.hash}) == 3


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), [8, 8]),
        ((3, 1), [12, 4]),
        ((1, 1, 1), [6, 5, 5]),
        ((1000, 1), [15, 1]),
        ((1000, 1, 1), [15, 1, 1]),
    ],
)
def test_windows_follow_the_weights(weights: tuple[float, ...], expected: list[int]) -> None:
    sources = tuple(SourceRecipe(name=f"s{i}", path=f"{i}.txt", weight=weight) for i, weight in enumerate(weights))
    recipe = DataRecipe(sources=sources, seq_len=16, search_tokens=16 * 16 - 3)
    shares = {source.name: source.weight / sum(weights) for source in sources}
    assert list(divide_windows(recipe, "search", shares).values()) == expected


def test_weights_are_normalised(two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: Any) -> None:
    first, second = two_sources
    splits = build_token_splits(small_data_recipe(first.model_copy(update={"weight": 3.0}), second), tokenizer)
    split = splits["calibration"]
    assert split.weights == {"a": 0.75, "b": 0.25}
    assert [len(source.windows) for source in split.sources.values()] == [12, 4]
    assert (split.tokens, split.dataset) == (256, "a+b")


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_of_a_document_are_all_counted_once(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids, token_bytes = encode_with_bytes(text, tokenizer)
    assert token_bytes.sum() == len(text.encode())
    assert (token_bytes >= 0).all()
    # Wherever a prefix of the tokens ends between two characters, its bytes are exact.
    for end in range(len(ids) + 1):
        prefix = decoded(tokenizer, torch.from_numpy(ids[:end]))
        if text.startswith(prefix):
            assert token_bytes[:end].sum() == len(prefix.encode())


@pytest.mark.parametrize("bos", [False, True])
def test_bytes_of_a_window_are_those_of_its_scored_tokens(
    bos: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [f"river {n} naïve 3 € boats 🚤 lamps" for n in range(80)])
    splits = build_token_splits(small_data_recipe(source, bos=bos), tokenizer)
    exact = 0
    for split in splits.splits.values():
        tokens = split.sources["s"]
        for window, window_bytes in zip(tokens.windows, tokens.bytes, strict=True):
            scored = decoded(tokenizer, window[1:]).replace("</s>", "")
            if "�" not in scored:
                exact += 1
                assert window_bytes == len(scored.encode())
    assert exact > 5


def test_bos_opens_every_window_and_counts_towards_its_length(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = build_token_splits(small_data_recipe(*two_sources, bos=True), tokenizer)["search"].sources["a"].windows
    assert windows.shape == (2, 16) and windows.dtype == torch.int64
    assert ((windows == tokenizer.bos_token_id) == (torch.arange(16) == 0)).all()


def test_special_tokens_that_the_tokenizer_would_add_are_left_out(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    adding = tiny_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert adding("a")["input_ids"][0] == adding.bos_token_id
    recipe = small_data_recipe(*two_sources, bos=False)
    plain, other = (build_token_splits(recipe, one) for one in (tokenizer, adding))
    assert plain["search"].hash == other["search"].hash


def adding_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


class SlowAddingBos(ByT5Tokenizer):
    """A slow tokenizer with a BOS, which it puts before a text as its settings do not say."""

    def __init__(self) -> None:
        super().__init__(bos_token="<pad>")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0, *token_ids_0, 1]


@pytest.mark.parametrize(
    ("make", "opens"),
    [(tiny_tokenizer, False), (adding_bos, True), (ByT5Tokenizer, False), (SlowAddingBos, True)],
)
def test_bos_is_what_the_tokenizer_does_unless_the_recipe_says_otherwise(
    make: Any, opens: bool, two_sources: tuple[SourceRecipe, SourceRecipe]
) -> None:
    tokenizer = make()
    assert DataRecipe(sources=two_sources).bos == "auto"
    for bos, expected in (("auto", opens), (False, False), (True, True)):
        if bos is True and tokenizer.bos_token_id is None:
            continue
        splits = build_token_splits(small_data_recipe(*two_sources, bos=bos), tokenizer)
        for split in splits.splits.values():
            assert split.bos is expected
            first = torch.cat([source.windows[:, 0] for source in split.sources.values()])
            assert (first == tokenizer.bos_token_id).all() if expected else (first > 1).any()


def test_a_text_that_ends_with_eos_is_closed_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [f"ant{number}</s>" for number in range(200)])
    for split in build_token_splits(small_data_recipe(source), tokenizer).splits.values():
        ids = split.sources["s"].windows.flatten()
        assert (ids == 1).any() and not ((ids[1:] == 1) & (ids[:-1] == 1)).any()


@pytest.mark.parametrize(("make", "bos"), [(tiny_tokenizer, True), (adding_bos, False)])
def test_a_tokenizer_is_told_to_open_with_bos_or_not(make: Any, bos: bool) -> None:
    tokenizer = make()
    other = opening_with_bos(tokenizer, bos)
    assert (puts_bos(tokenizer), puts_bos(other)) == (not bos, bos)
    assert opening_with_bos(tokenizer, not bos) is tokenizer
    plain, opened = sorted((tokenizer("a river")["input_ids"], other("a river")["input_ids"]), key=len)
    assert opened == [0, *plain]


def test_a_tokenizer_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.bos=false is not what this SlowAddingBos does"):
        opening_with_bos(SlowAddingBos(), False)


def test_tokenizers_without_the_special_tokens_are_refused(
    two_sources: tuple[SourceRecipe, SourceRecipe],
) -> None:
    without_bos, without_eos = tiny_tokenizer(), tiny_tokenizer()
    without_bos.bos_token = None
    without_eos.eos_token = None
    assert not build_token_splits(small_data_recipe(*two_sources), without_bos)["test"].bos
    with pytest.raises(DataError, match=r"set data\.bos to auto"):
        build_token_splits(small_data_recipe(*two_sources, bos=True), without_bos)
    with pytest.raises(DataError, match="set its eos_token"):
        build_token_splits(small_data_recipe(*two_sources), without_eos)


def test_a_token_without_a_place_in_the_text_has_no_bytes() -> None:
    class Placeless:
        is_fast = True

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [7, 8, 9], "offset_mapping": [(0, 2), (0, 0), (2, 3)]}

    assert encode_with_bytes("é€x", cast(PreTrainedTokenizerFast, Placeless()))[1].tolist() == [5, 0, 1]


def test_slow_tokenizers_count_bytes_by_decoding(tmp_path: Path) -> None:
    text = "Crêpes für 3 € 🚤, and more."
    ids, token_bytes = encode_with_bytes(text, ByT5Tokenizer())
    assert len(ids) == token_bytes.sum() == len(text.encode())
    source = write_jsonl(tmp_path / "s.jsonl", [f"{n} {text}" for n in range(40)])
    tokens = build_token_splits(small_data_recipe(source), ByT5Tokenizer())["test"].sources["s"]
    assert (tokens.bytes <= 15 + 3).all() and (tokens.bytes >= 15 - 4).all()


def test_copies_are_dropped_within_and_between_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"ant{number}" for number in range(100)]
    first = write_jsonl(tmp_path / "a.jsonl", [text for text in texts for _ in range(3)])
    second = write_jsonl(tmp_path / "b.jsonl", [f"  {text}\n" for text in texts] + [f"bee{n}" for n in range(100)])
    splits = build_token_splits(small_data_recipe(first, second), tokenizer)
    whole = [text for texts in texts_of(splits, tokenizer).values() for text in texts[:-1]]
    assert len(whole) == len(set(whole)) > 50


def test_text_that_is_too_short_says_by_how_much(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "short.jsonl", ["one two", "three four"])
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in ("one two", "three four"))
    with pytest.raises(DataError) as caught:
        build_token_splits(small_data_recipe(source), tokenizer)
    for part in (f"has {tokens} tokens in 2 ", "is 512 (", "calibration 256", "lower data.calibration_tokens"):
        assert part in str(caught.value)


def test_provenance_names_files_without_their_directory(
    two_sources: tuple[SourceRecipe, SourceRecipe], tokenizer: PreTrainedTokenizerFast
) -> None:
    provenance = build_token_splits(small_data_recipe(*two_sources), tokenizer).provenance
    assert provenance["sources"]["a"]["file"] == "a.jsonl" and len(provenance["sources"]["a"]["sha256"]) == 64
    assert str(Path(str(two_sources[0].path)).parent) not in json.dumps(provenance)
    assert provenance["documents"]["search"]["a"] >= 1


def test_no_more_documents_are_tokenised_than_are_needed(
    two_sources: tuple[SourceRecipe, SourceRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counting(text: str, tokenizer: PreTrainedTokenizerFast) -> Any:
        calls.append(text)
        return encode_with_bytes(text, tokenizer)

    monkeypatch.setattr("llmprune.data.tokens.encode_with_bytes", counting)
    splits = build_token_splits(small_data_recipe(*two_sources), tiny_tokenizer())
    used = sum(n for by_source in splits.provenance["documents"].values() for n in by_source.values())
    assert len(calls) == used < 120
