"""Global distillation: a child learns to predict what its parent predicts, `KL(parent || child)` on the logits.

No label is needed, nor another loss (Minitron, arXiv 2407.14679, found the KL of the logits alone to be best). AdamW,
warm-up and cosine over a number of tokens that is settled before the training begins, so that one that was killed goes
on exactly where it was. On held-out text the child is judged again and again; the best state is what stays.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.core.errors import ModelError, RunDirectoryError
from llmprune.core.files import atomic_path
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import score
from llmprune.recover.sharding import clip_gradients, in_groups, part_like, whole
from llmprune.recover.student import Precision, Student, in_precision
from llmprune.recover.teacher import LiveTeacher, Teacher
from llmprune.recover.team import ALONE, Team

BETAS = (0.9, 0.95)
CLIP = 1.0
WORTH_IT = 1.3
"""Half precision has to be so many times as fast to be worth its rounding."""
PATIENCE = 3
"""Checks in a row that are worse than the best before a training is ended."""

Report = Callable[[int, int, str], None]
"""Called with tokens done, tokens in all, and what there is to say."""


@dataclass(frozen=True)
class Settings:
    """How a child is trained."""

    tokens: int
    """In all; the last step is the first that reaches them."""
    precision: Precision
    """Of matrix products: weights and their updates are float32 whatever this is."""
    learning_rate: float = 1e-4
    windows_a_step: int = 2
    final_share: float = 0.1
    """Of the learning rate, at the end."""
    warm_up: float = 0.05
    """Share of the tokens over which the learning rate rises."""
    checks: int = 10
    seed: int = 0

    def rate(self, tokens_done: int) -> float:
        """The learning rate of the next step."""
        done = min(1.0, tokens_done / self.tokens)
        rising = min(1.0, (done + 1e-3) / self.warm_up)
        falling = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * rising * falling


@dataclass
class Course:
    """How a training has gone so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """KL a token, step by step."""
    checks: list[tuple[int, float]] = field(default_factory=list)
    """Tokens learnt from, and nats a token on held-out text then."""
    ended: str = ""
    """Why, if before its time."""

    @property
    def best(self) -> tuple[int, float]:
        """Tokens and nats of the best check."""
        return min(self.checks, key=lambda check: check[1])

    @property
    def is_worsening(self) -> bool:
        """Whether the last checks were all worse than the best before them."""
        return len(self.checks) > PATIENCE and self.best not in self.checks[-PATIENCE:]


