"""Teacher files from public corpora: which traces are taken, from which columns, and that a run reads them."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import refused

from mot_lora.data.dataset import load_data
from mot_lora.data.reasoning import think
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace, read_trace
from mot_lora.reader import demo_path, parse_config

SCRIPT = Path(__file__).parents[2] / "recipes" / "prepare_teachers.py"
Rows = list[dict[str, Any]]
Prepare = Callable[..., tuple[int, str, str]]
S1K = ("--teacher", "deepseek=deepseek_thinking_trajectory,deepseek_attempt")
S1K += ("--teacher", "gemini=gemini_thinking_trajectory,gemini_attempt")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("prepare_teachers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepare(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Prepare:
    """Run the script with these arguments: its exit status, and what it printed to both streams."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capfd.readouterr()
        try:
            script.main()
            status: Any = 0
        except SystemExit as e:
            status = e.code
        out = capfd.readouterr()
        return status, out.out, out.err

    return run


def write(name: str, rows: Rows) -> str:
    Path(name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return name


def written(teacher: str, out: str = "traces") -> Rows:
    return [json.loads(line) for line in Path(out, f"{teacher}.jsonl").read_text("utf-8").splitlines()]


def questions(teacher: str, out: str = "traces") -> list[str]:
    return [row["question"] for row in written(teacher, out)]


def told(prepare: Prepare, *arguments: Any) -> dict[str, Any]:
    """What the script says of each teacher, as JSON."""
    status, out, err = prepare(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)["teachers"]


def s1k(i: int, deepseek: str | None = None, gemini: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of s1K-1.1; both teachers are right unless told otherwise."""
    right = str(i * i)
    return {
        "question": f"What is {i} times {i}?",
        "solution": right,
        "cot_type": "math",
        "metadata": "{}",
        "cot": None,
        "deepseek_thinking_trajectory": f"D: {i} * {i} = {right}",
        "deepseek_attempt": f"It is $\\boxed{{{deepseek or right}}}$.",
        "deepseek_grade": "Yes",
        "gemini_thinking_trajectory": f"G: {i} * {i} = {right}",
        "gemini_attempt": f"So the result is **{gemini or right}**.",
        "gemini_grade": "Yes",
        **more,
    }


def boba(question: str, *solutions: str, **more: Any) -> dict[str, Any]:
    """A row of AReaL-boba, whose prompt is in another model's template."""
    ask = "Please reason step by step, and put your final answer within \\boxed{}."
    prompt = f"<|User|>\n{question}\n{ask}<|Assistant|><think>\n".replace("|", "\uff5c")
    return {"prompt": prompt, "task": "math", "query_id": "x", "solutions": [*solutions], **more}


def mistake(result: tuple[int, str, str]) -> str:
    """What is said of a user's mistake that shows only when the rows are read."""
    status, _, err = result
    assert (status, err.count("\n")) == (2, 1)
    return err.removeprefix("error: ")


# --- the three styles --------------------------------------------------------------------------------------


def test_s1k_has_two_teachers_in_a_row(prepare: Prepare) -> None:
    source = write("s1k.jsonl", [s1k(2), s1k(3, deepseek="8"), s1k(4, gemini="17"), s1k(5, gemini_attempt="")])
    counts = told(prepare, source, *S1K, "--out", "traces")
    assert written("deepseek") == [
        {
            "question": f"What is {i} times {i}?",
            "reasoning": f"D: {i} * {i} = {i * i}",
            "answer": f"It is $\\boxed{{{i * i}}}$.",
            "gold": str(i * i),
            "source": f"s1k.jsonl:{i - 1}",
        }
        for i in (2, 4, 5)
    ]
    assert [(row["reasoning"], row["answer"]) for row in written("gemini")] == [
        (f"G: {i} * {i} = {i * i}", f"So the result is **{i * i}**.") for i in (2, 3)
    ]
    assert counts == {
        "deepseek": {"data": "traces/deepseek.jsonl", "written": 3, "left_out": {"wrong answer": 1}},
        "gemini": {"data": "traces/gemini.jsonl", "written": 2, "left_out": {"wrong answer": 1, "no trace": 1}},
    }


def test_openthoughts_has_columns_or_conversations(prepare: Prepare) -> None:
    def conversation(question: str, answer: str, **more: Any) -> dict[str, Any]:
        text = f"<|begin_of_thought|>\n\nwell\n\n<|end_of_thought|>\n\n<|begin_of_solution|>{answer}<|end_of_solution|>"
        turns = [{"from": "user", "value": question}, {"from": "assistant", "value": text}]
        return {"system": "Think long.", "conversations": turns, **more}

    marked: Rows = [conversation("half of 1?", "\\boxed{\\frac{1}{2}}"), conversation("half of 2?", "\\boxed{3}")]
    rows: Rows = [
        {
            "problem": "half of 1?",
            "deepseek_reasoning": "well",
            "deepseek_solution": "\\boxed{\\frac{1}{2}}",
            "ground_truth_solution": "One divided by two, $1/2$, which is $\\boxed{0.5}$.",
            "domain": "math",
        },
        {
            "problem": "Write a program.",
            "deepseek_reasoning": "well",
            "deepseek_solution": "```print()```",
            "ground_truth_solution": None,
            "domain": "code",
        },
    ]
    datasets.Dataset.from_list(rows).to_parquet("metadata.parquet")
    counts = told(
        prepare, "metadata.parquet", "--teacher", "r1=deepseek_reasoning,deepseek_solution", "--out", "columns"
    )
    want = {"question": "half of 1?", "reasoning": "well", "answer": "\\boxed{\\frac{1}{2}}"}
    assert written("r1", "columns") == [
        {**want, "gold": rows[0]["ground_truth_solution"], "source": "metadata.parquet[0]"}
    ]
    assert counts["r1"]["left_out"] == {"no right answer to check by": 1}

    # the conversations come without right answers, so the rows are taken as they are, or not at all
    source = write("marked.jsonl", marked)
    line = mistake(prepare(source, "--teacher", "r1", "--out", "marked"))
    assert "`r1`: nothing to write: 2 no right answer to check by; name the right answer's column with --gold" in line
    told(prepare, source, "--teacher", "r1", "--out", "marked", "--unverified")
    assert written("r1", "marked")[0] == {**want, "source": "marked.jsonl:1"}
    assert len(written("r1", "marked")) == 2
    golden = write("golden.jsonl", [{**row, "right": "0.5"} for row in marked])
    told(prepare, golden, "--teacher", "r1", "--out", "golden", "--gold", "right")
    assert written("r1", "golden") == [{**want, "gold": "0.5", "source": "golden.jsonl:1"}]


def test_areal_has_generations_of_ones_own_teachers(prepare: Prepare) -> None:
    # a text begins inside the chain that the prompt has opened; the first right one is taken
    right = "two and two\n</think>\n\nIt is \\boxed{4}."
    rows: Rows = [
        boba("2+2?", "\\boxed{4}", generations=["cut off at \\boxed{4}", "no</think>\\boxed{5}", right, "4</think>4"]),
        boba("1-2?", "\\boxed{7}", "\\boxed{-1}", generations="<think>\nless\n</think>\n\n\\boxed{-1}"),
        boba("3+3?", "\\boxed{6}", generations=["ah\n</think>\n\n\\boxed{7}", "cut off"]),
        boba("4+4?", "\\boxed{8}", generations=[]),
        boba("5+5?", "\\boxed{10}", generations=["", None]),
        boba("6+6?", "\\boxed{12}", generations=["<think>on and on \\boxed{12}"]),
    ]
    counts = told(prepare, write("boba.jsonl", rows), "--teacher", "qwq=generations", "--out", "traces")
    assert written("qwq") == [
        {
            "question": "2+2?",
            "reasoning": "two and two",
            "answer": "It is \\boxed{4}.",
            "gold": "\\boxed{4}",
            "source": "boba.jsonl:1",
        },
        {
            "question": "1-2?",
            "reasoning": "less",
            "answer": "\\boxed{-1}",
            "gold": "\\boxed{-1}",
            "source": "boba.jsonl:2",
        },
    ]
    assert counts["qwq"]["left_out"] == {
        "not a question, a chain and an answer": 1,
        "no trace": 2,
        "reasoning never ends": 1,
    }


# --- which rows are taken ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("0.5", "\\boxed{\\frac{1}{2}}", True),
        ("\\frac{1}{2}", "The answer is $\\boxed{0.5}$.", True),
        ("3 apples\n#### 3", "There are \\boxed{3}.", True),
        ("$\\boxed{\\sqrt{8}}$", "\\boxed{2\\sqrt{2}}", True),
        ("0.5", "\\boxed{\\frac{1}{3}}", False),
        ("B", "\\boxed{C}", False),
        ("12", "It is 13, for 12 is even.\n\n\\boxed{13}", False),
    ],
)
def test_answers_are_compared_by_value(prepare: Prepare, gold: str, answer: str, right: bool) -> None:
    rows: Rows = [
        {"problem": "this one", "expected": gold, "chain": "hm", "words": answer},
        {"problem": "another", "expected": "1", "chain": "hm", "words": "1"},
    ]
    told(prepare, write("a.jsonl", rows), "--teacher", "a=chain,words", "--gold", "expected", "--out", "traces")
    assert questions("a") == (["this one", "another"] if right else ["another"])


