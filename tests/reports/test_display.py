"""What is shown of work that goes on, where it is shown, and the tables of data."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from rich.cells import cell_len
from rich.console import Console

from mot_lora.data.records import DataRecord, Segment, TeacherDataRecord
from mot_lora.progress import Progress
from mot_lora.reports.display import Work, live, screen
from mot_lora.reports.tables import SAMPLE, data_tables
from mot_lora.text import BLOCKS, sparkline

TRAIN = "round 1, steps, train"
PLAN = [
    "before, loss",
    *(f"round {n}, {t}, {kind}" for n in (1, 2) for t in ("steps", "story") for kind in ("train", "loss")),
]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(progress: Progress, clock: Clock, stage: str = TRAIN, steps: int = 50, first: int = 0) -> None:
    """Measures, then a step a second, of 1,234 tokens."""
    for done in range(5):
        progress("before, loss", done, 4)
        clock.now += 0.5
    for done in range(first, steps + 1):
        progress(stage, done, 50, loss=2 - done / 100 if done > first else None, tokens=1234 * done)
        clock.now += 1


def log(first: int = 0, steps: int = 50, every: float = 5.0, encoding: str = "utf-8", stage: str = TRAIN) -> list[str]:
    raw, clock = BytesIO(), Clock()
    file = TextIOWrapper(raw, encoding=encoding)
    with live(Console(file=file, width=40), PLAN, every=every, clock=clock) as progress:
        train(progress, clock, stage, steps, first)
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_a_log_has_a_line_as_a_stage_begins_one_every_five_seconds_and_its_end() -> None:
    lines = log()
    assert lines[:4] == [
        "before, loss  0/4",
        f"{TRAIN}  0/50",
        f"{TRAIN}  5/50  loss 1.950  1,234 tokens/s  left 0:45, branch 0:48, run 3:25",
        f"{TRAIN}  10/50  loss 1.900  1,234 tokens/s  left 0:40, branch 0:42, run 3:20",
    ]
    assert [line.split("  ")[1] for line in lines[1:]] == [f"{done}/50" for done in range(0, 51, 5)]
    assert lines[-1] == f"{TRAIN}  50/50  loss 1.500  1,234 tokens/s  left 0:00, branch 0:02, run 2:40"
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_a_log_tells_the_end_once_and_only_of_a_stage_whose_middle_it_told() -> None:
    clock, out = Clock(), StringIO()
    with live(Console(file=out), every=10, clock=clock) as progress:
        for stage, seconds in (("short", 1.0), ("long", 6.0)):
            for done in (0, 1, 2, 3, 3, 3):
                progress(stage, done, 3)
                clock.now += seconds
    assert [line.split("  left")[0] for line in out.getvalue().splitlines()] == [
        "short  0/3",
        "long  0/3",
        "long  2/3",
        "long  3/3",
    ]


def test_a_branch_that_goes_on_in_its_middle_has_the_rates_of_what_was_seen() -> None:
    last = log(first=40, steps=45)[-1]
    assert last == f"{TRAIN}  45/50  loss 1.550  1,234 tokens/s  left 0:05, branch 0:08, run 2:45"


def test_a_log_in_another_encoding_and_with_odd_names() -> None:
    lines = log(encoding="ascii", stage="round 1, [bold]sté\n:smile:ps, train")
    assert "round 1, [bold]st? :smile:ps, train  0/50" in lines


def drawn(width: int, encoding: str = "utf-8", stage: str = TRAIN, steps: int = 12, note: str = "") -> list[str]:
    clock = Clock()
    work = Work(PLAN, clock, encoding)

    def progress(stage: str, done: int, total: int, _note: str = "", *, loss=None, tokens=None) -> None:
        work.update(stage, done, total, note, loss, tokens)

    train(progress, clock, stage, steps)
    clock.now -= 1
    out = StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(work)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_two_lines_say_all_in_80_columns() -> None:
    assert drawn(80) == [
        f"round 1 of 2, steps, train  {'━━╾───────'}  12/50  0:12  left 0:38  branch left 0:40",
        "loss 1.880  █▇▇▆▅▅▄▄▃▂▂▁  1,234 tokens/s  run left 3:18",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
@pytest.mark.parametrize("steps", [0, 1, 2, 50])
@pytest.mark.parametrize("name", ["a", "a-teacher-with-a-very-long-name-of-more-than-80-columns" * 2, "老师" * 30])
def test_no_line_wraps_at_any_width(width: int, steps: int, name: str) -> None:
    lines = drawn(width, stage=f"round 1, {name}, train", steps=steps, note="a note " * 30)
    assert len(lines) == 2
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("round 1 of 2, "[: width - 1])
    if width >= 40:
        assert f"{steps}/50" in lines[0]


def test_a_narrow_screen_keeps_what_matters_most() -> None:
    stage, run = drawn(60)
    assert stage.endswith("12/50  left 0:38")
    assert run == "loss 1.880  █▇▇▆▅▅▄▄▃▂▂▁  1,234 tokens/s  run left 3:18"
    stage, run = drawn(40)
    assert stage.endswith("12/50")
    assert run == "loss 1.880  run left 3:18"


def test_ascii_where_the_encoding_has_no_blocks() -> None:
    assert "".join(drawn(80, "ascii", stage="round 1, sté, train")).isascii()
    assert "##" in drawn(80, "ascii")[0]


def test_work_without_a_plan_is_one_line() -> None:
    clock, out = Clock(), StringIO()
    work = Work((), clock, "utf-8")
    for done in range(3):
        work.update("write", done, 4, "", None, None)
        clock.now += 10
    Console(file=out, width=80).print(work)
    assert out.getvalue().rstrip() == "write  ━━━━━━━━━━━━────────────  2/4  0:30  left 0:10"


@given(st.lists(st.floats(), max_size=300), st.integers(1, 30))
def test_a_sparkline_of_any_numbers(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= {*BLOCKS, " "}
    assert sparkline(values, width, in_ascii=True).isascii()
    if (finite := [v for v in values if abs(v) < 1e300]) and len(values) <= width and max(finite) > min(finite):
        assert line[values.index(min(finite))] == BLOCKS[0]
        assert line[values.index(max(finite))] == BLOCKS[-1]


def test_a_sparkline_averages_down_and_leaves_gaps() -> None:
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([1, math.nan, 8, math.inf], 4) == "▁ █ "
    assert sparkline([1, math.nan, 8, math.inf], 2) == "▁█"
    assert sparkline([3, 3, 3], 8) == "▁▁▁"


def test_a_loss_that_is_not_finite_is_told() -> None:
    work = Work((), Clock(), "utf-8")
    work.update("train", 1, 2, "", math.nan, None)
    assert work.line() == "train  1/2  loss nan"


@pytest.mark.parametrize("how", [{"force_terminal": True, "force_interactive": True}, {}])
def test_quiet_shows_nothing_and_the_last_line_is_still_said(how: dict[str, bool]) -> None:
    out = StringIO()
    console = Console(file=out, **how)
    with live(console, PLAN, quiet=True) as progress:
        progress(TRAIN, 0, 1, loss=1.0, tokens=1)
    console.print("the end")
    assert out.getvalue() == "the end\n"


def test_a_quiet_screen_is_quiet_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    console = screen(quiet=True)
    with live(console) as progress:
        progress(TRAIN, 0, 1)
    console.print("the end")
    assert capsys.readouterr() == ("the end\n", "")


def test_a_log_is_no_terminal_though_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with live(screen(as_json=True)) as progress:
        progress(TRAIN, 0, 9)
    assert capsys.readouterr() == ("", f"{TRAIN}  0/9\n")


def in_terminal(script: str, interrupt_at: str = "") -> str:
    """All that a script writes to a real terminal of 80 columns; Ctrl-C once the given words stand."""
    controller, terminal = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=terminal, stdout=terminal, stderr=terminal, env=env
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # how Linux says that the other end is closed
            piece = b""
        if not piece:
            break
        written += piece
        if interrupt_at and written.count(interrupt_at.encode()) > 3:  # the script is asleep then
            process.send_signal(signal.SIGINT)
            interrupt_at = ""
    os.close(controller)
    process.wait(30)
    return written.decode()


def on_glass(written: str) -> list[str]:
    """What then stands on the terminal, without empty lines at its end."""
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[\??\d*[A-Za-z]|\x1b\[[\d;]*m|\r|\n)|([^\x1b\r\n]+)", written):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control == "\x1b[2K":
            lines[row] = ""
        elif control.endswith("A"):
            row -= int(control[2:-1] or 1)
    return "\n".join(line.rstrip() for line in lines).rstrip().splitlines()


SCRIPT = """
    import time
    from mot_lora.reports.display import live, screen
    console = screen()
    try:
        with live(console, ["round 1, steps, train", "round 2, steps, train"]) as progress:
            for done in range(1000):
                progress("round 1, steps, train", done, 1000, loss=1 / (1 + done), tokens=done * 100)
                if done == 20:
                    print("said meanwhile")
                    time.sleep(0.5)
                if done >= 20:
                    time.sleep({pause})
    except KeyboardInterrupt:
        pass
    console.print("the end")
