"""The stage that makes the front: the best trials and the baselines measured again, on text they were not found on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from optuna.storages import BaseStorage

from llmprune.baselines.contest import Entrant, choose_beside
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import parse_budget, parse_pick
from llmprune.core.errors import ModelError, RunDirectoryError
from llmprune.core.progress import Steps
from llmprune.measure.quality.agreement import Draft, lookup_draft
from llmprune.measure.record import Front, Record
from llmprune.pipeline.comparison import Contest
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import Prepared
from llmprune.pipeline.recovery import refit_child
from llmprune.pipeline.repairs import finishing, refit_tokens
from llmprune.pipeline.resizing import read_resized
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of, read_front
from llmprune.pipeline.searching import study_facts, study_name, tell_of_other_hardware, trials_of
from llmprune.search.front import candidates_for_front, holding_budgets, non_dominated, with_verdicts
from llmprune.search.judging import Finish, Judge, quote
from llmprune.search.samplers.guide import HOLDS_WITHIN
from llmprune.search.trial_records import record_of
from llmprune.search.warm_starts import MARGIN, parents_in_types
from llmprune.search.workers.studies import studies_of_run


def make_front(run: Run, storage: BaseStorage, prepared: Prepared, judges: Judges) -> Front:
    """Re-measure the best trials and the baselines on validation tokens, choose among them, and measure what is quoted
    of the chosen on text that nothing was chosen on; writes and returns `front.json`.

    Raises RunDirectoryError if no trial has finished, BudgetError if none holds the recipe's budgets.
    """
    rules = run.recipe.front
    finished = trials_of(storage, study_name(run, prepared))
    found = [record_of(trial, run.place_of_run) for trial in finished]
    trials = [record for record in found if record.architecture != prepared.space.shape.architecture]
    tell_of_other_hardware(run, studies_of_run(storage, study_facts(run, prepared).run))
    if not trials:
        raise RunDirectoryError(f"{run.directory.path} has no finished trial; {_where_trials_are(run)}")
    chosen = _chosen(run, trials)
    ids = [sorted(record.id for record in records) for records in (trials, chosen)]
    split_hashes = [prepared.tokens["validation"].hash, *prepared.quoted_hashes]
    repairs = [run.recipe.recover.of_refit(), refit_tokens(run, judges).hash] if run.recipe.recover.refit else []
    key = hash_of(study_name(run, prepared), ids, split_hashes, rules.decisive(), *repairs)
    if not run.directory.is_done("front", key, run.directory.front):
        judges.libraries(rules.baselines)
        contest = Contest(run, prepared, judges, finished)
        entrants = [contest.entrant(name) for name in dict.fromkeys(rules.baselines)]
        beside = choose_beside(entrants, rules.baselines_at, run.show)
        for missing in (entrant.name for entrant in entrants if entrant not in beside):
            run.say(f"the baseline {missing} is left out: it has no child at {rules.baselines_at:g}x")
        measured = _measured(run, judges, chosen, beside)
        run.directory.write_front(with_verdicts(measured, rules.usable_ppl_ratio))
        run.directory.mark_done("front", key)
    measured = read_front(run.directory)
    # What counts as usable may change without anything being measured again.
    judged = with_verdicts(measured, rules.usable_ppl_ratio)
    if judged != measured:
        run.directory.write_front(judged)
    return judged


def _chosen(run: Run, trials: Sequence[Record]) -> list[Record]:
    """The trials that are worth another measurement."""
    recipe, speed = run.recipe, run.speed
    holding = holding_budgets(trials, [parse_budget(text) for text in recipe.search.budgets])
    # Every target was searched for, and held within what timing can tell; something has to stand beside the baselines;
    # and what only just holds in the search may miss when it is timed again, so stricter ones follow.
    pick, speeds = parse_pick(recipe.export.pick), dict.fromkeys((*recipe.search.targets, recipe.front.baselines_at))
    aims = [parse_pick(f"{speed}>={at * (1 - HOLDS_WITHIN):.17g}") for at in speeds]
    wanted = [pick, *aims, pick.stricter(MARGIN), *(aim.stricter(MARGIN) for aim in aims)]
    return candidates_for_front(holding, recipe.search.axes, recipe.front.size, wanted)


def _where_trials_are(run: Run) -> str:
    searched = run.directory.read_provenance().get("study", {}).get("storage", run.place)
    if searched == run.place:
        return "run llmprune search first"
    if searched == run.directory.journal.name:
        return "its search was made without --storage"
    return f"its search was made with --storage {searched}"


def _measured(run: Run, judges: Judges, chosen: Sequence[Record], beside: Mapping[Entrant, Architecture]) -> Front:
    judge, types = judges.judge("validation", run.recipe.front.repeats), parents_in_types(judges.stock.space)
    known: dict[Architecture, Record] = {}

    def measured(architecture: Architecture, name: str) -> Record:
        """One child has one measurement, whatever it is called."""
        if architecture not in known:
            known[architecture] = judge.judge(architecture, name)
        return known[architecture].model_copy(update={"name": name})

    with run.show("re-measuring on validation tokens") as advance:
        steps = Steps(len(chosen) + len(types) + len(beside), advance)
        parent = judge.parent_record()
        children = [measured(record.architecture, record.name) for record in steps.over(chosen)]
        stored = [measured(whole, name) for name, whole in steps.over(types)]
        baselines: list[tuple[Record, Entrant]] = []
        for rival, architecture in steps.over(list(beside.items())):
            same = rival.judge.library is judge.library and rival.judge.finish is None
            there = same and architecture in known and known[architecture].is_finite
            try:
                record = measured(architecture, rival.name) if there else rival.measure(architecture)
            except ModelError as error:
                # A child whose logits are NaN is no baseline.
                run.say(f"the baseline {rival.name} is left out: {error}")
            else:
                baselines.append((record, rival))
    # What another child beats before it is repaired is not worth the minutes that a repair takes.
    best = non_dominated((record for record in children if record.is_finite), run.recipe.search.axes)
    own = _Forms(run, judges, judge, judges.quoting())
    forms = {repaired.id: (record, repaired) for record in best for repaired in [own.repaired(record)]}
    chosen_children = non_dominated((repaired for _, repaired in forms.values()), run.recipe.search.axes)
    kept = [(*forms[record.id], own) for record in chosen_children]
    kept += [(record, record, own) for record in stored]
    for record, rival in baselines:
        theirs = _Forms(run, judges, rival.judge, rival.quoting)
        helped = run.recipe.recover.baselines and rival.judge.finish is None
        kept.append((record, theirs.repaired(record) if helped else record, theirs))
    before = [(record, forms) for record, repaired, forms in kept if repaired is not record]
    with run.show("measuring what is quoted, on text that nothing was chosen on") as advance:
        steps = Steps(len(kept) + 1 + len(before), advance)
        quoted = [forms.quoted(repaired) for _, repaired, forms in steps.over(kept)]
        (quoted_parent,) = (quote(one, judges.quoting()) for one in steps.over([parent]))
        return Front(
            parent=quoted_parent,
            children=tuple(quoted[: len(chosen_children)]),
            baselines=tuple(quoted[len(chosen_children) :]),
            one_shot=tuple(forms.quoted(record) for record, forms in steps.over(before)),
            lookup=_lookup(judges),
            resized=read_resized(run.directory),
        )


def _lookup(judges: Judges) -> Draft | None:
    """What drafts stand beside that needs no model."""
    if judges.verify is None:
        return None
    return lookup_draft(judges.stock.tokens["validation"], judges.verify.medians)


@dataclass
class _Forms:
    """What children of one library are before and after they were repaired."""

    run: Run
    judges: Judges
    judge: Judge
    quoting: Sequence[Judge]
    _repairs: dict[str, Finish] = field(default_factory=dict)

    def repaired(self, record: Record) -> Record:
        """The record of the repaired child; the same one if nothing is done to it, or nothing helps."""
        if not self.run.recipe.recover.refit:
            return record
        repair = refit_child(self.run, self.judges, record.architecture, self.judge.library)
        if repair is None:
            return record
        finish = finishing([repair])
        found = replace(self.judge, finish=finish).again(record)
        self._repairs[found.id] = finish
        return found

    def quoted(self, record: Record) -> Record:
        """The record with what is quoted of it, as it was judged."""
        finish = self._repairs.get(record.id)
        return quote(record, [replace(one, finish=finish) if finish else one for one in self.quoting])
