"""Methods against each other: what each loses at the same measured speed-ups, and what choosing cost it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmprune.baselines.book import Book, Entry
from llmprune.baselines.given import Aim, Given, Nats
from llmprune.baselines.ledger import Ledger
from llmprune.baselines.match import Settled, close_in, settle
from llmprune.baselines.methods import METHODS, Method, choose
from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ModelError
from llmprune.core.progress import Show
from llmprune.core.recipe import BaselineName
from llmprune.measure.record import Front, Record
from llmprune.search.judging import Judge, quote


@dataclass(frozen=True, eq=False)
class Entrant:
    """One method, and what judges it: children are chosen on `chooser`'s tokens and measured on `judge`'s; what is
    quoted of those that are settled on is measured by `quoting`."""

    name: BaselineName
    given: Callable[[Nats], Given]
    chooser: Judge
    judge: Judge
    quoting: Sequence[Judge]
    preparation_tokens: int

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def ledger(self, book: Book, target: float, input_hash: str) -> Ledger:
        """Where the method's scores are counted: over all targets for a path, anew at each target otherwise."""
        name = self.name if self.method.path else f"{self.name} at {target:g}"
        memo = book.memo(name, input_hash)
        return Ledger(self.chooser.score, self.chooser.split, memo, book.save_scores)

    def measure(self, architecture: Architecture) -> Record:
        """The whole record of the method's child. Raises ModelError if it computes no finite loss."""
        record = self.judge.judge(architecture, self.name)
        if not record.is_finite:
            raise ModelError(f"the child {record.id} computes no finite loss")
        exportable = self.method.can_export(self.judge.parent, architecture)
        library = self.method.importance.method if self.method.importance else None
        return record.model_copy(update={"exportable": exportable, "library": library})


def compare(
    book: Book,
    entrant_of: Callable[[BaselineName], Entrant],
    input_hashes: Mapping[BaselineName, str],
    targets: Sequence[float],
    parent: Record,
    speed: str,
    show: Show,
) -> list[Entry]:
    """Every method's entry at every target; those that the book has for the same inputs are not measured again."""
    found: list[Entry] = []
    for name, key in input_hashes.items():
        missing = book.missing(name, targets, key)
        if missing:
            for entry in compete(entrant_of(name), missing, parent, speed, book, key, show):
                book.put(entry)
        found += [kept for at in targets if (kept := book.entry(name, at, key)) is not None]
    return found


def choose_beside(entrants: Iterable[Entrant], speedup: float, show: Show) -> dict[Entrant, Architecture]:
    """Each method's child at an estimated speed-up; a method that does not reach it is left out."""
    chosen: dict[Entrant, Architecture] = {}
    for entrant in entrants:
        ledger = Ledger(entrant.chooser.score, entrant.chooser.split)
        with show(f"choosing the baseline {entrant.name}") as ledger.advance:
            architecture = choose(entrant.method, entrant.given(ledger.nats), speedup)
        if architecture is not None:
            chosen[entrant] = architecture
    return chosen


def front_entries(front: Front, speed: str, targets: Iterable[float], effort: Mapping[str, Any]) -> list[Entry]:
    """The search itself at each target, between the measured children of its front: as they were before a repair, since
    other methods' children are compared one-shot."""
    records = [front.parent, *(front.before_repair(record) or record for record in front.children)]
    why = "out of reach: no child of the front is as fast"
    return [
        entry_of("llmprune", at, settle(records, front.parent.nats_per_token, speed, at), why, effort) for at in targets
    ]


def compete(
    entrant: Entrant, targets: Iterable[float], parent: Record, speed: str, book: Book, input_hash: str, show: Show
) -> Iterator[Entry]:
    """The entry of one method at each target, as it comes; children that `book` has are not measured again."""
    whole = parent.architecture
    # Children of one method are of one library, so that their architectures tell them apart.
    known = {record.architecture: record for record in book.children(entrant.name, input_hash)}
    known[whole] = parent
    walk: tuple[Ledger, Given, Aim] | None = None

    def measure(architecture: Architecture) -> float:
        if architecture not in known:
            known[architecture] = entrant.measure(architecture)
        return known[architecture].value(speed)

    for target in sorted(set(targets)):
        if walk is None or not entrant.method.path:
            ledger = entrant.ledger(book, target, input_hash)
            given = entrant.given(ledger.nats)
            walk = ledger, given, _timed(entrant.method.aim(given), ledger)
        ledger, given, aim = walk
        # Every target starts from the parent, so that its figures and its cost do not hang on the others.
        speeds, failed = {whole: 1.0}, None
        with show(f"{entrant.name} at {target:g}x") as ledger.advance:
            try:
                close_in(aim, given.speedup, measure, target, speeds)
            except ModelError as error:
                failed = str(error)
        settled = settle([known[a] for a in speeds], parent.nats_per_token, speed, target)
        if settled is not None:
            settled = replace(settled, children=tuple(quote(child, entrant.quoting) for child in settled.children))
            known |= {child.architecture: child for child in settled.children}
        why = failed or f"out of reach: the fastest child that was measured has {max(speeds.values()):.2f}x"
        entry = entry_of(entrant.name, target, settled, why, ledger.effort(entrant.preparation_tokens))
        measured = [known[a].to_json() for a in speeds if a != whole]
        yield {**entry, "measured": measured, "input_hash": input_hash}


def _timed(aim: Aim, ledger: Ledger) -> Aim:
    def timed_aim(speedup: float) -> Architecture | None:
        with ledger.timed():
            return aim(speedup)

    return timed_aim


def entry_of(name: str, target: float, settled: Settled | None, why: str, effort: Mapping[str, Any]) -> Entry:
    """A method's cells: nats lost at the target - by which its children were settled on, and on each split that is
    quoted -, the children that say so, or why there are none; and its effort."""
    return {
        "method": name,
        "at": target,
        "nats_lost": settled.nats_lost if settled else None,
        **(settled.quoted() if settled else {}),
        "interpolated": bool(settled and settled.is_interpolated),
        "why": None if settled else why,
        "children": [child.to_json() for child in settled.children] if settled else [],
        "effort": dict(effort),
    }
