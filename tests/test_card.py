"""The model card says what the checkpoint's files say; and what a push refuses before it asks anybody."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Finished
from gguf import GGUFWriter

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import PushError
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.models.licence import Licence, stated_licence
from llmprune.publish.card import architecture_map, model_card
from llmprune.publish.contents import EVALUATION_FILE, EVALUATIONS_DIRECTORY, VLLM_DIRECTORY, read_contents
from llmprune.publish.hub import card_of, check_repo, settled_licence

MIT = Licence("mit")


@pytest.fixture
def child(finished_run: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.export, tmp_path / "child"))


def metadata_of(directory: Path) -> Any:
    return json.loads((directory / METADATA_FILE).read_text())


def change(directory: Path, **changes: Any) -> None:
    (directory / METADATA_FILE).write_text(json.dumps({**metadata_of(directory), **changes}))


def header_of(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def evaluation(own_id: str) -> dict[str, Any]:
    def model(name: str, role: str, id_: str | None, acc: float, ppl: float) -> dict[str, Any]:
        metrics = {"acc": {"value": acc, "stderr": 0.0125}}
        task = {"metrics": metrics, "samples": 400, "limit": 400, "num_fewshot": 0, "version": 1.0}
        quality = {"ppl": ppl, "dataset": "stories", "split": "test", "seq_len": 16, "tokens": 64}
        return {"model": name, "role": role, "id": id_, "hash": "5" * 16, "quality": quality, "tasks": {"piqa": task}}

    compared = {"task": "piqa", "metric": "acc", "test": "McNemar", "samples": 400}
    return {
        "format": 1,
        "models": [
            model("parent", "parent", None, 0.6825, 3.25),
            model("one", "child", own_id, 0.6575, 3.5),
            model("other", "child", "0" * 16, 0.1111, 9.0),
        ],
        "comparisons": [
            {"model": "other", "difference": -0.5714, "low": -0.6, "high": -0.5, "p": 0.5, **compared},
            {"model": "one", "difference": -0.025, "low": -0.05, "high": 0.01, "p": 0.0625, **compared},
        ],
        "versions": {},
        "measured_on": {},
    }


def test_a_card_holds_the_figures_of_the_files(child: Path, finished_run: Finished) -> None:
    card = model_card(read_contents(child), "user/tiny", MIT)
    assert card == model_card(read_contents(child), "user/tiny", MIT), "a push of the same is no commit"
    known = metadata_of(child)
    own, parent = known["figures"], known["parent"]["figures"]
    lines = card.splitlines()
    assert f"| parameters | {parent['params']:,} | {own['params']:,} |" in lines
    assert f"| bytes of weights, float32 | {parent['bytes']:,} | {own['bytes']:,} |" in lines
    assert (
        f"| nats a token, test | {parent['test']['nats_per_token']:.4f} | {own['test']['nats_per_token']:.4f} |"
        in lines
    )
    assert f"| perplexity a token, test | {parent['test']['ppl']:.2f} | {own['test']['ppl']:.2f} |" in lines
    assert f"{own['nats_per_token']:.4f}" not in card, "what was chosen by is not quoted"
    assert f"it decodes {own['decode_speedup']['median']:.2f} times as fast" in card
    assert "Test: ant+bee, 60 tokens scored, in windows of 16 (no BOS)." in lines
    assert "Nothing was chosen on this text: the choice was made on ant+bee, validation split." in lines
    assert "Speed in torch, float32: batch 1, 8 prompt tokens, 4 generated, on cpu, threads: " in card
    assert "nusable" not in card.split("```yaml")[0]
    assert "trust_remote_code=True" in card and "llama.cpp" not in card and "vLLM" not in card
    recipe = card.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(recipe) == known["recipe"]
    for source in ("ant", "bee"):
        assert f"`{source}.jsonl`, SHA-256 `{known['provenance']['data']['sources'][source]['sha256']}`" in card
    assert known["provenance"]["parent"]["hash"] in card and known["hash"] in card and known["id"] in card
    for place in (finished_run.path.parent, Path.home(), Path.cwd()):
        assert str(place) + os.sep not in card
    header = header_of(card)
    assert header["license"] == "mit" and header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation" and {"pruned", "llmprune"} <= set(header["tags"])
    assert header.keys().isdisjoint({"base_model", "base_model_relation", "datasets"}), "nothing of it is on the Hub"
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"]["args"] == {"seq_len": 16, "tokens": 60, "bos": False}
    assert result["dataset"]["split"] == "test"
    assert result["metrics"][0] == {"type": "perplexity", "value": own["test"]["ppl"], "name": "perplexity"}


def test_a_card_quotes_unseen_text_and_says_what_is_unusable(child: Path) -> None:
    known = metadata_of(child)
    for record, nats in ((known["figures"], 4.5), (known["parent"]["figures"], 2.5)):
        record["unseen"] = {**record["test"], "nats_per_token": nats, "ppl": None, "dataset": "code", "seq_len": 1024}
    known["figures"] |= {"usable": False, "ppl_ratio": 142.3}
    change(child, **known)
    card = model_card(read_contents(child), "user/tiny", MIT)
    assert "| nats a token, unseen | 2.5000 | 4.5000 |" in card.splitlines()
    assert "| perplexity a token, unseen | inf | inf |" in card.splitlines()
    assert "Unseen: code, 60 tokens scored, in windows of 1024 (no BOS)." in card.splitlines()
    assert "**Unusable:** where it was chosen, its perplexity is 142.3 times its parent's, beyond the 10 times" in card
    assert len(header_of(card)["model-index"][0]["results"]) == 1, "an infinite figure is no result"


def test_a_card_says_where_a_parent_and_texts_of_the_hub_are(child: Path) -> None:
    known = metadata_of(child)
    known["provenance"]["parent"] |= {"model": "org/parent", "on_hub": True, "revision": "main"}
    known["recipe"]["data"]["sources"][0] |= {"dataset": "org/text", "path": None}
    known["provenance"]["data"]["sources"]["ant"] = {"dataset": "org/text", "split": "train", "revision": "c0ffee"}
    change(child, **known)
    card = model_card(read_contents(child), "user/tiny", Licence("other", "own", "https://example.org/own"))
    header = header_of(card)
    assert (header["base_model"], header["base_model_relation"]) == ("org/parent", "finetune")
    assert header["datasets"] == ["org/text"]
    assert [header[f"license{key}"] for key in ("", "_name", "_link")] == ["other", "own", "https://example.org/own"]
    assert "https://huggingface.co/org/parent" in card and "revision `c0ffee`" in card


def test_a_card_tells_how_to_load_what_lies_there(child: Path) -> None:
    (child / "small.q8_0.gguf").write_bytes(b"GGUF")
    (child / VLLM_DIRECTORY).mkdir()
    (child / VLLM_DIRECTORY / "config.json").write_text("{}")
    contents = read_contents(child)
    assert {"small.q8_0.gguf", "vllm/config.json"} <= {file.name for file in contents.files}
    card = model_card(contents, "user/tiny", MIT)
    assert "hf download user/tiny small.q8_0.gguf" in card and "vllm serve ./vllm" in card
    assert "gguf" in header_of(card)["tags"]
    (child / "modeling_pruned.py").unlink()
    files = metadata_of(child)["files"]
    del files["modeling_pruned.py"]
    change(child, files=files)
    assert 'from_pretrained("user/tiny", dtype="auto")' in model_card(read_contents(child), "user/tiny", MIT)


def test_a_card_shows_pictures_and_samples_that_are_there(child: Path) -> None:
    card = model_card(read_contents(child), "user/tiny", MIT)
    assert "![" not in card
    for sample in metadata_of(child)["samples"]:
        assert sample["prompt"] in card and sample["child"].strip() in card and sample["parent"].strip() in card
    change(child, samples=[])
    (child / "front.svg").write_text("<svg/>")
    card = model_card(read_contents(child), "user/tiny", MIT)
    assert "![The front that it was picked from](front.svg)" in card
    assert "architecture.svg" not in card and "Samples" not in card


def test_an_evaluation_is_in_the_card_and_its_metadata(child: Path) -> None:
    (child / EVALUATION_FILE).write_text(json.dumps(evaluation(metadata_of(child)["id"])))
    card = model_card(read_contents(child), "user/tiny", MIT)
    compared = "-0.0250 [-0.0500, +0.0100] (McNemar, p = 0.0625)"
    assert f"| piqa | acc | 0.6825 ± 0.0125 | 0.6575 ± 0.0125 | {compared} | 400 | 0 |" in card.splitlines()
    assert "| ppl | 3.2500 | 3.5000 |" in card.splitlines()
    assert "0.1111" not in card and "0.5714" not in card, "another child's"
    results = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in header_of(card)["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    own = metadata_of(child)["figures"]["test"]["ppl"]
    assert results == {("ant+bee", "perplexity"): own, ("stories", "perplexity"): 3.5, ("piqa", "acc"): 0.6575}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "is no evaluation: file: Invalid JSON"),
        ('{"format": 2, "models": []}', "is no evaluation: format: Input should be 1"),
        (json.dumps(evaluation("f" * 16)), f"evaluates None, {'f' * 16}, {'0' * 16}, not"),
    ],
)
def test_another_evaluation_is_refused(text: str, message: str, child: Path) -> None:
    (child / EVALUATION_FILE).write_text(text)
    with pytest.raises(PushError, match=message):
        model_card(read_contents(child), "user/tiny", MIT)


def test_a_map_draws_what_stays() -> None:
    shape = ParentShape(layers=4, hidden_size=8, kv_groups=3, queries_per_group=3, head_dim=4, ffn_width=100)
    architecture = Architecture.of([(3, 100), (1, 99), (0, 1), (0, 0)]).with_choice(1, AttentionChoice(1, 2))
    lines = architecture_map(architecture, shape).splitlines()[1:]
    assert lines[0].split() == ["0", "█" * 12, "3/3", "9/9", "█" * 12, "100/100"]
    assert lines[1].split() == ["1", "█" * 4 + "░" * 8, "1/3", "2/9", "█" * 11 + "░", "99/100"]
    assert lines[2].split() == ["2", "attention", "dropped", "█" + "░" * 11, "1/100"]
    assert lines[3].split() == ["3", "layer", "dropped"]


def _without_proof(directory: Path) -> None:
    change(directory, files=None, proof=None)


def _with_lost_figures(directory: Path) -> None:
    change(directory, parent={"shape": {}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / METADATA_FILE).unlink(), "holds no llmprune.json"),
        (lambda d: (d / METADATA_FILE).write_text("{"), "cannot be read"),
        (lambda d: (d / METADATA_FILE).write_text("[]"), "is not an object"),
        (_without_proof, "lacks proof, files: no proof that these files are the network"),
        (_with_lost_figures, "is not as llmprune export wrote it"),
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json is gone since"),
        (lambda d: (d / "config.json").write_text("{}"), r"config\.json has changed since"),
        (lambda d: (d / "pytorch_model.bin").write_text(""), "is of a kind that is not pushed"),
        (lambda d: (d / "optimizer.pt").write_text(""), "is of a kind that is not pushed"),
        (lambda d: (d / "extra.safetensors").write_text(""), "was not there when the checkpoint was proven"),
        (lambda d: (d / "tokenization.py").write_text(""), "was not there when the checkpoint was proven"),
        (lambda d: (d / "checkpoint-1").mkdir(), "is a directory that is no part of a checkpoint"),
        (lambda d: (d / "notes.txt").symlink_to("/etc/hostname"), "is a link or a device"),
        (lambda d: ((d / "vllm").mkdir(), (d / "vllm/x.pkl").write_text("")), "is of a kind that is not pushed"),
        (shutil.rmtree, "is not a directory; llmprune export writes one"),
    ],
)
def test_what_is_not_as_it_was_proven_stays(damage: Callable[[Path], Any], message: str, child: Path) -> None:
    assert read_contents(child).files
    damage(child)
    with pytest.raises(PushError, match=message):
        model_card(read_contents(child), "user/tiny", MIT)


def test_what_an_evaluation_keeps_for_itself_stays_behind(child: Path) -> None:
    before = read_contents(child).files
    (child / EVALUATIONS_DIRECTORY).mkdir()
    (child / EVALUATIONS_DIRECTORY / "task.json").write_text("{}")
    assert read_contents(child).files == before


def test_a_vllm_directory_with_a_proof_is_held_to_it(child: Path) -> None:
    shutil.copytree(child, child.parent / "copy")
    shutil.move(child.parent / "copy", child / VLLM_DIRECTORY)
    assert "vllm/model.safetensors" in {file.name for file in read_contents(child).files}
    (child / VLLM_DIRECTORY / "config.json").write_text("{}")
    with pytest.raises(PushError, match=r"vllm/config\.json has changed since"):
        read_contents(child)


def test_the_licence_that_is_acknowledged_is_the_one_that_is_stated(child: Path) -> None:
    assert settled_licence(read_contents(child), "MIT", None) == Licence("MIT")
    known = metadata_of(child)
    known["recipe"]["deploy"]["licence"] = "apache-2.0"
    change(child, **known)
    assert settled_licence(read_contents(child), None, None) == Licence("apache-2.0")
    stated = Licence("other", "Research", "https://example.org")
    known["provenance"]["parent"]["licence"] = stated.to_json()
    change(child, **known)
    with pytest.raises(PushError, match=r"states licence Research, but apache-2\.0 is acknowledged"):
        settled_licence(read_contents(child), None, None)
    assert settled_licence(read_contents(child), "research", None) == stated
    known["recipe"]["deploy"]["licence"] = None
    change(child, **known)
    with pytest.raises(PushError, match=r"nobody has acknowledged .*\(Research by its own card\)"):
        settled_licence(read_contents(child), None, None)


def test_a_card_that_lies_there_is_pushed_as_it_is(child: Path) -> None:
    (child / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\nMy words\r\n")
    assert card_of(read_contents(child), "user/tiny", MIT) == "---\r\nlicense: mit\r\n---\r\nMy words\r\n"
    with pytest.raises(PushError, match=r"names licence mit, but apache-2\.0 is acknowledged"):
        card_of(read_contents(child), "user/tiny", Licence("apache-2.0"))
    (child / "README.md").write_text("My words")
    with pytest.raises(PushError, match="names licence none"):
        card_of(read_contents(child), "user/tiny", MIT)
    (child / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(PushError, match="is no model card"):
        card_of(read_contents(child), "user/tiny", MIT)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "user/", "us er/tiny", "https://huggingface.co/user/tiny", ""])
def test_a_repository_has_a_user_and_a_name(repo: str) -> None:
    check_repo("user/tiny_1.5B")
    with pytest.raises(PushError, match="a repository is user/name"):
        check_repo(repo)


def test_a_local_parent_states_its_licence(tmp_path: Path) -> None:
    assert stated_licence(str(tmp_path)) is None and stated_licence("org/parent") is None
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: llama3.2\n---\n# Parent\n")
    assert stated_licence(str(tmp_path)) == Licence("llama3.2")
    for damaged in ("---\n: [\n---\n", "---\n- a\n---\n", "no metadata"):
        card.write_text(damaged)
        assert stated_licence(str(tmp_path)) is None
    file = tmp_path / "parent.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_license("other")
    writer.add_license_name("parent-research")
    writer.add_license_link("https://example.org")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert stated_licence(str(file)) == Licence("other", "parent-research", "https://example.org")