def test_a_question_is_taken_once_with_its_first_right_trace(prepare: Prepare) -> None:
    again = s1k(3, deepseek_thinking_trajectory="D: by heart")
    shouted = {**again, "question": " WHAT is 3 times 3? "}
    source = write("s1k.jsonl", [s1k(2), s1k(3, deepseek="8"), again, shouted, s1k(2)])
    counts = told(prepare, source, *S1K, "--out", "traces")
    assert [(row["source"], row["reasoning"]) for row in written("deepseek")] == [
        ("s1k.jsonl:1", "D: 2 * 2 = 4"),
        ("s1k.jsonl:3", "D: by heart"),
    ]
    assert [row["source"] for row in written("gemini")] == ["s1k.jsonl:1", "s1k.jsonl:2"]
    assert counts["deepseek"]["left_out"] == {"wrong answer": 1, "duplicate": 2}
    assert counts["gemini"]["left_out"] == {"duplicate": 3}


def test_questions_of_the_evaluation_are_left_out(prepare: Prepare) -> None:
    long = "Find the number of ordered pairs of positive integers below one hundred with a sum of 7."
    source = write("s1k.jsonl", [s1k(2), s1k(3), s1k(4), {**s1k(5), "question": f"{long} Then square it."}])
    aime = write("aime.jsonl", [{"problem": "what is 3  times 3?", "answer": "9"}, {"problem": long, "answer": "6"}])
    other = write("boba.jsonl", [boba("What is 4 times 4?", "\\boxed{16}")])
    counts = told(prepare, source, *S1K, "--out", "traces", "--evaluation", aime, "--evaluation", other)
    assert questions("deepseek") == questions("gemini") == ["What is 2 times 2?"]
    assert counts["gemini"]["left_out"] == {"in the evaluation": 3}
    told(prepare, source, *S1K, "--out", "whole", "--evaluation", aime, "--evaluation", other, "--overlap", 0)
    assert questions("gemini", "whole") == ["What is 2 times 2?", f"{long} Then square it."]


