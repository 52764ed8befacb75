"""The stages that repair children: what was done to a child is found once, and kept in the run directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace

from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Pick, holding, parse_pick, pick_record
from llmprune.core.recipe import BaselineName
from llmprune.core.recipe_recover import RecoverRecipe
from llmprune.data.tokens import Split
from llmprune.measure.record import QUOTED, Front, Record, child_id
from llmprune.models.surgery import prune
from llmprune.models.waiting import at_home, with_children
from llmprune.pipeline.distilling import Lesson, check_recovery, distil_child, distilled
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.repairs import SCHEMA, finishing, judging_text, refit_tokens, repairs_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.recover.repair import REFIT, Repair
from llmprune.recover.sequential import nats_on_the_way, on_the_way, refit_sequentially
from llmprune.recover.team import ALONE, Team
from llmprune.search.front import with_verdicts
from llmprune.search.judging import quote

TRIED = 0.3
"""Share of a distillation's length that goes into trying several children first."""


def refit_child(run: Run, judges: Judges, architecture: Architecture, library: BlockLibrary) -> Repair | None:
    """The sequential refit of a child; None if it does not help on held-out tokens, which is said.

    It is kept in the run directory, and found there for the same child and tokens.
    """
    stock, split = judges.stock, refit_tokens(run, judges)
    of = child_id(architecture.hash, library.hash)
    key = hash_of(of, stock.parent_hash, split.hash, SCHEMA)
    path = run.directory.repair_of(of, REFIT)
    found = Repair.read(path, key)
    if found is None:
        found = _refitted(run, judges, architecture, library, split)
        found.write(path, key)
    if not found.facts["helps"]:
        run.say(
            f"the refit of {of} is left out: on held-out text nothing that was solved is better than the "
            f"{found.facts['nats_before']:.3f} nats a token that the child has"
        )
        return None
    return found


def _refitted(run: Run, judges: Judges, architecture: Architecture, library: BlockLibrary, split: Split) -> Repair:
    return with_children(judges.stock.parent.model, lambda: _refitted_beside(run, judges, architecture, library, split))


def _refitted_beside(
    run: Run, judges: Judges, architecture: Architecture, library: BlockLibrary, split: Split
) -> Repair:
    parent = judges.stock.parent
    child, judged_by = prune(parent, architecture, library), judging_text(run, judges)
    with run.show("solving output projections on the child's own inputs") as advance:
        solved = refit_sequentially(
            parent,
            child,
            architecture,
            split,
            memory_bytes=run.recipe.recover.memory_bytes,
            scratch=run.directory.path,
            progress=advance,
        )
    with run.show("how far to go to what was solved") as advance:
        nats = nats_on_the_way(child, solved.tensors, judged_by, advance)
    share = min(nats, key=nats.__getitem__)
    blocks = [{**asdict(block), "kinds": list(block.kinds)} for block in solved.blocks]
    facts = {"tokens": split.tokens, "share": share, "nats_before": nats[0.0], "nats_after": nats[share]}
    tensors = on_the_way(child, solved.tensors, share)
    return Repair.of(REFIT, tensors, {**facts, "helps": share > 0, "blocks": blocks})


def recover_pick(
    run: Run, judges: Judges, front: Front, pick: Pick, team: Team = ALONE, *, baselines: bool = False
) -> Front:
    """Distil the picked child from its parent, and put what becomes of it in its place on the front, if it is better on
    the validation split; its one-shot form stays. With `recover.candidates` above one, children that hold the pick are
    tried first, and the best goes on. With `baselines`, those beside it are then trained on as many tokens.

    A training that was stopped goes on where it was. Every process of `team` calls this alike; the first one writes the
    front. Raises as `check_recovery` does, and BudgetError if no child holds the pick.
    """
    check_recovery(run.recipe, team)
    rules = run.recipe.recover
    tried = _to_try(front, pick, rules.candidates)
    if len(tried) > 1:
        front, rules = _tried(run, judges, front, pick, tried, team), rules.part(1 - TRIED)
    front, tokens = _recovered(run, judges, front, pick_record(front.children, pick), rules, team)
    as_long = rules.model_copy(update={"tokens": tokens, "minutes": None})
    for rival in front.baselines if baselines else ():
        if (method := _method(rival)) and METHODS[method].finish is None:
            front, _ = _recovered(run, judges, front, rival, as_long, team)
    team.wait()
    if team.leads:
        shutil.rmtree(run.directory.teacher, ignore_errors=True)
    return front


