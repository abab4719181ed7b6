"""How long work still takes, from what has been seen of it. Times are seconds of any clock that only goes forward.

rich.progress would know the time left of the task at work alone, not of the stages after it, and nothing while a step
takes longer than its window of 30 seconds.
"""

from collections.abc import Iterable

FADE = 0.5 ** (1 / 20)  # twenty steps later, a step counts half
SHORT = ("fold",)  # kinds that count as nothing until one is seen: else the run's time is unknown for a whole round


class Pace:
    """Seconds that a unit of work takes; recent units count more, so that a pause is forgotten.

    >>> pace = Pace()
    >>> for done in (10, 11, 12):
    ...     pace.see(done, now=3.0 * done)
    >>> pace.seconds
    3.0
    """

    def __init__(self) -> None:
        self._done: int | None = None
        self._moved = 0.0  # when done last changed
        self._stride = 0  # units of the last step
        self._units = self._time = 0.0

    def see(self, done: int, now: float) -> None:
        """Take in that `done` units are done; what was done before the first call has no part in the pace."""
        if done == self._done:
            return
        if self._done is not None and done > self._done:
            self._stride = done - self._done
            self._units = self._units * FADE + self._stride
            self._time = self._time * FADE + max(0.0, now - self._moved)
        self._done, self._moved = done, now

    @property
    def seconds(self) -> float | None:
        """Seconds a unit; None until one has been seen."""
        return self._time / self._units if self._units else None

    def left(self, units: int, now: float) -> float | None:
        """Seconds that so many more units take; a step that is late holds the time still, it does not use it up."""
        if self.seconds is None:
            return None
        waited = min(max(0.0, now - self._moved), self.seconds * self._stride)
        return max(0.0, self.seconds * units - waited)


class TimeLeft:
    """Time left of a stage, its branch and the run.

    `plan` names the stages of the run in order, as `round 1, steps, train` or `round 1, fold`: the last word is the
    kind, what lies between is whose stage it is. A stage to come takes as long as those of its kind took: its owner's,
    else those of its level, else any. Stages may be skipped, begin anywhere, or not be in the plan.

    >>> left = TimeLeft(["round 1, a, train", "round 1, b, train"])
    >>> for second in range(5):
    ...     left.update("round 1, a, train", second, 10, float(second))
    >>> left.stage(4.0), left.run(4.0)
    (6.0, 16.0)
    """

    def __init__(self, plan: Iterable[str] = ()) -> None:
        self._plan = tuple(plan)
        self._to_come = self._plan
        self._took: dict[tuple[str, str], tuple[float, float]] = {}  # by owner and kind: seconds, stages
        self._stage: str | None = None
        self._began = 0.0
        self._first = self._done = self._total = 0
        self._pace = Pace()

    def update(self, stage: str, done: int, total: int, now: float) -> None:
        """Take in how far a stage is; another stage's name ends the one before."""
        if stage != self._stage:
            if self._stage is not None:
                self._took = self._with_stage(now - self._began)
            self._stage, self._began, self._first, self._pace = stage, now, done, Pace()
            if stage in self._plan:
                self._to_come = self._plan[self._plan.index(stage) + 1 :]
        self._first = min(self._first, done)
        self._done, self._total = done, total
        self._pace.see(done, now)

    def stage(self, now: float) -> float | None:
        """Seconds left of the stage at work; None while unknown."""
        if self._stage is None:
            return None
        todo = max(0, self._total - self._done)
        if not todo:
            return 0.0
        left = self._pace.left(todo, now)
        if left is None and (whole := _whole(self._stage, self._took)) is not None:
            left = max(0.0, whole * todo / max(self._total, todo) - max(0.0, now - self._began))
        return left

    def branch(self, now: float) -> float | None:
        """Seconds left of all stages of the branch at work; None while unknown, and where there is no branch."""
        if self._stage is None or not _owner_and_kind(self._stage)[0]:
            return None
        return self._sum(now, (s for s in self._to_come if _head(s) == _head(self._stage or "")))

    def run(self, now: float) -> float | None:
        """Seconds left of the whole plan; None until each kind to come, but for short ones, has been seen in part."""
        return self._sum(now, self._to_come) if self._plan else None

    def _sum(self, now: float, to_come: Iterable[str]) -> float | None:
        total = self.stage(now)
        if total is None:
            return None
        took = self._with_stage(max(0.0, now - self._began) + total)
        for stage in to_come:
            whole = _whole(stage, took)
            if whole is None and _owner_and_kind(stage)[1] not in SHORT:
                return None
            total += whole or 0.0
        return total

    def _with_stage(self, seconds: float) -> dict[tuple[str, str], tuple[float, float]]:
        """What stages took, with the one at work as if it took so long; each earlier one of its kind counts half."""
        key = _owner_and_kind(self._stage or "")
        old_seconds, old_stages = self._took.get(key, (0.0, 0.0))
        # one that was resumed in its middle is seen only in part
        share = (self._total - self._first) / self._total if self._total > 0 else 1.0
        share = min(1.0, max(0.0, share))
        return self._took | {key: (old_seconds / 2 + max(0.0, seconds), old_stages / 2 + share)}


def _head(stage: str) -> str:
    return stage.rpartition(", ")[0]


def _owner_and_kind(stage: str) -> tuple[str, str]:
    head, _, kind = stage.rpartition(", ")
    return head.partition(", ")[2], kind


def _whole(stage: str, took: dict[tuple[str, str], tuple[float, float]]) -> float | None:
    """Seconds that a whole stage takes, by its nearest kin; None for a kind that was not seen."""
    owner, kind = _owner_and_kind(stage)
    kin = {o: row for (o, k), row in took.items() if k == kind}
    for near in ({owner}, {o for o in kin if bool(o) == bool(owner)}, set(kin)):
        rows = [row for o, row in kin.items() if o in near]
        if rows:
            return sum(seconds for seconds, _ in rows) / (sum(stages for _, stages in rows) or 1.0)
    return None