def test_the_instruction_of_areal_does_not_make_all_of_its_questions_overlap(prepare: Prepare) -> None:
    rows = [boba(f"{i}+1?", str(i + 1), text=f"a</think>{i + 1}") for i in range(3)]
    held = write("held.jsonl", [boba("0+1?", "1")])
    told(prepare, write("boba.jsonl", rows), "--teacher", "a=text", "--out", "traces", "--evaluation", held)
    assert questions("a") == ["1+1?", "2+1?"]


def test_what_other_columns_think_is_not_this_teachers_chain(prepare: Prepare) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>other</think>4"}]
    rows = [s1k(2, mine="own\n</think>\n4", messages=talk), s1k(3, mine="9", messages=talk)]
    counts = told(prepare, write("s1k.jsonl", rows), "--teacher", "mine=mine", "--out", "traces")
    assert [(row["question"], row["reasoning"]) for row in written("mine")] == [("What is 2 times 2?", "own")]
    assert counts["mine"]["left_out"] == {"not a question, a chain and an answer": 1}


def test_what_is_not_one_chain_and_an_answer_to_one_question_is_left_out(prepare: Prepare) -> None:
    def talk(question: str, text: str, *before: str) -> dict[str, Any]:
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), before, strict=False)]
        last = {"role": "assistant", "content": text}
        return {"messages": [{"role": "system", "content": "s"}, *turns, {"role": "user", "content": question}, last]}

    rows = [
        talk("good", "<think>a</think>1"),
        talk("no chain", "1"),
        talk("empty chain", "<think>\n</think>1"),
        talk("no answer", "<think>a</think>\n"),
        talk("two chains", "<think>a</think>1<think>b</think>1"),
        talk("two turns", "<think>a</think>1", "hello", "hello"),
    ]
    counts = told(prepare, write("a.jsonl", rows), "--teacher", "a", "--unverified", "--out", "traces")
    assert written("a") == [{"question": "good", "reasoning": "a", "answer": "1", "source": "a.jsonl:1"}]
    assert counts["a"]["left_out"] == {"not a question, a chain and an answer": 5}


