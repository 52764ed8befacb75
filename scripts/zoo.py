"""A small trained model of every supported family, for benches: minutes of one core each, on real text.

    python scripts/zoo.py --all | --family NAME... [--to assets/zoo] [--steps N] [--minutes M] [--json]

Each model stands in TO/FAMILY as a checkpoint with a byte tokenizer, and zoo.json beside it says how it was trained and
how good it is: nats a byte below a byte bigram of the same held-out text, and what leaving each block out costs, in
standard errors. One that is there, trained the same way, is not trained again. The text is what
scripts/fetch_demo_assets.py fetches; the held-out fifth of it stands in TO/text/held_out. Exits with 1 if a model is
not good enough, and with 2 if the text is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from zoo_checks import LEAST_NATS_BELOW_BIGRAM, LEAST_STANDARD_ERRORS, report
from zoo_models import SOURCES, VALUES, byte_tokenizer, held_out_data, split_text, training_text
from zoo_training import EMBEDDINGS, Schedule, encoded, train

from llmprune.cli.terminal import console, print_json, shown
from llmprune.core.files import read_json, write_json
from llmprune.core.progress import Show
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.tokens import build_token_splits
from llmprune.models.parent import load_parent

FACTS = "zoo.json"
TEST_TOKENS = 131_072


def settings_hash(family: str, schedule: Schedule, text_hash: str) -> str:
    """Names a training: the same config, schedule, text and libraries give the same model."""
    facts = [
        VALUES[family],
        asdict(schedule),
        asdict(EMBEDDINGS),
        text_hash,
        torch.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def grow(family: str, to: Path, schedule: Schedule, text_hash: str, show: Show) -> dict[str, Any]:
    """The facts of the family's model in `to/FAMILY`, which is trained, and looked at, unless that is done."""
    directory, key = to / family, settings_hash(family, schedule, text_hash)
    facts = read_json(directory / FACTS) if (directory / FACTS).is_file() else {}
    if facts.get("settings") != key:
        facts = plant(family, directory, schedule, to / "text", show)
        write_json(directory / FACTS, facts := {"family": family, "settings": key, **facts})
    if "good" not in facts:
        parent = load_parent(ModelRecipe(path=str(directory), device="cpu"))
        tokenizer = byte_tokenizer()
        # The other splits are not read.
        unread = {"calibration_tokens": 256, "search_tokens": 64, "validation_tokens": 64}
        data = held_out_data(to / "text", **unread, test_tokens=TEST_TOKENS)
        split, train_T = build_token_splits(data, tokenizer)["test"], encoded(training_text(to / "text"), tokenizer)
        with show(f"leaving out each block of {family}") as advance:
            facts |= report(parent, train_T, split, advance)
        write_json(directory / FACTS, facts)
    return dict(facts)


def plant(family: str, directory: Path, schedule: Schedule, text: Path, show: Show) -> dict[str, Any]:
    """Train a model and write its checkpoint, whole or not at all; how long it took."""
    tokenizer = byte_tokenizer()
    train_T = encoded(training_text(text), tokenizer)
    began, cpu_began = time.monotonic(), time.process_time()
    with show(f"training {family}") as advance:
        model = train(family, train_T, schedule, advance)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    staging = directory.with_name(f".{family}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)
    return {"schedule": asdict(schedule), "seconds": seconds, "cpu_seconds": cpu_seconds}


def table(zoo: list[dict[str, Any]]) -> Table:
    """A row a model."""
    drawn = Table(
        title="Zoo",
        caption=f"Good: >= {LEAST_NATS_BELOW_BIGRAM} nats a byte below the bigram, and a median drop of >= "
        f"{LEAST_STANDARD_ERRORS:g} standard errors of the paired difference over windows.",
        caption_justify="left",
    )
    drawn.add_column("family", no_wrap=True)
    for column in ("params", "nats a byte", "byte bigram", "below", "median drop,\nnats a token"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for column in ("in standard\nerrors", "blocks", "tokens", "CPU s", "good"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for row in zoo:
        drawn.add_row(
            row["family"],
            f"{row['params'] / 1e6:.2f}M",
            f"{row['nats_per_byte']:.3f}",
            f"{row['bigram_nats_per_byte']:.3f}",
            f"{row['nats_below_bigram']:.3f}",
            f"{row['median_drop_nats']:.4f}",
            f"{row['median_drop_standard_errors']:.1f}",
            f"{len(row['drops'])}",
            f"{row['tokens']:,}",
            f"{row['cpu_seconds']:.0f}",
            "yes" if row["good"] else "no",
        )
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--family", action="append", choices=list(VALUES))
    which.add_argument("--all", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("assets/zoo"))
    parser.add_argument(
        "--text", type=Path, default=Path("assets/demo"), help="where fetch_demo_assets.py put the text"
    )
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument(
        "--minutes", type=float, help="at most so long a model; what comes out then depends on the clock"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if missing := [name for name in SOURCES if not (arguments.text / f"{name}.jsonl").is_file()]:
        print(
            f"error: {arguments.text} must hold {', '.join(f'{name}.jsonl' for name in missing)}; "
            f"run scripts/fetch_demo_assets.py --to {arguments.text}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    schedule = Schedule(steps=arguments.steps, minutes=arguments.minutes)
    text_hash = split_text(arguments.text, arguments.to / "text")
    families = arguments.family or list(VALUES)
    zoo = [grow(family, arguments.to, schedule.of(family), text_hash, shown(quiet=False)) for family in families]
    if arguments.json:
        print_json({"zoo": zoo})
    else:
        console().print(table(zoo))
    return 0 if all(row["good"] for row in zoo) else 1


if __name__ == "__main__":
    sys.exit(main())
