"""The page and the table say what the records say, whatever is missing, and ask nothing of the network."""

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from html import escape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mot_lora.data.records import DataRecord, Segment, TeacherDataRecord
from mot_lora.records import Answer, BranchRecord, EvaluationRecord, FoldRecord, RoundRecord, RunRecord, TrainRecord
from mot_lora.reports.passages import LONG
from mot_lora.reports.run_page import Page, report
from mot_lora.reports.run_tables import results
from mot_lora.reports.tables import faded_line, table

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

HOSTILE = '</style><script>alert(1)</script><img src="http://example.org/x.png" onerror="x">&amp;"\''
VOID = {"meta", "link", "br", "img"}


def evaluation(accuracy: float | None, loss: float) -> EvaluationRecord:
    interval = None if accuracy is None else (accuracy - 0.05, accuracy + 0.05)
    return EvaluationRecord(questions=100, accuracy=accuracy, interval=interval, losses={"a": loss}, seconds=3)


def fold(size: float = 0.0123, survived: float | None = 0.987) -> FoldRecord:
    pairs = ((1.0, 0.25), (0.25, 1.0)), ((0.0, 0.4), (0.4, 0.0))
    return FoldRecord(relative_norm=size, survived=survived, sign_conflict=0.4, cosine=pairs[0], opposition=pairs[1])


def a_run(answers: bool = True, teachers: tuple[str, ...] = ("a", "b")) -> RunRecord:
    def measured(accuracy: float, loss: float) -> EvaluationRecord:
        return evaluation(accuracy if answers else None, loss)

    modules = {f"m.layers.{i}.{k}_proj": fold(0.01 + i / 1000, 0.99 - i / 10) for i in range(3) for k in "qv"}
    rounds = tuple(
        RoundRecord(
            round=n,
            teachers=teachers,
            method="linear",
            weights=(1, 1),
            seed=0,
            fold=fold(),
            layers={},
            modules=modules,
            fold_seconds=1,
            evaluation=measured(0.3 + n / 10, 2.0 - n / 10),
        )
        for n in (1, 2)
    )
    branches = tuple(
        BranchRecord(
            round=n,
            teacher=t,
            learning_rate=1e-4,
            train=TrainRecord(steps=3, tokens=1, loss=1, seconds=4, losses=(2.0, 1.5, 1.25)),
            evaluation=measured(0.35, 1.9),
        )
        for n in (1, 2)
        for t in teachers
    )
    return RunRecord(before=measured(0.3, 2.0), branches=branches, rounds=rounds, metric="accuracy", best=2, stopped="")


def answers(*scores: float, said: str = "said") -> list[Answer]:
    return [
        Answer(question=f"question {i}?", answer=str(i), texts=(f"<think>{said} of {i}</think> it is {i}",), score=s)
        for i, s in enumerate(scores)
    ]


def a_teacher(name: str = "a", **changes: Any) -> TeacherDataRecord:
    trace = (Segment(text="<user> 2 + 2?", trained=False), Segment(text="<think>two and two", trained=True))
    teacher = TeacherDataRecord(
        teacher=name,
        sources=("a.jsonl", "more.jsonl"),
        rows=1234,
        used=1200,
        held_out=21,
        left_out={"too long": 10, "seen before": 3},
        without_reasoning=7,
        median_tokens=512,
        longest_tokens=4096,
        tokens=654321,
        sample=trace,
    )
    return teacher.model_copy(update=changes)


def a_page(**changes: Any) -> Page:
    page = Page(
        "demo",
        a_run(),
        DataRecord(teachers=(a_teacher(),), questions=100),
        answers(0, 1, 0, 1, said="before"),
        answers(1, 0, 0, 1, said="after"),
        "student: tiny\nrounds: 2\n",
        {"versions": {"torch": "2.13.0"}, "device": "a GPU", "inputs": {"a.jsonl": "abc123"}},
    )
    return replace(page, **changes)


@cache
def demo() -> str:
    return report(a_page())