# --- the draw ----------------------------------------------------------------------------------------------


def test_a_seed_decides_the_draw_and_teachers_share_it(prepare: Prepare) -> None:
    source = write("s1k.jsonl", [s1k(i) for i in range(2, 42)])
    counts = told(prepare, source, *S1K, "--samples", 10, "--out", "a")
    told(prepare, source, *S1K, "--samples", 10, "--seed", 0, "--out", "b")
    told(prepare, source, *S1K, "--samples", 10, "--seed", 1, "--out", "c")
    assert counts["deepseek"]["left_out"] == {"not drawn": 30}
    assert len(questions("deepseek", "a")) == 10
    assert questions("deepseek", "a") == questions("gemini", "a")
    assert Path("a/deepseek.jsonl").read_bytes() == Path("b/deepseek.jsonl").read_bytes()
    assert questions("deepseek", "a") != questions("deepseek", "c")
    lines = [int(row["source"].partition(":")[2]) for row in written("deepseek", "a")]
    assert lines == sorted(lines)  # the corpus's own order


def test_other_rows_and_other_corpora_draw_the_same_questions(prepare: Prepare) -> None:
    rows = [s1k(i) for i in range(2, 42)]
    other = [boba(row["question"], row["solution"], text=f"x</think>{row['solution']}") for row in rows]
    told(prepare, write("s1k.jsonl", rows), *S1K, "--samples", 10, "--out", "a")
    told(prepare, write("other.jsonl", other[::-1]), "--teacher", "own=text", "--samples", 10, "--out", "b")
    assert set(questions("own", "b")) == set(questions("deepseek", "a"))


def test_a_wrong_trace_is_replaced_by_the_next_in_the_draw(prepare: Prepare) -> None:
    rows = [s1k(i) for i in range(2, 42)]
    told(prepare, write("right.jsonl", rows), *S1K, "--samples", 10, "--out", "a")
    lost = written("deepseek", "a")[0]["question"]
    rows = [{**row, "deepseek_attempt": "0"} if row["question"] == lost else row for row in rows]
    counts = told(prepare, write("one_wrong.jsonl", rows), *S1K, "--samples", 10, "--out", "b")
    assert set(questions("gemini", "b")) == set(questions("gemini", "a"))
    assert len(set(questions("deepseek", "b")) - set(questions("deepseek", "a"))) == 1
    assert counts["deepseek"]["left_out"] == {"wrong answer": 1, "not drawn": 29}


def test_common_takes_what_every_teacher_has_right(prepare: Prepare) -> None:
    rows = [s1k(i, deepseek="0" if i % 2 else None, gemini="0" if i % 3 == 0 else None) for i in range(2, 32)]
    source = write("s1k.jsonl", rows)
    counts = told(prepare, source, *S1K, "--common", "--out", "all")
    both = [f"What is {i} times {i}?" for i in range(2, 32) if i % 2 == 0 and i % 3]
    assert questions("deepseek", "all") == questions("gemini", "all") == both
    assert counts["deepseek"]["left_out"] == {"wrong answer": 15, "not right by every teacher": 5}
    told(prepare, source, *S1K, "--common", "--samples", 4, "--out", "four")
    assert questions("deepseek", "four") == questions("gemini", "four")
    assert len(questions("deepseek", "four")) == 4
    assert set(questions("deepseek", "four")) < set(both)


# --- what is written ---------------------------------------------------------------------------------------


def test_a_run_reads_the_files_as_they_are(prepare: Prepare, tmp_path: Path) -> None:
    source = write("s1k.jsonl", [s1k(i, deepseek="0" if i == 7 else None) for i in range(2, 22)])
    status, out, _ = prepare(source, *S1K, "--samples", 12, "--out", "traces")
    assert status == 0
    # the line that it ends with is a config's
    listed = "teachers: [{name: deepseek, data: traces/deepseek.jsonl}, {name: gemini, data: traces/gemini.jsonl}]"
    assert listed in out
    tree = {
        "student": str(demo_path("student")),
        "teachers": [
            {"name": n, "data": str(tmp_path / "traces" / f"{n}.jsonl"), "verified_only": True}
            for n in ("deepseek", "gemini")
        ],
        "eval": {"holdout": 0.25},
    }
    data = load_data(parse_config(tree, "test"), load_tokenizer(demo_path("student")))
    for teacher in data.record.teachers:
        assert (teacher.rows, teacher.used + teacher.held_out, teacher.left_out) == (12, 12, {})
        assert teacher.without_reasoning == 0
    first = written("gemini")[0]
    trace = read_trace(first, "first")
    assert isinstance(trace, Trace)
    assert trace.completion == think(first["reasoning"], first["answer"])
    assert trace.gold == first["gold"]


