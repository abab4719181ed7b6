"""Turn a public reasoning corpus into teacher files: verified, without duplicates and evaluation questions, sampled.

    python recipes/prepare_teachers.py simplescaling/s1K-1.1 --samples 200 --evaluation aime.jsonl --out traces \\
        --teacher deepseek=deepseek_thinking_trajectory,deepseek_attempt \\
        --teacher gemini=gemini_thinking_trajectory,gemini_attempt

Writes OUT/TEACHER.jsonl, rows of {"question", "reasoning", "answer", "gold", "source"}, which a config reads as they
are: teachers: [{name: deepseek, data: traces/deepseek.jsonl}, ...].

A question is taken once, with a teacher's first right trace; where a column holds a list, that is any of its texts.
Questions are drawn by a hash, so that all teachers and corpora that share them draw the same ones.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mot_lora.cli.app import USAGE_ERROR
from mot_lora.cli.options import Json, print_json
from mot_lora.config import Config, EvalConfig, TeacherConfig
from mot_lora.data.column_names import GOLD, MESSAGES, QUESTION, REASONING
from mot_lora.data.overlap import Overlap, normalized
from mot_lora.data.reasoning import THINK_END, chain_of
from mot_lora.data.rows import Row, read_rows
from mot_lora.data.scoring import is_right
from mot_lora.data.select import ENDLESS, NOT_DRAWN, SEEN, TWICE, WRONG, draw
from mot_lora.data.traces import Example, Trace, read_question, read_trace
from mot_lora.durable import write_text
from mot_lora.errors import UserError
from mot_lora.progress import Progress, silent
from mot_lora.reader import parse_config
from mot_lora.reports.display import live, screen

# Why a row is left out, beside the reasons that a run has.
ABSENT = "no trace"
UNFIT = "not a question, a chain and an answer"
UNKNOWN = "no right answer to check by"
NOT_ALL = "not right by every teacher"

RIGHT = (*GOLD, "solutions", "ground_truth_solution")  # the last two are those of AReaL-boba and OpenThoughts
# AReaL's questions carry another model's template, and an instruction that would make all of them overlap
WRAPPING = re.compile(
    r"<｜(?:begin▁of▁sentence|User|Assistant)｜>|<think>\s*$"
    r"|Please reason step by step, and put your final answer within \\boxed\{\}\.?(?=\s*(?:<｜Assistant｜>|$))"
)

Written = dict[str, str]


# ------------------------------------------------------------------------------------ a row as traces


def texts(value: Any) -> list[str]:
    """The texts of a cell that holds one or several; an empty text is none."""
    values = value if isinstance(value, list) else [value]
    return [str(v) for v in values if isinstance(v, str | int | float) and str(v).strip()]


def roles(row: dict[str, Any], taken: Sequence[str] = ()) -> dict[str, str]:
    """Which columns are the question and the right answer, the first of those that are usually called so."""
    filled = {str(name).strip().lower(): name for name, value in row.items() if value and name not in taken}
    found = {
        role: next((filled[n] for n in names if n in filled), None)
        for role, names in (("question", QUESTION), ("gold", RIGHT))
    }
    return {role: name for role, name in found.items() if name}


def read(row: dict[str, Any], where: str, teacher: TeacherConfig) -> list[Trace]:
    """A teacher's traces of a row: one for each text and each right answer; none where its columns are empty."""
    own = [column for role, column in teacher.columns.items() if role in ("reasoning", "answer")]
    if any(not texts(row.get(column)) for column in own):
        return []
    columns = {**roles(row, own), **teacher.columns}
    if own:  # what other teachers thought is not this one's
        others = (*REASONING, *MESSAGES)
        row = {k: v for k, v in row.items() if k in columns.values() or str(k).strip().lower() not in others}
    several = [c for c in (columns.get("answer"), columns.get("gold")) if c and texts(row.get(c))]
    traces: list[Trace] = []
    for values in product(*(texts(row[column]) for column in several)):
        trace = read_trace({**row, **dict(zip(several, values, strict=True))}, where, columns)
        if isinstance(trace, Example):
            raise UserError(f"{where}: holds tokens, which a config reads as they are; there is nothing to prepare")
        traces.append(trace)
    return traces


def unwrapped(question: str) -> str:
    """The question alone."""
    return WRAPPING.sub("", question).strip()


