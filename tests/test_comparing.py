"""Children side by side: what they keep, and where they behave unlike their parent."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, Llmprune
from tiny import tiny_tokenizer
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import WHOLE_MODEL
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.stored import StoredFfn
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.core.errors import ModelError
from llmprune.data.tokens import SourceTokens, Split
from llmprune.evaluation import behaviour as module
from llmprune.evaluation.behaviour import SPAN, behaviour
from llmprune.evaluation.comparing import comparison_tables, differing_layers, kept_of, structure
from llmprune.evaluation.comparison_page import comparison_page
from llmprune.measure.quality.perplexity import score
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.report.rows import cells_of


def split_of(*lengths: int, seq_len: int = 24) -> Split:
    generator = torch.Generator().manual_seed(0)
    sources = {
        f"s{i}": SourceTokens(torch.randint(3, 90, (n, seq_len), generator=generator), torch.full((n,), seq_len))
        for i, n in enumerate(lengths)
    }
    return Split("test", sources, dict(zip(sources, (0.25, 0.75), strict=True)), seq_len, bos=False)


@pytest.fixture(scope="module")
def models(finished_run: Finished) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A parent and one of another seed."""
    config = AutoConfig.from_pretrained(finished_run.recipe.model.path)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(AutoModelForCausalLM.from_config(config).eval())
    return found[0], found[1]


