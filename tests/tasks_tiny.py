"""Tasks that need no network: a task file and a data file each, of what the tiny models can be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}, train: {examples}}}}}\ntest_split: test\n"
TASKS = {
    # Twenty answers, of which a prompt of some is longer than the 128 positions of the models: cut from the left.
    "tiny_choice": """
output_type: multiple_choice
training_split: train
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
""",
    # Documents longer than a window: lm-eval rolls over them, the first token predicted from the prefix token.
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1}}
""",
    "tiny_generate": """
output_type: generate_until
training_split: train
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: first-word, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
metadata: {{version: 1}}
""",
}


def rows(count: int, offset: int = 0) -> list[dict[str, object]]:
    """Which word comes next, in the documents that the tiny models have learnt a little of."""
    made: list[dict[str, object]] = []
    for number in range(offset, offset + count):
        name = ("ant", "bee")[number % 2]
        words = f"{name}{number % 60}é"
        repeated = " ".join([words] * (40 if number % 7 == 3 else 1 + number % 5))
        choices = [f" {words}", f" bee{(number + 7) % 60}é ant", f" ant{(number + 3) % 60}"]
        answer = number % 3
        choices[0], choices[answer] = choices[answer], choices[0]
        made.append({"text": repeated, "choices": choices, "answer": answer})
    return made


def write_tasks(directory: Path) -> Path:
    """The directory, with every task in it: NAME.yaml and NAME.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    examples = directory / "examples.jsonl"
    _write(examples, rows(8, 40))
    for name, settings in TASKS.items():
        file = directory / f"{name}.jsonl"
        _write(file, rows(20))
        text = f"task: {name}\n{DATA}{settings.lstrip()}".format(file=file, examples=examples)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory


@contextmanager
def own_tasks_of(directory: str) -> Iterator[None]:
    """lm-eval comes with the tasks of this directory alone: to read all its 15,000 takes ten seconds each time."""
    from lm_eval import tasks
    from lm_eval.tasks._index import TaskIndex

    own, every = Path(tasks.__file__).parent, TaskIndex._iter_yaml_files

    def fewer(root: Path) -> Iterator[Path]:
        return every(root / directory if root == own else root)

    with patch.object(TaskIndex, "_iter_yaml_files", fewer):
        yield


def _write(file: Path, made: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