def judge(trace: Trace, where: str, verified: bool) -> Written | str:
    """A trace as it is written, or the reason why it is left out."""
    chain, answer = chain_of(trace.completion), trace.completion.partition(THINK_END)[2].strip()
    if chain is None:
        return ENDLESS
    turns = [m for m in trace.prompt if m["role"] != "system"]
    if not chain or not answer or THINK_END in answer or len(turns) != 1:
        return UNFIT
    if verified and trace.gold is None:
        return UNKNOWN
    if verified and not is_right(trace.completion, trace.gold or ""):
        return WRONG
    gold = {"gold": trace.gold} if trace.gold is not None else {}
    return {"question": unwrapped(trace.question), "reasoning": chain, "answer": answer, **gold, "source": where}


# -------------------------------------------------------------------------------- which rows are taken


def first_right(row: Row, teacher: TeacherConfig) -> Written | str:
    """The first of a row's traces that can be used, or why the last of them cannot."""
    outcome: Written | str = ABSENT
    for trace in read(row[1], row[0], teacher):
        outcome = judge(trace, row[0], teacher.verified_only)
        if not isinstance(outcome, str):
            break
    return outcome


def by_question(rows: Sequence[Row], teachers: Sequence[TeacherConfig]) -> dict[str, list[int]]:
    """The rows of each question that any teacher has a trace of."""
    groups: dict[str, list[int]] = {}
    for i, (where, row) in enumerate(rows):
        trace = next((trace for teacher in teachers for trace in read(row, where, teacher)), None)
        if trace:
            groups.setdefault(normalized(unwrapped(trace.question)), []).append(i)
    return groups


def choose(
    rows: Sequence[Row], config: Config, overlap: Overlap, common: bool, progress: Progress = silent
) -> tuple[dict[str, list[Written]], dict[str, Counter[str]]]:
    """By teacher, the rows to write, in their order, and how many others are left out, by reason."""
    teachers = config.teachers
    groups = by_question(rows, teachers)
    order = [*groups]
    samples = teachers[0].samples or len(order)
    if teachers[0].samples:
        asked = [Trace(({"role": "user", "content": question},), "") for question in order]
        order = [order[i] for i in draw(asked, config.seed)]
    chosen: dict[str, dict[int, Written]] = {t.name: {} for t in teachers}
    absent = len(rows) - sum(map(len, groups.values()))
    left_out = {t.name: Counter({ABSENT: absent} if absent else {}) for t in teachers}
    for done, question in enumerate(order):
        wanted = [t for t in teachers if len(chosen[t.name]) < samples]
        if not wanted:
            break
        progress("check traces", done, len(order), ", ".join(f"{name} {len(c)}" for name, c in chosen.items()))
        found: dict[str, tuple[int, Written]] = {}
        seen = question in overlap
        for teacher, i in product(wanted, groups[question]):
            if seen:
                outcome = SEEN
            elif teacher.name in found:
                outcome = TWICE
            else:
                outcome = first_right(rows[i], teacher)
            if isinstance(outcome, str):
                left_out[teacher.name][outcome] += 1
            else:
                found[teacher.name] = i, outcome
        for name, (i, written) in found.items():
            if common and len(found) < len(teachers):
                left_out[name][NOT_ALL] += 1
            else:
                chosen[name][i] = written
    progress("check traces", len(order), len(order))
    for name, kept in chosen.items():
        if rest := len(rows) - len(kept) - left_out[name].total():
            left_out[name][NOT_DRAWN] = rest
    return {name: [kept[i] for i in sorted(kept)] for name, kept in chosen.items()}, left_out


# ------------------------------------------------------------------------------------------- the command


def teacher_columns(given: str) -> tuple[str, dict[str, str]]:
    """NAME=REASONING,ANSWER or NAME=ANSWER or NAME: whose traces these are, and the columns that they lie in."""
    name, _, rest = given.partition("=")
    columns = [c.strip() for c in rest.split(",")] if rest else []
    if len(columns) > 2 or not all(columns):
        raise UserError(f"--teacher {given}: write NAME=REASONING,ANSWER, or NAME=ANSWER for a column with both")
    return name.strip(), dict(zip(("reasoning", "answer")[-len(columns) :], columns, strict=True)) if columns else {}


def read_overlap(sources: Sequence[str], n: int) -> Overlap:
    questions = [read_question(row, where, roles(row)) for source in sources for where, row in read_rows(source)]
    return Overlap((unwrapped(q.question) for q in questions), n)