def test_means_are_those_of_whole_logits(models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    parent, child = models
    split = split_of(3, 2)
    found = behaviour(parent, child, tiny_tokenizer(), split, most=4)
    assert found.tokens == 5 * (split.seq_len - 1)
    assert found.nats_lost == pytest.approx(
        score(child, split).nats_per_token - score(parent, split).nats_per_token, abs=1e-5
    )
    kl, same = 0.0, 0.0
    for name, source in split.sources.items():
        with torch.inference_mode():
            own, other = (model(source.windows).logits[:, :-1].float().log_softmax(-1) for model in models)
        kl += split.weights[name] * float(
            functional.kl_div(other, own, log_target=True, reduction="none").sum(-1).mean()
        )
        same += split.weights[name] * float((own.argmax(-1) == other.argmax(-1)).float().mean())
    assert (found.kl, found.same_top) == (pytest.approx(kl, rel=1e-4), pytest.approx(same))


def test_a_model_is_like_itself(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = behaviour(models[0], models[0], tiny_tokenizer(), split_of(2, 1), most=2)
    assert (found.kl, found.nats_lost, found.same_top) == (0.0, 0.0, 1.0)


def test_the_worst_come_first_and_apart(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    split, tokenizer = split_of(3, 2, seq_len=40), tiny_tokenizer()
    found = behaviour(*models, tokenizer, split, most=3)
    for places in (found.worst_tokens, found.worst_passages):
        assert len(places) == 3
        assert [p.kl for p in places] == sorted((p.kl for p in places), reverse=True)
    # The same by hand: every prediction's KL, largest first.
    worst = (0.0, "", "")
    for name, source in split.sources.items():
        with torch.inference_mode():
            own, other = (model(source.windows).logits[:, :-1].float().log_softmax(-1) for model in models)
        kl_WT = (own.exp() * (own - other)).sum(-1)
        row, at = divmod(int(kl_WT.argmax()), kl_WT.shape[1])
        worst = max(worst, (float(kl_WT[row, at]), name, tokenizer.decode([int(source.windows[row, at + 1])])))
    first = found.worst_tokens[0]
    assert (first.source, first.text) == worst[1:]
    assert first.kl == pytest.approx(worst[0], rel=1e-4)
    assert len(tokenizer(found.worst_passages[0].text)["input_ids"]) <= 2 * SPAN


def test_numbers_that_are_none_are_refused(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    broken = copy.deepcopy(models[1])
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match="gives NaN in s0"):
        behaviour(models[0], broken, tiny_tokenizer(), split_of(1, 1), most=1)


def test_structure_counts_what_is_left() -> None:
    architecture = Architecture.of([(2, 16), (0, 8), (1, 0), (0, 0)])
    assert structure(architecture) == {
        "layers": 3,
        "attention_blocks": 2,
        "kv_groups": 3,
        "ffn_blocks": 2,
        "ffn_width": 24,
    }
    rows = [{"architecture": a.to_json()} for a in (architecture, Architecture.of([(2, 16), (0, 4), (1, 0), (0, 0)]))]
    assert [layer["layer"] for layer in differing_layers(rows)] == [1]
    assert differing_layers([*rows, {"architecture": Architecture.of([(2, 16)]).to_json()}]) == []
    whole = Architecture.of([(2, 16)])
    stored = whole.with_choices([(0, StoredFfn(FfnChoice(16), "q4_0")), (WHOLE_MODEL, VocabularyChoice("q5_0"))])
    layer, vocabulary = differing_layers([{"architecture": one.to_json()} for one in (whole, stored)])
    assert kept_of(layer) == ["2, 16", "2, 16, q4_0"] and kept_of(vocabulary) == ["as the parent's", "q5_0"]


def test_the_command_sets_children_side_by_side(finished_run: Finished, llmprune: Llmprune, tmp_path: Path) -> None:
    child = finished_run.export
    exported = json.loads((child / "llmprune.json").read_text())["id"]
    other = next(path for path in sorted((finished_run.path / "children").iterdir()) if path.name != exported)
    told = llmprune(
        "compare", child, other, "--parent", finished_run.recipe.model.path, "--data", finished_run.path, "--json"
    ).json
    assert {row["model"] for row in told["models"]} == {str(child), str(other)}
    on = told["behaviour"]["measured_on"]
    assert (on["split"], on["seq_len"]) == ("test", finished_run.recipe.data.seq_len)
    figures = {row["model"]: row["figures"]["test"]["nats_lost"] for row in told["models"]}
    for name, behaved in told["behaviour"]["models"].items():
        assert behaved["nats_lost"] == pytest.approx(figures[name], abs=1e-5)
    places = ("--parent", finished_run.recipe.model.path, "--data", finished_run.path)
    shown = llmprune("compare", child, other, *places, "--html", tmp_path / "beside.html")
    assert shown.code == 0 and "Side by side" in shown.out and "passage" in shown.out
    assert list(comparison_tables(told))
    text = (tmp_path / "beside.html").read_text()
    for row in told["models"]:
        assert row["id"] in text and f"{row['figures']['test']['nats_lost']:+.3f}" in text
    assert "Behaviour beside" in text and "Layers that differ" in text


def test_a_page_without_behaviour_or_a_common_parent(finished_run: Finished) -> None:
    front = read_front(Run.join(finished_run.path).directory)
    whole = front.parent.architecture
    other = Architecture.of([(2, 16), (0, 4)])
    rows = [
        {
            "model": f"<{name}>",
            "id": front.parent.id,
            "architecture": architecture.to_json(),
            "parents_architecture": parents.to_json(),
            "structure": structure(architecture),
            "figures": front.parent.to_json(),
        }
        for name, architecture, parents in (("a", whole, whole), ("b", other, Architecture.of([(2, 16), (2, 16)])))
    ]
    text = comparison_page({"models": rows, "differing_layers": []})
    assert "&lt;a&gt;" in text and "Behaviour" not in text and "Layers that differ" not in text
    lone = comparison_page({"models": rows[1:], "differing_layers": []})
    assert "A child beside its parent" in lone
    cells = list(cells_of(other, Architecture.of([(2, 16), (2, 16)])))
    assert [row["kept"] for row in cells] == [1.0, 1.0, 0.0, 0.25]


def test_what_is_no_export_is_named(finished_run: Finished, llmprune: Llmprune, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(finished_run.recipe.model.path, plain)
    result = llmprune("compare", plain)
    assert result.code == 2 and "is no export of llmprune" in result.err
    damaged = Path(shutil.copytree(finished_run.export, tmp_path / "damaged"))
    metadata = json.loads((damaged / "llmprune.json").read_text())
    metadata["architecture"] = {"layers": 3}
    (damaged / "llmprune.json").write_text(json.dumps(metadata))
    result = llmprune("compare", damaged, "--parent", finished_run.recipe.model.path)
    assert result.code == 2 and "is damaged" in result.err
