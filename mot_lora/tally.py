"""Sums over entries of updates, which add up over modules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """Sums over entries that say how an update relates to its base, its fold and its branches; tallies add up.

    base_sq: |W|^2; update_sq: |D|^2; kept: <change, D>, change being what the fold did to the weights in use;
    gram: <D_i, D_j> of the branches; opposed: entries on which the signs of branches i and j differ; conflicts: entries
    on which those of any two do.
    """

    entries: int
    base_sq: float
    update_sq: float
    kept: float
    conflicts: int
    gram: tuple[tuple[float, ...], ...]
    opposed: tuple[tuple[int, ...], ...]

    @property
    def relative_norm(self) -> float:
        """|D| / |W|."""
        return math.sqrt(self.update_sq / self.base_sq) if self.base_sq else math.inf

    @property
    def survived(self) -> float | None:
        """<change, D> / |D|^2: the share of the update that is in the weights after rounding; None for no update."""
        return self.kept / self.update_sq if self.update_sq else None

    @property
    def sign_conflict(self) -> float:
        """Share of entries on which the branches disagree about the sign."""
        return self.conflicts / self.entries

    @property
    def opposition(self) -> tuple[tuple[float, ...], ...]:
        """Share of entries on which every two branches have opposite signs."""
        return tuple(tuple(n / self.entries for n in row) for row in self.opposed)

    @property
    def cosine(self) -> tuple[tuple[float, ...], ...]:
        """Cosine between every two branches' updates."""
        norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self.gram)]
        return tuple(
            tuple(g / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for j, g in enumerate(row))
            for i, row in enumerate(self.gram)
        )


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """The tally of several modules together. Errors: ValueError for none."""
    rows = list(tallies)
    if not rows:
        raise ValueError("no tallies to add")
    n = range(len(rows[0].gram))
    return Tally(
        entries=sum(t.entries for t in rows),
        base_sq=math.fsum(t.base_sq for t in rows),
        update_sq=math.fsum(t.update_sq for t in rows),
        kept=math.fsum(t.kept for t in rows),
        conflicts=sum(t.conflicts for t in rows),
        gram=tuple(tuple(math.fsum(t.gram[i][j] for t in rows) for j in n) for i in n),
        opposed=tuple(tuple(sum(t.opposed[i][j] for t in rows) for j in n) for i in n),
    )