def result_table(rows: int, chosen: dict[str, list[Written]], left_out: dict[str, Counter[str]]) -> Table:
    out = Table(title=f"traces by teacher, of {rows:,} rows", box=SIMPLE_HEAD, padding=(0, 1), min_width=50)
    for i, name in enumerate(("teacher", "rows", "written", "left out")):
        out.add_column(name, justify="right" if i in (1, 2) else "left", no_wrap=True)
    for name, written in chosen.items():
        reasons = "\n".join(f"{count:,} {why}" for why, count in left_out[name].items())
        out.add_row(name, f"{rows:,}", f"{len(written):,}", reasons or "-")
    return out


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(
    epilog="Example: prepare_teachers.py open-thoughts/OpenThoughts-114k --subset metadata --split 'train[:20000]' "
    "--teacher r1=deepseek_reasoning,deepseek_solution --samples 1000 --out traces"
)
def prepare(
    source: Annotated[str, typer.Argument(help="a file, a folder or a Hub dataset, as `data` of a config")],
    teacher: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=REASONING,ANSWER",
            help="a teacher and its columns, as often as there are teachers; NAME=ANSWER where the chain is in the "
            "answer's text, or in a list of such texts; NAME where the columns are called as a config knows them",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the folder to write NAME.jsonl to; none of them may exist")],
    evaluation: Annotated[
        list[str] | None, typer.Option(help="questions that no trace may be about; may be given several times")
    ] = None,
    overlap: Annotated[
        int, typer.Option(min=0, help="words in a row that make a question one of those; 0 compares whole questions")
    ] = EvalConfig().overlap,
    samples: Annotated[
        int | None, typer.Option(min=1, help="traces a teacher; all that are right unless given")
    ] = None,
    seed: Annotated[int, typer.Option(help="which ones are drawn")] = 0,
    common: Annotated[
        bool, typer.Option("--common", help="only questions that every teacher has answered right")
    ] = False,
    unverified: Annotated[bool, typer.Option("--unverified", help="take answers as they are, right or wrong")] = False,
    split: Annotated[str | None, typer.Option(help="of a dataset, e.g. train[:1000]")] = None,
    subset: Annotated[str | None, typer.Option(help="of a dataset, e.g. metadata")] = None,
    question: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="the question, where its name is unusual")
    ] = None,
    gold: Annotated[str | None, typer.Option(metavar="COLUMN", help="the right answer, likewise")] = None,
    as_json: Json = False,
) -> None:
    """Write one JSONL of verified traces for each teacher of a corpus."""
    shared = {role: column for role, column in (("question", question), ("gold", gold)) if column}
    settings = {"data": source, "samples": samples, "verified_only": not unverified}
    teachers = [{"name": n, "columns": {**shared, **c}, **settings} for n, c in map(teacher_columns, teacher)]
    config = parse_config({"student": "any", "teachers": teachers, "seed": seed}, "--teacher")
    files = {t.name: out / f"{t.name}.jsonl" for t in config.teachers}
    if there := next((file for file in files.values() if file.exists()), None):
        raise UserError(f"{there}: exists; name another folder, nothing is overwritten")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out is a folder")
    asked = read_overlap(evaluation or [], overlap)
    rows = read_rows(source, split, subset)
    for column in (column for t in config.teachers for column in t.columns.values()):
        if not any(column in row for _, row in rows):
            has = ", ".join(dict.fromkeys(str(name) for _, row in rows for name in row))
            raise UserError(f"{source}: has no column `{column}`; it has {has}")
    console = screen(as_json)
    with live(console) as progress:
        chosen, left_out = choose(rows, config, asked, common, progress)
    for name, written in chosen.items():
        if not written:
            reasons = ", ".join(f"{count} {why}" for why, count in left_out[name].items())
            hint = "; name the right answer's column with --gold" if left_out[name][UNKNOWN] else ""
            raise UserError(f"teacher `{name}`: nothing to write: {reasons}{hint}")
    for name, written in chosen.items():
        write_text(files[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    if as_json:
        print_json(
            {
                "rows": len(rows),
                "teachers": {
                    name: {"data": str(files[name]), "written": len(written), "left_out": dict(left_out[name])}
                    for name, written in chosen.items()
                },
            }
        )
        return
    console.print(result_table(len(rows), chosen, left_out))
    listed = ", ".join(f"{{name: {name}, data: {file}}}" for name, file in files.items())
    console.print(f"teachers: [{listed}]", soft_wrap=True, highlight=False, markup=False)


def _told(status: int, line: str) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return status


def main() -> None:
    """Run the command; a mistake of the user's ends with exit status 2 and one line."""
    try:
        app(standalone_mode=False)
    except UserError as e:
        sys.exit(_told(2, f"error: {e}"))
    except USAGE_ERROR as e:
        sys.exit(_told(2, f"error: {e.format_message()}; see --help"))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_told(130, "stopped; nothing half-written is left"))


if __name__ == "__main__":
    main()