class Reader(HTMLParser):
    """A page taken apart: every tag closed in its turn, its text, its tables, its headings, what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.headings: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)


def section(page: str, title: str) -> Reader:
    return Reader(page[page.index(f"<h2>{title}") : page.index("</section>", page.index(f"<h2>{title}"))])


def test_the_table_has_the_student_before_each_branch_and_each_round() -> None:
    rows = results(a_run()).rows
    assert [row.name for row in rows] == [
        "before",
        "a alone",
        "b alone",
        "after round 1",
        "a alone",
        "b alone",
        "after round 2 (best)",
    ]
    cells = ("50.0 % (45.0 to 55.0)", "1.800", "0.0123", "0.987", "4")
    assert rows[-1] == ("after round 2 (best)", cells, "merged")
    assert rows[1].kind == "branch"
    assert rows[1].cells == ("35.0 % (30.0 to 40.0)", "1.900", "", "", "7")


def test_every_cell_is_seen_in_a_log() -> None:
    out = StringIO()
    Console(file=out, width=110).print(table(a_run()))
    lines = out.getvalue().splitlines()
    for name, cells, _ in results(a_run()).rows:
        assert any(name in line and all(cell in line for cell in cells) for line in lines), name


MISSING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "data": {"data": None},
    "answers": {"before": (), "after": ()},
    "answers after": {"after": ()},
    "config": {"config": ""},
    "environment": {"environment": {}},
    "rounds": {"record": a_run().model_copy(update={"rounds": (), "best": 0})},
    "rounds and branches": {"record": a_run().model_copy(update={"rounds": (), "branches": (), "best": 0})},
    "branches": {"record": a_run().model_copy(update={"branches": ()})},
    "accuracy": {"record": a_run(answers=False).model_copy(update={"metric": "loss"})},
    "a best round": {"record": a_run().model_copy(update={"best": 0})},
    "everything": {
        "record": RunRecord(before=EvaluationRecord(), metric="accuracy", best=0, stopped=""),
        "data": None, "before": (), "after": (), "config": "", "environment": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("missing", MISSING)
def test_the_page_is_whole_and_needs_no_network(missing: str) -> None:
    page = report(a_page(**MISSING[missing])) if MISSING[missing] else demo()
    reader = Reader(page)
    fetched = [v for k, v in reader.attributes if k in ("src", "href", "srcset", "xlink:href") and v[:1] != "#"]
    assert fetched == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", page)
    assert "script" not in reader.tags
    ids = [v for k, v in reader.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert [h for h, _ in reader.headings].count("h1") == 1
    assert [title for h, title in reader.headings if h == "h2"] == [
        "Results",
        "Score by round",
        "Training loss",
        "Agreement of the teachers",
        "The update by layer",
        "Answers before and after",
        "Data",
        "How it was done",
    ]
    for wanted in (("lang", "en"), ("content", "light dark"), ("content", "width=device-width, initial-scale=1")):
        assert wanted in reader.attributes
    assert not re.search(r"\b(None|nan|inf)\b", reader.text)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert report(a_page()) == demo()


def test_the_results_are_the_run_s_table_less_empty_columns() -> None:
    rows = section(demo(), "Results").rows
    assert rows[0] == ["student", "accuracy, 95 % interval", "held-out loss", "|D|/|W|", "survived", "seconds"]
    assert rows[1:] == [[name, *cells] for name, cells, _ in results(a_run()).rows]
    rows = section(report(a_page(record=a_run(answers=False))), "Results").rows
    assert rows[0] == ["student", "held-out loss", "|D|/|W|", "survived", "seconds"]
    assert rows[-1] == ["after round 2 (best)", "1.800", "0.0123", "0.987", "4"]


def test_the_head_says_what_came_of_the_run() -> None:
    page = report(a_page(record=a_run().model_copy(update={"stopped": "all rounds are done"})))
    head = page[page.index("<h1>") : page.index("<h2>")]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head))
    assert facts == {
        "Best by accuracy": "round 2",
        "Student before training": "30.0 % (25.0 to 35.0)",
        "Student of the best round": "50.0 % (45.0 to 55.0)",
        "Questions": "100 held out",
        "Stopped because": "all rounds are done",
        "Device": "a GPU",
    }


def test_figures_tell_their_numbers_to_a_screen_reader() -> None:
    labels = [v for k, v in Reader(demo()).attributes if k == "aria-label"]
    assert "Accuracy by round: before 30.0 % (25.0 to 35.0), round 1 40.0 % (35.0 to 45.0), " in "".join(labels)
    assert "Held-out loss by round: before 2.000 nats per token, round 1 1.900 nats per token" in "".join(labels)
    assert "Cosine of the updates in round 1: a and b 0.25." in labels
    assert "Sign conflict of the updates in round 2: a and b 0.40." in labels
    assert "a in round 1 from 2.00 to 1.25" in "".join(labels)


def test_the_layers_name_their_extremes() -> None:
    text = section(demo(), "The update by layer").text
    assert "Largest: 0.0120 in m.layers.2.q_proj." in text
    assert "Least: 0.790 in m.layers.2.q_proj." in text


def test_of_many_rounds_the_first_and_the_last_are_compared() -> None:
    run = a_run()
    rounds = tuple(run.rounds[0].model_copy(update={"round": n}) for n in range(1, 6))
    found = section(report(a_page(record=run.model_copy(update={"rounds": rounds}))), "Agreement")
    titles = re.findall(r"(?:cosine|sign conflict), round \d", found.text)
    assert titles == ["cosine, round 1", "sign conflict, round 1", "cosine, round 5", "sign conflict, round 5"]


def test_an_update_that_is_not_known_to_survive_is_not_drawn() -> None:
    run = a_run()
    rounds = tuple(r.model_copy(update={"modules": {"m.layers.0.q": fold(survived=None)}}) for r in run.rounds)
    text = section(report(a_page(record=run.model_copy(update={"rounds": rounds}))), "The update by layer").text
    assert "|D|/|W|, round 2" in text
    assert "survived, round" not in text


def test_answers_are_shown_by_what_became_of_them() -> None:
    found = section(demo(), "Answers")
    titles = [title for _, title in found.headings if _ == "h3"]
    assert titles == ["Better: question 1", "Worse: question 2", "Still wrong: question 3", "Still right: question 4"]
    assert "Of 4 questions: 1 better, 1 worse, 1 still wrong, 1 still right." in found.text
    assert re.findall(r"Before: (right|wrong)", found.text) == ["wrong", "right", "wrong", "right"]
    assert re.findall(r"After round 2: (right|wrong)", found.text) == ["right", "wrong", "wrong", "right"]
    assert found.text.index("<think>before of 0</think>") < found.text.index("<think>after of 0</think>")


def test_the_clearest_answers_come_first_and_two_of_a_kind() -> None:
    found = section(report(a_page(before=answers(0, 0, 0), after=answers(0.25, 1, 0.5))), "Answers")
    assert [title for h, title in found.headings if h == "h3"] == ["Better: question 2", "Better: question 3"]


def test_of_several_samples_all_are_shown_and_counted() -> None:
    asked = Answer(question="?", answer="4", texts=("one", "two", "three", "four"), score=0.75)
    text = section(report(a_page(before=[asked], after=[asked])), "Answers").text
    assert text.count("3 of 4 right") == 2
    assert all(text.count(t) >= 2 for t in asked.texts)


def test_long_texts_are_folded_away_and_whole() -> None:
    thought = "<think>" + "".join(f"step {i}. " for i in range(5000)) + "</think>"
    said = "".join(f"word {i} " for i in range(500))
    never = "<think>" + "on and on " * 300
    asked = [
        Answer(question="q" * (LONG + 1), answer="1", texts=(thought + said,), score=0),
        Answer(question="q", answer="1", texts=(never,), score=0),
    ]
    page = report(a_page(before=asked, after=asked))
    part = page[page.index("<h2>Answers") : page.index("<h2>Data")]
    folded = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", part, flags=re.DOTALL)
    seen = {summary.partition(",")[0]: Reader(body).text for summary, body in folded}
    assert seen == {
        "Question": "q" * (LONG + 1),
        "Reasoning": thought,
        "Answer": said.strip(),
        "Reasoning that never ends": never,
    }
    outside = Reader(re.sub(r"<details>.*?</details>", "", part, flags=re.DOTALL)[: part.rindex("</section>")]
                     .replace("</section>\n<section>", "").replace("</section>", "")).text  # fmt: skip
    assert "word 499" in outside
    assert "word 0 " not in outside


def test_the_data_s_numbers_are_in_their_columns() -> None:
    found = section(demo(), "Data")
    assert dict(zip(*found.rows, strict=True)) == {
        "teacher": "a",
        "rows": "1,234",
        "used": "1,200",
        "held\nout": "21",
        "left\nout": "10 too long\n3 seen before",
        "answer\nonly": "7",
        "median\ntokens": "512",
        "longest\ntrace": "4,096",
        "tokens\nin all": "654,321",
    }
    assert "From a.jsonl, more.jsonl." in found.text
    assert re.search(r"not trained\s*<user> 2 \+ 2\?\s*trained\s*<think>two and two", found.text)


def test_settings_and_versions_are_there() -> None:
    found = section(demo(), "How it was done")
    assert "student: tiny\nrounds: 2\n" in found.text
    assert found.rows[1:] == [["versions: torch", "2.13.0"], ["device", "a GPU"], ["inputs: a.jsonl", "abc123"]]


def test_nothing_that_data_say_becomes_markup() -> None:
    asked = [Answer(question=HOSTILE, answer=HOSTILE, texts=(HOSTILE, f"<think>{HOSTILE}</think>{HOSTILE}"), score=0)]
    teacher = a_teacher(HOSTILE, sources=(HOSTILE,), left_out={HOSTILE: 1})
    run = a_run(teachers=(HOSTILE, "b"))
    modules = {HOSTILE: fold(), f"m.layers.0.{HOSTILE}": fold()}
    run = run.model_copy(
        update={
            "stopped": HOSTILE,
            "metric": HOSTILE,
            "rounds": tuple(r.model_copy(update={"modules": modules}) for r in run.rounds),
        }
    )
    sample = (Segment(text=HOSTILE, trained=True), Segment(text=HOSTILE, trained=False))
    data = DataRecord(teachers=(teacher.model_copy(update={"sample": sample}),))
    page = report(Page(HOSTILE, run, data, asked, asked, HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}, "device": HOSTILE}))
    reader = Reader(page)
    assert not {"script", "img"} & set(reader.tags)
    assert not {"onerror", "src"} & {k for k, _ in reader.attributes}
    assert reader.text.count(HOSTILE) >= 20


def browser() -> str:
    found = [p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))]
    if not found:
        pytest.skip("no chromium or chrome is on PATH to open the page with")
    return found[0]


def opened(page: str, folder: Path) -> tuple[str, list[str]]:
    """A page in a real browser: the DOM that it ends with, and what it said on the console."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --window-size=1400,2000 --dump-dom"
    command = [browser(), *flags.split(), f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@cache
def wide_page() -> str:
    """A page of everything that could be too wide."""
    names = tuple(f"teacher-{i}-with-a-name-of-forty-characters" for i in range(2))
    asked = [Answer(question="long" * 200, answer="1" * 200, texts=("x" * 900,), score=0)]
    data = DataRecord(teachers=tuple(map(a_teacher, names)))
    return report(
        a_page(name="n" * 99, record=a_run(teachers=names), data=data, before=asked, after=asked, config="v" * 500)
    )


def test_a_browser_opens_the_page_without_a_word_on_the_console(tmp_path: Path) -> None:
    page = wide_page()
    dom, console = opened(page, tmp_path)
    assert console == []
    assert dom.count("<figure>") == page.count("<figure>") == 9


def test_the_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    frames = "".join(f'<iframe width="{w}" height="900" style="border: 0" srcdoc="{escape(wide_page())}"></iframe>'
                     for w in (320, 390, 1280))  # fmt: skip
    measure = """<script>onload = () => {
        for (const frame of document.querySelectorAll("iframe")) {
            const page = frame.contentDocument;
            for (const part of page.querySelectorAll("details")) part.open = true;
            frame.title = [frame.contentWindow.innerWidth, page.documentElement.scrollWidth];
        }
        console.log("measured");
    }</script>"""
    dom, console = opened(f"<!doctype html><html><body>{frames}{measure}</body></html>", tmp_path)
    assert len(console) == 1  # so the console is heard
    assert "measured" in console[0]
    widths = [(int(inner), int(needed)) for inner, needed in re.findall(r' title="(\d+),(\d+)"', dom)]
    assert [inner for inner, _ in widths] == [320, 390, 1280]
    assert all(needed <= inner for inner, needed in widths), widths


def test_a_run_says_of_which_rounds_too_little_survived() -> None:
    record = a_run()
    assert faded_line(record) == ""
    one, two = record.rounds
    half = two.model_copy(update={"fold": fold(0.001, 0.5247)})
    nothing = one.model_copy(update={"fold": fold(0.0, None)})
    line = "only 0.52 of round 2's update survived rounding to 16 bits; quantization=nf4 keeps small updates"
    assert faded_line(record.model_copy(update={"rounds": (nothing, half)})) == line
