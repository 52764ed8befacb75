"""Make the data of `recipes/tasks/continuation_choice.yaml` from a .jsonl of documents: `{"text": ...}` a line.

A question is a passage of a document; the answers are its next words, and words of three other documents. All four
have as many words, so that none stands out by its length. At most one passage a document, so that questions are nearly
independent, which the tests of significance count on. The same file and seed give the same questions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.core.files import atomic_path

CONTEXT_WORDS = 40
ANSWER_WORDS = 12
CHOICES = 4


def questions(documents: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """`context`, `choices` and the index of the right `answer`, one question a document that has a long paragraph."""
    generator = random.Random(seed)
    passages = [passage for document in dict.fromkeys(documents) if (passage := _passage(document, generator))]
    made: list[dict[str, Any]] = []
    if len(passages) < CHOICES:
        return made
    for number, (context, following) in enumerate(passages):
        others = generator.sample([k for k in range(len(passages)) if k != number], CHOICES - 1)
        choices = [passages[other][1] for other in others]
        answer = generator.randrange(CHOICES)
        choices.insert(answer, following)
        made.append({"context": context, "choices": choices, "answer": answer})
    generator.shuffle(made)
    return made


def _passage(document: str, generator: random.Random) -> tuple[str, str] | None:
    needed = CONTEXT_WORDS + ANSWER_WORDS
    paragraphs = [words for line in document.split("\n") if len(words := line.split()) >= needed]
    if not paragraphs:
        return None
    words = generator.choice(paragraphs)
    start = generator.randrange(len(words) - needed + 1)
    middle = start + CONTEXT_WORDS
    return " ".join(words[start:middle]), " ".join(words[middle : middle + ANSWER_WORDS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = arguments.text.read_text(encoding="utf-8").splitlines()
    made = questions([json.loads(line)["text"] for line in lines if line.strip()], arguments.seed)
    if len(made) < CHOICES:
        needed = CONTEXT_WORDS + ANSWER_WORDS
        sys.exit(f"{arguments.text} has fewer than {CHOICES} documents with a paragraph of {needed} words")
    with atomic_path(arguments.to) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} questions in {arguments.to}")


if __name__ == "__main__":
    main()
