"""The page and the table say what the records say, and ask nothing of the network."""

import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from mot_lora.display import table
from mot_lora.records import BranchRecord, EvaluationRecord, FoldRecord, RoundRecord, RunRecord, TrainRecord
from mot_lora.report import report, table_rows

FOLD = FoldRecord(relative_norm=0.0123, survived=0.987, sign_conflict=0.4, cosine=((1.0,),))


def evaluation(accuracy: float | None, loss: float) -> EvaluationRecord:
    interval = None if accuracy is None else (accuracy - 0.05, accuracy + 0.05)
    return EvaluationRecord(questions=100, accuracy=accuracy, interval=interval, losses={"a": loss}, seconds=3)


def a_run(answers: bool = True) -> RunRecord:
    def measured(accuracy: float, loss: float) -> EvaluationRecord:
        return evaluation(accuracy if answers else None, loss)

    rounds = tuple(
        RoundRecord(
            round=n,
            teachers=("a", "b"),
            method="linear",
            weights=(1, 1),
            seed=0,
            fold=FOLD,
            layers={},
            fold_seconds=1,
            evaluation=measured(0.3 + n / 10, 2.0 - n / 10),
        )
        for n in (1, 2)
    )
    branches = tuple(
        BranchRecord(
            round=n, teacher=t, train=TrainRecord(steps=1, tokens=1, loss=1, seconds=4), evaluation=measured(0.35, 1.9)
        )
        for n in (1, 2)
        for t in ("a", "b")
    )
    return RunRecord(before=measured(0.3, 2.0), branches=branches, rounds=rounds, metric="accuracy", best=2, stopped="")


def test_the_table_has_the_student_before_each_branch_and_each_round() -> None:
    rows = table_rows(a_run())
    assert [name.strip() for _, name, _ in rows] == [
        "before",
        "a alone",
        "b alone",
        "after round 1",
        "a alone",
        "b alone",
        "after round 2 (best)",
    ]
    assert rows[-1] == (
        "merged",
        "after round 2 (best)",
        ("50.0 % (45.0 to 55.0)", "1.800", "0.0123", "0.987", "4"),
    )
    assert rows[1][2] == ("35.0 % (30.0 to 40.0)", "1.900", "", "", "7")


def test_every_cell_is_seen_in_a_log() -> None:
    out = StringIO()
    Console(file=out, width=110).print(table(a_run()))
    lines = out.getvalue().splitlines()
    for _, name, cells in table_rows(a_run()):
        assert any(name.strip() in line and all(cell in line for cell in cells) for line in lines), name


@pytest.mark.parametrize("answers", [True, False])
def test_the_page_is_whole_and_needs_no_network(answers: bool) -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.fetched: list[str] = []
            self.rows = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.rows += tag == "tr"
            self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    page = report(a_run(answers), "<b>run</b>")
    reader = Reader()
    reader.feed(page)
    assert reader.fetched == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert reader.rows == 1 + 7
    assert "<b>run</b>" not in page
    assert "&lt;b&gt;run&lt;/b&gt;" in page
    assert ("accuracy, %" in page) == answers  # matplotlib writes the axis's label as a comment beside its outlines