def distil(
    teacher: Teacher,
    child: PreTrainedModel,
    windows_WT: Tensor,
    judged_by: Split,
    settings: Settings,
    state: Path,
    key: str,
    report: Report = lambda done, total, told: None,
    team: Team = ALONE,
) -> Course:
    """Train those of the child's tensors that require a gradient, which must be its own, on the windows; it ends as the
    best state that a check has seen.

    `state` is where the training is kept, under `key`, a hash of what it depends on: one that is there goes on, and a
    killed one gives the same losses as one that was not. It ends early when it gets worse, or computes no numbers.
    Memory beside both models: a gradient and two moments a weight that is trained, in half precision a copy of the
    child, and the logits of CHUNK positions.
    Every process of `team` calls this alike, and holds the same child after it.
    """
    trained = {name: weight for name, weight in child.named_parameters() if weight.requires_grad}
    names, weights = list(trained), list(trained.values())
    student = Student(child, settings.precision)
    optimiser = torch.optim.AdamW(in_groups(weights), lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
    course = _resumed(state, key, names, weights, optimiser)
    student.follow()
    team.wait()
    if course is None:
        course = Course(checks=[(0, team.together(lambda: score(student.runs, judged_by).nats_per_token))])
        _keep(state, key, names, weights, optimiser, course, best=True, team=team)
    order_W = torch.randperm(len(windows_WT), generator=torch.Generator().manual_seed(settings.seed))
    began, positions = time.monotonic() - course.seconds, windows_WT.shape[1] - 1
    while course.tokens < settings.tokens and not course.ended:
        rows = (course.steps * settings.windows_a_step + torch.arange(settings.windows_a_step)) % len(order_W)
        chosen = order_W[rows]
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(course.tokens)
        loss = team.total(
            sum(
                student.learn(teacher, row, windows_WT[row, None], positions * len(chosen))
                for row in team.share(chosen.tolist())
            )
        )
        team.add_up(weights)
        norm = clip_gradients(weights, CLIP, team)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            course.ended = f"the loss is {loss}, and the gradient's norm {norm}, at {course.tokens:,} tokens"
            break
        optimiser.step()
        optimiser.zero_grad()
        student.follow()
        before, course.tokens = course.tokens, course.tokens + len(chosen) * windows_WT.shape[1]
        course.steps, course.seconds = course.steps + 1, time.monotonic() - began
        course.losses.append(loss)
        report(course.tokens, settings.tokens, f"KL {loss:.3f}")
        every = settings.tokens / settings.checks
        if before // every < course.tokens // every or course.tokens >= settings.tokens:
            _check(student.runs, judged_by, course, team)
            course.seconds = time.monotonic() - began
            report(course.tokens, settings.tokens, f"held out {course.checks[-1][1]:.4f}")
            _keep(state, key, names, weights, optimiser, course, best=course.best == course.checks[-1], team=team)
    team.wait()
    _as_best(trained, state)
    child.requires_grad_(False)
    return course


def _check(model: PreTrainedModel, judged_by: Split, course: Course, team: Team) -> None:
    def found() -> tuple[float, str]:
        try:
            return score(model, judged_by).nats_per_token, ""
        except ModelError as error:
            return math.inf, str(error)

    nats, course.ended = team.together(found)
    course.checks.append((course.tokens, nats))
    if not course.ended and course.is_worsening:
        course.ended = f"held-out text gets worse since {course.best[0]:,} tokens"


def seconds_of_window(teacher: Teacher, child: PreTrainedModel, window_T: Tensor, precision: Precision) -> float:
    """Of learning from the first window."""
    seconds, student = 0.0, Student(child, precision)
    for _ in range(2):  # The first one warms up.
        began = time.monotonic()
        student.learn(teacher, 0, window_T[None], window_T.numel())
        if child.device.type != "cpu":
            torch.accelerator.synchronize(child.device)
        seconds = time.monotonic() - began
    child.zero_grad()
    return seconds


def precision_for(parent: PreTrainedModel, child: PreTrainedModel, window_T: Tensor) -> Precision:
    """What matrix products are best taken in here."""

    def seconds(precision: Precision) -> float:
        return seconds_of_window(LiveTeacher(in_precision(parent, precision)), child, window_T, precision)

    return "bfloat16" if WORTH_IT * seconds("bfloat16") <= seconds("float32") else "float32"


# A state is one file: weights, moments and course. The best weights are another one beside it.


def _keep(
    state: Path,
    key: str,
    names: Sequence[str],
    weights: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    course: Course,
    *,
    best: bool,
    team: Team,
) -> None:
    own = {name: whole(weight) for name, weight in zip(names, weights, strict=True)}
    moments: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            if weight in optimiser.state:
                moments[f"{moment}/{name}"] = whole(optimiser.state[weight][moment])
    if not team.leads:
        return
    if best:
        with atomic_path(_best(state)) as temporary:
            save_file(own, temporary)
    with atomic_path(state) as temporary:
        tensors = {f"weight/{name}": value for name, value in own.items()}
        save_file(tensors | moments, temporary, {"key": key, "course": json.dumps(asdict(course))})


def _resumed(
    state: Path, key: str, names: Sequence[str], weights: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> Course | None:
    """Put a training that was kept under this key back where it was; None if there is none."""
    if not state.is_file() or not _best(state).is_file():
        return None
    try:
        with safe_open(state, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                return None
            course = Course(**json.loads(metadata["course"]))
            held = set(file.keys())
            for name, weight in zip(names, weights, strict=True):
                weight.data.copy_(part_like(file.get_tensor(f"weight/{name}"), weight))
                if f"exp_avg/{name}" in held:
                    optimiser.state[weight] = {
                        "step": torch.tensor(float(course.steps)),
                        **{m: part_like(file.get_tensor(f"{m}/{name}"), weight) for m in ("exp_avg", "exp_avg_sq")},
                    }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{state} is damaged ({type(error).__name__}); delete it, and train anew") from error
    course.checks = [(int(tokens), float(nats)) for tokens, nats in course.checks]
    return course


def _as_best(trained: Mapping[str, Tensor], state: Path) -> None:
    with safe_open(_best(state), "pt") as file, torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(part_like(file.get_tensor(name), weight))


def _best(state: Path) -> Path:
    return state.with_name(f"{state.stem}-best{state.suffix}")
