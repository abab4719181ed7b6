"""Build the demo that ships inside mot_lora: a tiny Qwen3 student, four teachers, three exams.

    python recipes/build_demo.py                 # everything; 57 minutes on one thread of a busy machine
    python recipes/build_demo.py --only data     # only the teachers' traces and the exams
    python recipes/build_demo.py --resume        # go on from the last checkpoint

The subject is word problems: somebody has some things, 1 to 6 events change how many. The student
is trained from nothing on arithmetic and on SHORT problems (1 to 3 events), answered in many
layouts. Long problems (4 to 6 events) it meets late, and most of those with 5 or 6 stop after three.
So it can do the long ones and still stops early, and going on to the end is what the careful
teachers, who differ in wording, layout and order, have in common to teach.

On busy cores set GOMP_SPINCOUNT=0, or the threads burn their time waiting for each other.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DEMO = Path(__file__).resolve().parent.parent / "mot_lora" / "demo"

# ----------------------------------------------------------------------------------------------
# Problems

SHE = ["Mia", "Anna", "Lily", "Emma", "Sara", "Nora", "Ruth", "Zoe", "Ella", "Iris", "Maya", "Jane"]
HE = ["Tom", "Ben", "Sam", "Leo", "Max", "Paul", "Finn", "Omar", "Noah", "Jack", "Hugo", "Ivan"]
FOOD = [
    "apples",
    "plums",
    "pears",
    "cookies",
    "grapes",
    "nuts",
    "figs",
    "candies",
    "berries",
    "peaches",
]
THINGS = [
    "books",
    "coins",
    "stamps",
    "cards",
    "marbles",
    "pens",
    "shells",
    "stickers",
    "beads",
    "stones",
    "toys",
    "ribbons",
]

GAINS = [
    "{P} buys {n} more",
    "{P} finds {n} more",
    "{P} gets {n} from {X}",
    "{X} gives {o} {n}",
    "{P} picks up {n}",
    "{P} wins {n}",
]
LOSSES = [
    "{P} gives {n} to {X}",
    "{P} sells {n}",
    "{P} loses {n}",
    "{P} throws away {n}",
    "{X} takes {n}",
    "{P} eats {n}",
]
OPENINGS = ["{N} has {s} {t}.", "{N} starts with {s} {t}.", "At first {N} has {s} {t}."]
ASKS = [
    "How many {t} does {N} have now?",
    "How many {t} does {N} have at the end?",
    "How many {t} are left?",
]


@dataclass(frozen=True)
class Problem:
    question: str
    name: str
    thing: str
    start: int
    events: tuple[tuple[int, str], ...]  # signed change, and the clause that tells it

    @property
    def answer(self) -> int:
        return self.start + sum(change for change, _ in self.events)


def make_problem(rng: random.Random, n_events: int) -> Problem:
    """A problem whose running total stays within 0..99, and within 150 in any order of events."""
    while True:
        start = rng.randint(3, 60)
        changes = [rng.randint(1, 20) * rng.choice((1, -1)) for _ in range(n_events)]
        totals = [start + sum(changes[:i]) for i in range(n_events + 1)]
        gains = sum(change for change in changes if change > 0)
        if min(totals) >= 0 and max(totals) <= 99 and start + gains <= 150:
            break
    name = rng.choice(SHE + HE)
    subject, object_ = ("She", "her") if name in SHE else ("He", "him")
    thing = rng.choice(FOOD + THINGS)
    others = [other for other in SHE + HE if other != name]
    events = []
    for change in changes:
        clauses = GAINS if change > 0 else LOSSES if thing in FOOD else LOSSES[:-1]
        clause = rng.choice(clauses).format(P=subject, o=object_, n=abs(change), X=rng.choice(others))
        events.append((change, clause))
    opening = rng.choice(OPENINGS).format(N=name, s=start, t=thing)
    ask = rng.choice(ASKS).format(N=name, t=thing)
    question = " ".join([opening, *(f"{clause}." for _, clause in events), ask])
    return Problem(question, name, thing, start, tuple(events))


# ----------------------------------------------------------------------------------------------
# Layouts: ways to write the reasoning down. Each takes the steps to write, as (before, change,
# clause, after), so that a caller can reorder, drop or spoil them. `vary` loosens the wording for
# pretraining; without it the layout is a teacher's, always the same.

Step = tuple[int, int, str, int]
Layout = Callable[[Problem, list[Step], random.Random | None], str]


def run_events(start: int, events: Iterable[tuple[int, str]]) -> list[Step]:
    steps = []
    for change, clause in events:
        steps.append((start, change, clause, start + change))
        start += change
    return steps


def equation(step: Step) -> str:
    before, change, _, after = step
    return f"{before} {'+' if change > 0 else '-'} {abs(change)} = {after}"


def pick(vary: random.Random | None, *options: str) -> str:
    return vary.choice(options) if vary else options[0]


def steps_layout(problem: Problem, steps: list[Step], vary: random.Random | None = None) -> str:
    """Plain short equations, one a line."""
    head = pick(vary, "", "", f"Start: {problem.start}\n")
    tail = pick(vary, "", "", f"\nTotal: {steps[-1][3]}")
    return head + pick(vary, "\n", "\n", ", ", "; ").join(map(equation, steps)) + tail


def story_layout(problem: Problem, steps: list[Step], vary: random.Random | None = None) -> str:
    """Wordy: narrates every event, restates the total, and looks back at the end."""
    name, thing = problem.name, problem.thing
    verb = pick(vary, "starts with", "has")
    joint = pick(vary, ":", ":", ", and", ", so")
    restate = pick(vary, ", now there are {}.", ", now there are {}.", ". Now {}.", ".")
    lines = [f"{name} {verb} {problem.start} {thing}."]
    lines += [f"{step[2]}{joint} {equation(step)}{restate.format(step[3])}" for step in steps]
    check = f"Check: {equation(steps[-1])}, and {name} has {steps[-1][3]} {thing}."
    lines.append(pick(vary, check, check, f"{name} has {steps[-1][3]} {thing}.", ""))
    return " ".join(line for line in lines if line)


def gains_first_layout(problem: Problem, steps: list[Step], vary: random.Random | None = None) -> str:
    """Another order: every gain, then every loss. The steps given are reordered here."""
    events = [(change, clause) for _, change, clause, _ in steps]
    ordered = run_events(problem.start, sorted(events, key=lambda event: event[0] < 0))
    gains = [equation(step) for step in ordered if step[1] > 0]
    losses = [equation(step) for step in ordered if step[1] < 0]
    up, down = pick(vary, "Gains|Losses", "Gains|Losses", "Up|Down").split("|")
    sep = pick(vary, "; ", "; ", ", ")
    text = f"{up}: {sep.join(gains) or 'none'}\n{down}: {sep.join(losses) or 'none'}"
    return text + pick(vary, f"\nResult: {ordered[-1][3]}", f"\nResult: {ordered[-1][3]}", "")


def hasty_layout(problem: Problem, steps: list[Step], vary: random.Random | None = None) -> str:
    """Jotted down: signed changes and running totals, no equations."""
    joint = pick(vary, " is ", " is ", " makes ")
    parts = [f"{'+' if s[1] > 0 else '-'} {abs(s[1])}{joint}{s[3]}" for s in steps]
    return f"Have {problem.start}, " + ", ".join(parts) + pick(vary, ", done", ", done", "")


def no_layout(_problem: Problem, _steps: list[Step], _vary: random.Random | None = None) -> str:
    """A direct answer: the thought stays empty."""
    return ""


# ----------------------------------------------------------------------------------------------
# Teachers and exams


def spoil(problem: Problem, rng: random.Random) -> list[Step]:
    """One wrong step, carried on to a wrong final answer."""
    wrong = rng.randrange(len(problem.events))
    steps: list[Step] = []
    total = problem.start
    for i, (change, clause) in enumerate(problem.events):
        after = total + change
        if i == wrong:
            after += rng.choice([d for d in (-10, -2, -1, 1, 2, 10) if after + d >= 0])
        steps.append((total, change, clause, after))
        total = after
    if min(step[3] for step in steps) < 0 or max(step[3] for step in steps) > 150:
        return spoil(problem, rng)
    return steps


def check_trace(problem: Problem, reasoning: str) -> None:
    """Read the trace back without the code that wrote it: all equations true, all events used."""
    found = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", reasoning.split("Check:")[0])
    rows = [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]
    if not all((a + b if sign == "+" else a - b) == c for a, sign, b, c in rows):
        raise AssertionError(f"a false equation in: {reasoning}")
    if rows[0][0] != problem.start or any(x[3] != y[0] for x, y in pairwise(rows)):
        raise AssertionError(f"a broken chain in: {reasoning}")
    numbers = [int(n) for n in re.findall(r"\d+", problem.question)][1:]
    if sorted(row[2] for row in rows) != sorted(numbers) or rows[-1][3] != problem.answer:
        raise AssertionError(f"an event or the result is missing in: {reasoning}")


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_data(seed: int, write: bool = True) -> frozenset[str]:
    """Write teachers and exams; return every question pretraining must not see."""
    rng = random.Random(f"{seed}-data")
    pool: dict[str, Problem] = {}
    while len(pool) < 240 + 200 + 400:
        problem = make_problem(rng, 4 + len(pool) % 3)
        pool.setdefault(problem.question, problem)
    problems = list(pool.values())
    train, dev, heldout = problems[:240], problems[240:440], problems[440:]
    if not write:
        return frozenset(pool)

    def row(problem: Problem, reasoning: str, answer: int) -> dict[str, str]:
        return {"question": problem.question, "reasoning": reasoning, "answer": str(answer)}

    careful = {"steps": steps_layout, "story": story_layout, "gains_first": gains_first_layout}
    for name, layout in careful.items():
        rows = []
        for problem in train:
            reasoning = layout(problem, run_events(problem.start, problem.events), None)
            check_trace(problem, reasoning)
            rows.append(row(problem, reasoning, problem.answer))
        write_jsonl(DEMO / "teachers" / f"{name}.jsonl", rows)

    spoiled = set(rng.sample(range(len(train)), len(train) // 3))
    rows = []
    for i, problem in enumerate(train):
        right = run_events(problem.start, problem.events)
        steps = spoil(problem, rng) if i in spoiled else right
        assert (steps[-1][3] == problem.answer) == (i not in spoiled)
        rows.append(row(problem, hasty_layout(problem, steps), steps[-1][3]))
    write_jsonl(DEMO / "teachers" / "hasty.jsonl", rows)

    for name, exam in (("dev", dev), ("heldout", heldout)):
        assert not {p.question for p in exam} & {p.question for p in train}
        write_jsonl(
            DEMO / f"{name}.jsonl",
            ({"question": p.question, "answer": str(p.answer)} for p in exam),
        )
    # what the student can do before: problems as short as those that it learned from
    own = random.Random(f"{seed}-short")
    short = [make_problem(own, 1 + i % 3) for i in range(100)]
    write_jsonl(DEMO / "short.jsonl", ({"question": p.question, "answer": str(p.answer)} for p in short))
    return frozenset(pool)


# ----------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, lossless for any text, whole numbers in one token

TURN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def prompt_text(question: str) -> str:
    return f"{TURN}user\n{question}{END}\n{TURN}assistant\n"


def completion_text(reasoning: str, answer: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{answer}{END}"


def build_tokenizer(seed: int, student: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[0-9]+| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"{seed}-tokenizer")
    # Every number often enough that no word is merged before it.
    text = [f"{n} {n}\n" for n in range(200) for _ in range(400)]
    text += ["user\n", "assistant\n", "system\n", "\n\n"] * 2000
    for _ in range(6000):
        problem = make_problem(rng, rng.randint(1, 3))
        text += [problem.question, draw_reasoning(problem, rng)]
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    # Added but not special, as in Qwen3: they stay when special tokens are skipped.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(student)
    for n in range(200):
        assert len(fast.encode(f"{n}")) == len(fast.encode(f" {n}")) == 1, n
    strange = "Zoë paid 1234567 \t\n  for x_y — 漢字 🎈<think>"
    assert fast.decode(fast.encode(strange)) == strange


# ----------------------------------------------------------------------------------------------
# Pretraining corpus, made on the fly

LAYOUTS: dict[str, Layout] = {
    "steps": steps_layout,
    "story": story_layout,
    "gains_first": gains_first_layout,
    "hasty": hasty_layout,
    "none": no_layout,
}


def draw_reasoning(problem: Problem, rng: random.Random, steps: list[Step] | None = None) -> str:
    layout = rng.choices(list(LAYOUTS.values()), weights=(30, 28, 22, 15, 5))[0]
    return layout(problem, steps or run_events(problem.start, problem.events), rng)


def draw_facts(rng: random.Random) -> str:
    facts = []
    for _ in range(rng.randint(4, 10)):
        a, b = rng.randint(0, rng.choice((100, 150))), rng.randint(1, 20)
        change = b if a < b or (rng.random() < 0.5 and a + b <= 150) else -b
        facts.append(equation((a, change, "", a + change)))
    return rng.choice(("\n", "\n", ", ", "; ", ". ")).join(facts)


@dataclass(frozen=True)
class Mixture:
    """What share of the documents is what, and how long problems are answered."""

    facts: tuple[float, float]  # share at the start and at the end; the rest are problems
    long: tuple[float, float]  # share of 4 to 6 events among problems, likewise
    complete: dict[int, float]  # number of events: share of long answers that use them all
    stops: tuple[int, ...] = (3,)  # the others stop after so many events
    overlook: float = 0.0  # or, this share of them, leave one event out


def draw_problem(rng: random.Random, mixture: Mixture, long: float, reserved: frozenset[str]) -> tuple[str, str]:
    n_events = rng.randint(4, 6) if rng.random() < long else rng.choice((1, 2, 2, 3, 3, 3))
    problem = make_problem(rng, n_events)
    while problem.question in reserved:
        problem = make_problem(rng, n_events)
    events = list(problem.events)
    if n_events >= 4 and rng.random() > mixture.complete[n_events]:
        if rng.random() < 1 - mixture.overlook:
            events = events[: rng.choice(mixture.stops) if n_events > 4 else 3]
        else:
            events.pop(rng.randrange(len(events)))
            if min(s[3] for s in run_events(problem.start, events)) < 0:
                events = events[:3]
    steps = run_events(problem.start, events)
    reasoning = draw_reasoning(problem, rng, steps)
    return prompt_text(problem.question), completion_text(reasoning, str(steps[-1][3]))


Batch = tuple[torch.Tensor, torch.Tensor]


def draw_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    mixture: Mixture,
    progress: float,
    reserved: frozenset[str],
    rows: int,
    width: int,
) -> Batch:
    """Packed rows. Loss falls on answers and on what follows an equals sign in facts: the rest is
    drawn at random, and asking for it would only drown the signal.
    """
    equals = tokenizer.convert_tokens_to_ids("\u0120=")  # " =" in byte-level spelling
    share = [start + (end - start) * progress for start, end in (mixture.facts, mixture.long)]
    ids, labels = [], []
    while len(ids) < rows:
        row: list[int] = []
        targets: list[int] = []
        while len(row) <= width:
            if rng.random() < share[0]:
                tokens = tokenizer.encode(draw_facts(rng) + PAD)
                row += tokens
                before = [-1, *tokens[:-1]]
                targets += [t if b == equals else -100 for t, b in zip(tokens, before, strict=True)]
            else:
                prompt, completion = draw_problem(rng, mixture, share[1], reserved)
                prompt_ids, tokens = tokenizer.encode(prompt), tokenizer.encode(completion)
                row += prompt_ids + tokens
                targets += [-100] * len(prompt_ids) + tokens
        ids.append(row[:width])
        labels.append(targets[1 : width + 1])
    return torch.tensor(ids), torch.tensor(labels)


# ----------------------------------------------------------------------------------------------
# Training: hold the rate on short problems, let it decay while long ones appear, then a little more
# of the long ones at a low rate, which sets how many of them the student gets right

HOLD = Mixture(facts=(0.6, 0.2), long=(0.0, 0.0), complete={})
DECAY = Mixture(
    facts=(0.2, 0.15),
    long=(0.0, 0.15),
    complete={4: 0.45, 5: 0.2, 6: 0.1},
    stops=(3, 3, 3, 4),
    overlook=0.15,
)
FINISH = Mixture(facts=(0.15, 0.1), long=(0.5, 0.5), complete={4: 0.55, 5: 0.4, 6: 0.35})


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train(args: argparse.Namespace, reserved: frozenset[str]) -> Qwen3ForCausalLM:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    torch.manual_seed(args.seed)
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    last, first = args.work / "last.pt", 0
    total = args.hold + args.decay + args.finish
    if args.resume and last.exists():
        state = torch.load(last)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, seen = time.monotonic(), 0
    for step in range(first, total):
        if step < args.hold:
            mixture, progress = HOLD, step / args.hold
            rate = min(1.0, (step + 1) / 100)
        elif step < args.hold + args.decay:
            mixture, progress = DECAY, (step - args.hold) / args.decay
            rate = 1.0 - 0.98 * progress
        else:
            mixture, progress = FINISH, (step - args.hold - args.decay) / args.finish
            rate = 0.3 * (1.0 - 0.98 * progress)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        rng = random.Random(f"{args.seed}-step-{step}")  # so that resuming changes nothing
        ids, labels = draw_batch(tokenizer, rng, mixture, progress, reserved, args.rows, args.width)
        with torch.autocast("cpu", torch.bfloat16):  # matrix products only; weights stay fp32
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += ids.numel()
        done = step + 1
        if done % 50 == 0 or done == total:
            seconds = time.monotonic() - began
            left = seconds / (done - first) * (total - done)
            print(
                f"step {done}/{total}  loss {loss.item():.4f}  {seen / seconds:,.0f} tokens/s"
                f"  {left / 60:.1f} min left",
                flush=True,
            )
        if done % 150 == 0 or done in (args.hold, args.hold + args.decay, total):
            state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, args.work / "saving.pt")
            (args.work / "saving.pt").replace(last)
            if done == args.hold:
                torch.save(state, args.work / "hold.pt")
        if done % 300 == 0:
            probe(model, tokenizer, args.seed, 20)
    return model


@torch.no_grad()
def answer(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    texts = [prompt_text(question) for question in questions]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    model.eval()
    out = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train()
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def probe(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, each: int) -> None:
    """Greedy accuracy by number of events, on fresh problems that belong to no file."""
    rng = random.Random(f"{seed}-probe")
    line = []
    for n_events in range(1, 7):
        problems = [make_problem(rng, n_events) for _ in range(each)]
        texts = answer(model, tokenizer, [problem.question for problem in problems])
        given = [text.split("</think>")[-1].strip() for text in texts]
        right = sum(g == str(p.answer) for g, p in zip(given, problems, strict=True))
        line.append(f"{n_events}: {right / each:.0%}")
    print("  right by events  " + "  ".join(line), flush=True)


def save_student(model: Qwen3ForCausalLM, student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("data", "tokenizer", "student"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold", type=int, default=1900, help="steps at the full rate")
    parser.add_argument("--decay", type=int, default=800, help="steps of decay")
    parser.add_argument("--finish", type=int, default=400, help="steps with more long problems")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    student = DEMO / "student"
    reserved = build_data(args.seed, write=args.only in (None, "data"))
    if args.only in (None, "tokenizer"):
        build_tokenizer(args.seed, student)
    if args.only in (None, "student"):
        save_student(train(args, reserved), student)
        tokenizer = AutoTokenizer.from_pretrained(student)
        probe(Qwen3ForCausalLM.from_pretrained(student).float(), tokenizer, args.seed, 100)


if __name__ == "__main__":
    main()