"""


def test_a_terminal_is_clean_after_the_work() -> None:
    written = in_terminal(SCRIPT.format(pause=0))
    assert on_glass(written) == ["said meanwhile", "the end"]
    assert "round 1 of 2, steps, train" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


@pytest.mark.usefixtures("signals_as_usual")
def test_a_terminal_is_clean_after_ctrl_c() -> None:
    written = in_terminal(SCRIPT.format(pause=10), interrupt_at="20/1000")
    assert on_glass(written) == ["said meanwhile", "the end"]
    assert "left" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


class Watched(NotebookClient):
    """A notebook's client that keeps each message about what is shown."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("display_data", "update_display_data"):
            self.shown = [*getattr(self, "shown", []), (msg["msg_type"], time.monotonic(), msg["content"])]
        return super().process_message(msg, cell, cell_index)


def test_a_notebook_has_one_output_that_takes_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cell = """
    import time
    from mot_lora.reports.display import live
    with live(plan=["round 1, <b>, train", "round 2, <b>, train"]) as progress:
        for done in range(61):
            progress("round 1, <b>, train", done, 60, loss=2 - done / 60, tokens=done * 100)
            time.sleep(0.02)
    """
    broken = "with live() as progress:\n    progress('write', 3, 9)\n    1 / 0"
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell)), nbformat.v4.new_code_cell(broken)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = Watched(notebook, timeout=60, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    capfd.readouterr()

    (output,) = notebook.cells[0].outputs  # no warning, nothing on standard error
    assert output.output_type == "display_data"
    assert re.fullmatch(r"done in \d:\d\d", output.data["text/plain"])
    stopped, error = notebook.cells[1].outputs
    assert re.fullmatch(r"stopped at write 3/9 after \d:\d\d", stopped.data["text/plain"])
    assert error.ename == "ZeroDivisionError"

    first = [
        s for s in client.shown if s[2]["transient"]["display_id"] == client.shown[0][2]["transient"]["display_id"]
    ]
    assert [kind for kind, _, _ in first] == ["display_data"] + ["update_display_data"] * (len(first) - 1)
    seconds = first[-1][1] - first[0][1]
    assert 4 <= len(first) <= 3 + 2 * seconds  # as it begins, at most twice a second, and at the end
    _, _, middle = first[-2]
    assert re.match(r"round 1 of 2, <b>, train  ━+", middle["data"]["text/plain"])
    assert "█" in middle["data"]["text/plain"]
    assert "&lt;b&gt;" in middle["data"]["text/html"]
    assert "\x1b" not in json.dumps(middle)


def a_teacher(**changed: object) -> TeacherDataRecord:
    values: dict[str, object] = {
        "teacher": "steps",
        "sources": ("traces.jsonl",),
        "rows": 12345,
        "used": 11220,
        "held_out": 1110,
        "left_out": {"duplicate": 12, "too long": 3, "empty": 0},
        "without_reasoning": 7,
        "median_tokens": 812,
        "longest_tokens": 4096,
        "tokens": 9876543,
    }
    return TeacherDataRecord.model_validate(values | changed)


def printed(record: DataRecord, width: int = 80, **how: bool) -> str:
    out = StringIO()
    console = Console(file=out, width=width, **how)
    for shown in data_tables(record):
        console.print(shown)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_of_data_has_every_number_in_80_columns(width: int) -> None:
    text = printed(DataRecord(teachers=(a_teacher(), a_teacher(teacher="[red]", left_out={})), questions=1234), width)
    numbers = {"12,345", "11,220", "1,110", "7", "812", "4,096", "9,876,543", "1,234"}
    assert {"steps", "[red]", "12", "duplicate", "3", "too", "long"} | numbers <= set(text.split())
    assert "empty" not in text
    assert "…" not in text


def test_a_sample_is_marked_where_it_is_trained_and_is_not_markup() -> None:
    sample = (
        Segment(text="user: [bold]2 + 3[/bold]\n", trained=False),
        Segment(text="[/think] so", trained=True),
        Segment(text=" 5\x1b[2J", trained=True),
        Segment(text="\n", trained=False),
    )
    text = printed(DataRecord(teachers=(a_teacher(sample=sample),)))
    assert "user: [bold]2 + 3[/bold]" in text
    assert "»[/think] so 5\N{REPLACEMENT CHARACTER}[2J«" in text
    coloured = printed(DataRecord(teachers=(a_teacher(sample=sample),)), force_terminal=True)
    assert re.search(r"\x1b\[1;32m»\[/think\] so 5", coloured)
    assert "\x1b[2J" not in coloured


def test_a_long_sample_is_cut_in_its_middle_and_shows_both_ends_of_what_is_trained() -> None:
    sample = (
        Segment(text="q" * 50, trained=False),
        Segment(text="first" + "x" * (SAMPLE + 1224) + "last!", trained=True),
    )
    text = printed(DataRecord(teachers=(a_teacher(sample=sample),)))
    assert "qq»first" in text
    assert "… 1,234 characters …" in text
    assert "last!«" in text
    assert text.rpartition("trained between")[2].count("x") == SAMPLE - len("first" + "last!")
