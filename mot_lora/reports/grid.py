"""A table as rows of text: computed once, shown in a terminal and on a page."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple


class Row(NamedTuple):
    """A row's name and its other cells; `kind` says whose it is: the merged student's, or one branch's."""

    name: str
    cells: tuple[str, ...]
    kind: Literal["", "merged", "branch"] = ""


@dataclass(frozen=True)
class Grid:
    """A table: what it shows, its columns (that of the names first), and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def filled(self) -> "Grid":
        """The same without the columns that say nothing in any row.

        >>> rows = Row("before", ("-", "3")), Row("after", ("", "4"))
        >>> Grid("a run", ("student", "loss", "seconds"), rows).filled().columns
        ('student', 'seconds')
        """
        kept = [i for i in range(len(self.columns) - 1) if any(row.cells[i] not in ("", "-") for row in self.rows)]
        return replace(
            self,
            columns=(self.columns[0], *(self.columns[i + 1] for i in kept)),
            rows=tuple(row._replace(cells=tuple(row.cells[i] for i in kept)) for row in self.rows),
        )
