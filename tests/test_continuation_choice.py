"""The offline task: its right answers are right, its wrong ones are not, and nothing but the text gives them away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from make_continuation_choice import ANSWER_WORDS, CHOICES, main, questions

from llmprune.core.recipe_files import recipe_directory
from llmprune.evaluation.tasks import open_tasks

DOCUMENTS = ["A title\n" + " ".join(f"d{number}w{word}" for word in range(90)) for number in range(200)]


def test_the_answer_goes_on_where_the_context_stops() -> None:
    made = questions([*DOCUMENTS, DOCUMENTS[0], "too short"])
    assert len(made) == len(DOCUMENTS), "one a document, copies and short ones left out"
    for row in made:
        document, _, last = row["context"].split()[-1][1:].partition("w")
        starts = [choice.split()[0] for choice in row["choices"]]
        right = f"d{document}w{int(last) + 1}"
        assert starts[row["answer"]] == right and len(starts) == CHOICES
        assert sum(start.startswith(f"d{document}w") for start in starts) == 1, "the others are of other documents"
        assert {len(choice.split()) for choice in row["choices"]} == {ANSWER_WORDS}
    places = Counter(row["answer"] for row in made)
    assert len(places) == CHOICES and max(places.values()) < 80, "the place of the answer tells nothing"
    assert questions(DOCUMENTS) == questions(DOCUMENTS) != questions(DOCUMENTS, seed=1)


def test_the_task_file_reads_what_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = yaml.safe_load((recipe_directory() / "tasks" / "continuation_choice.yaml").read_text())
    to = tmp_path / task["dataset_kwargs"]["data_files"]["test"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sys.argv", ["make", str(text), str(to)])
    main()
    assert "200 questions" in capsys.readouterr().out
    opened = open_tasks(["continuation_choice"], limit=9, include_path=recipe_directory() / "tasks")
    assert opened.aggregations["continuation_choice"] == {"acc": "mean", "acc_norm": "mean"}
    text.write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(SystemExit, match="fewer than 4 documents"):
        main()