def test_the_table_says_what_became_of_the_rows(prepare: Prepare) -> None:
    source = write("s1k.jsonl", [s1k(2), s1k(3), s1k(3), s1k(4, deepseek="1")])
    status, out, err = prepare(source, *S1K, "--out", "traces")
    assert (status, err) == (0, "")
    table = [line.split() for line in out.splitlines()]
    assert ["deepseek", "4", "2", "1", "duplicate"] in table
    assert ["1", "wrong", "answer"] in table
    assert ["gemini", "4", "3", "1", "duplicate"] in table
    assert any(line[:2] == ["check", "traces"] for line in table)


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.jsonl", "--teacher", "a=x"), "nowhere.jsonl: no such file"),
        (("s1k.jsonl", "--teacher", "a=x"), "s1k.jsonl: has no column `x`; it has question, solution, cot_type"),
        (("s1k.jsonl", "--teacher", "a=x,y,z"), "--teacher a=x,y,z: write NAME=REASONING,ANSWER"),
        (("s1k.jsonl", "--teacher", "a=cot,"), "--teacher a=cot,: write NAME=REASONING,ANSWER"),
        (("s1k.jsonl", "--teacher", "a/b=cot"), "`a/b` also names a folder: use letters"),
        (("s1k.jsonl", *S1K, *S1K), "teacher listed twice: deepseek, gemini"),
        (("s1k.jsonl",), "--teacher"),
        (("s1k.jsonl", *S1K, "--samples", "0"), "--samples"),
        (("s1k.jsonl", *S1K, "--gold", "right"), "has no column `right`"),
        (("s1k.jsonl", *S1K, "--evaluation", "none.jsonl"), "none.jsonl: no such file"),
        (("s1k.jsonl", *S1K, "--evaluation", "odd.jsonl"), "odd.jsonl:1: needs `question`"),
        (("s1k.jsonl", *S1K, "--split", "test"), "a file has no `split` or `subset`"),
        (("s1k.jsonl", "--teacher", "a"), "several columns could be the answer: `deepseek_attempt`, `gemini_attempt`"),
        (("tokens.jsonl", "--teacher", "a"), "tokens.jsonl:1: holds tokens"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(prepare: Prepare, arguments: list[str], words: str) -> None:
    write("s1k.jsonl", [s1k(2), s1k(3)])
    write("odd.jsonl", [{"a": "b"}])
    write("tokens.jsonl", [{"input_ids": [1, 2], "labels": [-100, 2]}])
    assert words in refused(prepare(*arguments, "--out", "traces"))
    assert not Path("traces").exists()


def test_a_teacher_of_whom_nothing_is_left_is_a_mistake(prepare: Prepare) -> None:
    source = write("s1k.jsonl", [s1k(2, gemini="5"), s1k(3, gemini_thinking_trajectory=None)])
    assert mistake(prepare(source, *S1K, "--out", "traces")) == (
        "teacher `gemini`: nothing to write: 1 wrong answer, 1 no trace\n"
    )
    assert not Path("traces").exists()  # nor is the other teacher's file


def test_what_is_there_is_never_overwritten(prepare: Prepare) -> None:
    source = write("s1k.jsonl", [s1k(2)])
    told(prepare, source, *S1K[:2], "--out", "traces")
    before = Path("traces/deepseek.jsonl").read_bytes()
    line = refused(prepare(source, *S1K, "--out", "traces"))
    assert "traces/deepseek.jsonl: exists; name another folder" in line
    assert [f.name for f in Path("traces").iterdir()] == ["deepseek.jsonl"]
    assert Path("traces/deepseek.jsonl").read_bytes() == before
    told(prepare, source, *S1K[2:], "--out", "traces")  # another teacher's file may stand beside it
    assert "s1k.jsonl: is a file; --out is a folder" in refused(prepare(source, *S1K, "--out", source))
