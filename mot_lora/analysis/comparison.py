"""The results of a comparison: each arm's run with each seed, and their summary over the seeds."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from pydantic import Field

from mot_lora.analysis.statistics import Estimate, Paired, estimate, holm, over_questions, paired
from mot_lora.analysis.wording import Metric, parts, place
from mot_lora.errors import UserError
from mot_lora.records import Record

Budget = Literal["steps", "total"]  # the same steps per branch, or the same branch-steps in all
Reference = Literal["std", "mtd"]  # what arms are compared with: the best single teacher, the union


class ArmRun(Record):
    """One arm with one seed: scores before and after every round, and its cost.

    `arm` is base, std:TEACHER, mtd, one_shot, a merge method, vote, ...; `budgets` are those it belongs to. What was
    not measured is empty. `scores` are the last student's, by question; `tokens` are trained tokens.
    """

    arm: str
    budgets: tuple[Budget, ...]
    seed: int
    accuracy: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()
    forgetting: dict[str, tuple[float, ...]] = Field(default_factory=dict[str, tuple[float, ...]])
    scores: tuple[float, ...] = ()
    branch_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Difference(Record):
    """An arm minus the arm `to`: over the seeds that both have, and over questions (scores averaged over those seeds).

    `holm` is the t-test's p, adjusted over the arms of a budget that are compared with the same arm.
    """

    to: str
    seeds: Paired
    questions: Estimate | None = None
    holm: float | None = None


class ArmSummary(Record):
    """One arm over its seeds: `last` are the last students' scores, seed by seed, and `score` their estimate.

    Scores are accuracy in [0, 1], or nats per token where the comparison's metric is the loss. `by_round` begins before
    training, and is empty for an arm without rounds, such as a vote; `lowest` is the worst score of the rounds after
    that; `gain` and `forgetting` are last minus before. branch_steps, tokens and seconds are means over all its runs.
    """

    arm: str
    seeds: tuple[int, ...] = ()
    last: tuple[float, ...] = ()
    score: Estimate | None = None
    by_round: tuple[Estimate, ...] = ()
    lowest: Estimate | None = None
    loss: Estimate | None = None
    gain: Estimate | None = None
    forgetting: dict[str, Estimate] = Field(default_factory=dict[str, Estimate])
    branch_steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    to_std: Difference | None = None
    to_mtd: Difference | None = None

    def to(self, reference: Reference) -> Difference | None:
        """The difference to the best STD or to MTD."""
        return self.to_std if reference == "std" else self.to_mtd


class BudgetSummary(Record):
    """The arms of one budget; `best_std` is the single teacher with the best mean, chosen after the fact.

    `missing` are the pairs (arm, seed) that were not run although both occur in other runs.
    """

    budget: Budget
    arms: tuple[ArmSummary, ...]
    best_std: str | None = None
    missing: tuple[tuple[str, int], ...] = ()

    def reference(self, which: Reference) -> str | None:
        """The arm that others are compared with, if it was run."""
        return self.best_std if which == "std" else next((a.arm for a in self.arms if a.arm == "mtd"), None)


class Comparison(Record):
    """All arms in all budgets. Differences and p are of `metric`: accuracy, or held-out loss without accuracy."""

    metric: Metric
    seeds: tuple[int, ...]
    questions: int
    rounds: int
    budgets: tuple[BudgetSummary, ...]


def summarize(runs: Sequence[ArmRun]) -> Comparison:
    """The summary of the given runs, in any order; the last round's student counts, even if an earlier one was better.

    An arm's differences are to the STD with the best mean and to MTD of the same budget, on the seeds that both have.

    Errors: UserError for two runs of one arm, seed and budget.

    >>> summarize([ArmRun(arm="mtd", budgets=("steps",), seed=0, loss=(2.0, 1.5))]).budgets[0].arms[0].last
    (1.5,)
    """
    metric: Metric = "accuracy" if any(r.accuracy for r in runs) else "loss"
    seeds = tuple(sorted({r.seed for r in runs}))
    named = [b for b in get_args(Budget) if any(b in r.budgets for r in runs)]
    return Comparison(
        metric=metric,
        seeds=seeds,
        questions=max((len(r.scores) for r in runs), default=0),
        rounds=max((len(_scores(r, metric)) - 1 for r in runs if _scores(r, metric)), default=0),
        budgets=tuple(_budget(b, [r for r in runs if b in _budgets(r)], seeds, metric) for b in named),
    )


def comparison_csv(runs: Sequence[ArmRun]) -> str:
    """The runs as CSV, one line an arm, budget and seed; `accuracy` and `loss` are the last round's.

    accuracy_0 is before training, accuracy_1 after the first round, and so on; so are the loss and each set of
    `forgetting`. What was not measured is empty.

    >>> comparison_csv([ArmRun(arm="base", budgets=("steps",), seed=0, accuracy=(0.5,))]).splitlines()[1]
    'base,steps,0,0.5,,0,0,0,0.0,0.5'
    """
    series = [_series(r) for r in runs]
    longest = {name: max(len(s.get(name, ())) for s in series) for name in sorted({n for s in series for n in s})}
    out = io.StringIO()
    columns = [*COLUMNS, *(f"{name}_{i}" for name, length in longest.items() for i in range(length))]
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for budget in get_args(Budget):
        writer.writerows(_cells(r, budget) for r in _ordered(runs) if budget in _budgets(r))
    return out.getvalue()


COLUMNS = ("arm", "budget", "seed", "accuracy", "loss", "questions", "branch_steps", "tokens", "seconds")


def _cells(run: ArmRun, budget: Budget) -> dict[str, Any]:
    last = {name: values[-1] for name, values in _series(run).items() if values and name in COLUMNS}
    courses = {n: values for n, values in _series(run).items() if len(values) > 1 or run.arm == "base"}
    by_round = {f"{name}_{i}": x for name, values in courses.items() for i, x in enumerate(values)}
    plain = {key: getattr(run, key) for key in COLUMNS if hasattr(run, key)}
    return {**plain, "accuracy": "", "loss": "", **last, "budget": budget, "questions": len(run.scores), **by_round}


def _series(run: ArmRun) -> dict[str, tuple[float, ...]]:
    sets = {f"forgetting_{name}": values for name, values in run.forgetting.items()}
    return {"accuracy": run.accuracy, "loss": run.loss, **sets}


def _scores(run: ArmRun, metric: Metric) -> tuple[float, ...]:
    return run.accuracy if metric == "accuracy" else run.loss


def _budgets(run: ArmRun) -> tuple[Budget, ...]:
    return get_args(Budget) if run.arm == "base" else run.budgets


def _ordered(runs: Iterable[ArmRun]) -> list[ArmRun]:
    return sorted(runs, key=lambda r: (place(r.arm), r.seed))


def _budget(budget: Budget, runs: Sequence[ArmRun], seeds: Sequence[int], metric: Metric) -> BudgetSummary:
    arms: dict[str, dict[int, ArmRun]] = {}
    for r in _ordered(runs):
        if r.seed in arms.setdefault(r.arm, {}):
            raise UserError(f"{r.arm}: two runs have seed {r.seed} and the budget {budget}; remove one")
        arms[r.arm][r.seed] = r
    summaries = {arm: _arm(arm, list(by_seed.values()), metric) for arm, by_seed in arms.items()}
    teachers = {a: s.score.mean for a, s in summaries.items() if s.score and parts(a)[0] == "std"}
    best = None
    if teachers:
        best = (max if metric == "accuracy" else min)(teachers, key=lambda a: teachers[a])
    to_std, to_mtd = (_differences(arms, reference, metric) for reference in (best, "mtd"))
    return BudgetSummary(
        budget=budget,
        arms=tuple(
            s.model_copy(update={"to_std": to_std.get(a), "to_mtd": to_mtd.get(a)}) for a, s in summaries.items()
        ),
        best_std=best,
        missing=tuple((arm, seed) for arm, by_seed in arms.items() for seed in seeds if seed not in by_seed),
    )


def _arm(arm: str, runs: Sequence[ArmRun], metric: Metric) -> ArmSummary:
    known = [(r.seed, s) for r in runs if (s := _scores(r, metric))]
    moved = [s for _, s in known if len(s) > 1]
    worst = min if metric == "accuracy" else max
    changes: dict[str, list[float]] = {}
    for r in runs:
        for name, values in r.forgetting.items():
            if len(values) > 1:
                changes.setdefault(name, []).append(values[-1] - values[0])
    courses = [s for _, s in known] if arm == "base" else moved
    longest = max(map(len, courses), default=0)
    by_round = (estimate([s[i] for s in courses if len(s) > i]) for i in range(longest))
    return ArmSummary(
        arm=arm,
        seeds=tuple(seed for seed, _ in known),
        last=tuple(s[-1] for _, s in known),
        score=estimate([s[-1] for _, s in known]),
        by_round=tuple(e for e in by_round if e),
        lowest=estimate([worst(s[1:]) for s in moved]),
        loss=estimate([r.loss[-1] for r in runs if r.loss]),
        gain=estimate([s[-1] - s[0] for s in moved]),
        forgetting={name: e for name, values in changes.items() if (e := estimate(values))},
        branch_steps=_mean(r.branch_steps for r in runs),
        tokens=_mean(r.tokens for r in runs),
        seconds=_mean(r.seconds for r in runs),
    )


def _differences(arms: dict[str, dict[int, ArmRun]], to: str | None, metric: Metric) -> dict[str, Difference]:
    found = {arm: d for arm in arms if to in arms and arm != to and (d := _difference(arms[arm], arms[to], to, metric))}
    adjusted = holm([d.seeds.p for d in found.values()])
    return {arm: d.model_copy(update={"holm": p}) for (arm, d), p in zip(found.items(), adjusted, strict=True)}


def _difference(a: dict[int, ArmRun], b: dict[int, ArmRun], to: str, metric: Metric) -> Difference | None:
    both = [(a[seed], b[seed]) for seed in a if seed in b and _scores(a[seed], metric) and _scores(b[seed], metric)]
    over_seeds = paired([_scores(x, metric)[-1] for x, _ in both], [_scores(y, metric)[-1] for _, y in both])
    if over_seeds is None:
        return None
    scored = metric == "accuracy" and all(x.scores and y.scores for x, y in both)
    questions = over_questions([x.scores for x, _ in both], [y.scores for _, y in both]) if scored else None
    return Difference(to=to, seeds=over_seeds, questions=questions)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