def as_called_now(front: Front, pick: Pick) -> Pick:
    """The pick, by its new id where it names a child by the id that it had before it was repaired."""
    before = next((one for one in front.one_shot if one.id == pick.child), None)
    if before is None:
        return pick
    return next((parse_pick(one.id) for one in front.children if front.before_repair(one) == before), pick)


def _to_try(front: Front, pick: Pick, count: int) -> list[Record]:
    """The children that are tried: the best by what they were when cut, so that what was tried already is no other."""
    if pick.child is not None:
        return [pick_record(front.children, pick)]
    cut = {one.hash: front.before_repair(one) or one for one in front.children}
    best = [one.hash for one in holding(cut.values(), pick)[:count]]
    return sorted((one for one in front.children if one.hash in best), key=lambda one: best.index(one.hash))


def _tried(run: Run, judges: Judges, front: Front, pick: Pick, tried: Sequence[Record], team: Team) -> Front:
    """The front after each of some children was distilled for its part of the time: rankings change by it."""
    rules, library = run.recipe.recover, judges.stock.library
    chosen = pick_record(front.children, pick)
    if team.agreed(lambda: distilled(run, judges, chosen, library, rules.part(1 - TRIED))) is not None:
        return front
    for record in tried:
        front, _ = _recovered(run, judges, front, record, rules.part(TRIED / len(tried)), team)
    hashes = {one.hash for one in tried}
    quality = run.recipe.search.axes.quality
    found = [f"{one.id} {one.value(quality):.3f}" for one in front.children if one.hash in hashes]
    run.say(f"tried {', '.join(found)} {quality.replace('_', ' ')}; {pick_record(front.children, pick).id} goes on")
    return front


def _recovered(
    run: Run, judges: Judges, front: Front, record: Record, rules: RecoverRecipe, team: Team
) -> tuple[Front, int]:
    """The front with a record's child distilled, and the tokens that took."""
    method = _method(record)
    library = judges.libraries([method])[method] if method else judges.stock.library
    if (done := team.agreed(lambda: distilled(run, judges, record, library, rules))) is not None:
        return front, done
    # Teacher and student step together.
    with at_home(judges.stock.parent.model):
        repair = distil_child(Lesson(run, judges, record, library, rules, team))
    found = team.agreed(lambda: _in_its_place(run, judges, front, record, library, repair))
    return found, repair.facts["settings"]["tokens"]


def _in_its_place(
    run: Run, judges: Judges, front: Front, record: Record, library: BlockLibrary, repair: Repair
) -> Front:
    """The front, written, with what a repair makes of a record in the record's place; the same one if that is worse."""
    method, finish = _method(record), finishing([*repairs_of(run, record, library), repair])
    # `again` notes what was done last; the record has the rest.
    judge = judges.judge("validation", run.recipe.front.repeats, method)
    recovered = replace(judge, finish=finish._replace(name=repair.name)).again(record)
    quality = run.recipe.search.axes.quality
    if recovered.value(quality) >= record.value(quality):
        run.say(f"what distillation made of {record.id} is not better on the validation split, and is left out")
        return front
    quoting = [replace(one, finish=finish) for one in judges.quoting(method)]
    recovered = quote(recovered.model_copy(update=dict.fromkeys(QUOTED)), quoting)
    before = front.before_repair(record) or record

    def placed(records: Sequence[Record]) -> tuple[Record, ...]:
        # A baseline may be a child of the front too: this is about one of them.
        return tuple(recovered if (one.id, one.name) == (record.id, record.name) else one for one in records)

    changes = {
        "children": placed(front.children),
        "baselines": placed(front.baselines),
        "one_shot": (*(one for one in front.one_shot if one.id != before.id), before),
    }
    found = with_verdicts(front.model_copy(update=changes), run.recipe.front.usable_ppl_ratio)
    run.directory.write_front(found)
    return found


def _method(record: Record) -> BaselineName | None:
    """Which baseline made it; None if the search did."""
    return next((name for name in METHODS if name == record.name), None)
