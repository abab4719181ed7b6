"""What a run reads: which rows are used, why others are not, and the demo's own data."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mot_lora.config import Config, TeacherConfig
from mot_lora.data.dataset import load_data
from mot_lora.data.encoding import encode
from mot_lora.data.overlap import Overlap
from mot_lora.data.select import ENDLESS, LONG, NOT_DRAWN, SEEN, TWICE, WRONG, Chosen, Selection, hold_out
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import IGNORE, Example, Question, Trace
from mot_lora.errors import UserError
from mot_lora.reader import demo_path, parse_config

Rows = list[dict[str, Any]]
WHY = {TWICE, SEEN, ENDLESS, WRONG, LONG, NOT_DRAWN}
GOOD: Rows = [{"question": f"{i} + 1 = ?", "reasoning": f"so {i + 1}", "answer": str(i + 1)} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_path("student"))


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def choice(
    tokenizer: PreTrainedTokenizerBase, *asked: str, n: int = 13, longest: int = 999, **settings: Any
) -> Selection:
    """What is chosen beside an evaluation of these questions."""
    teacher = TeacherConfig.model_validate({"name": "a", "data": "a.jsonl", **settings})
    return Selection(teacher, tokenizer, Overlap(asked, n), longest)


def chosen(which: Selection, rows: Rows, seed: int = 0) -> list[str]:
    """The questions of the rows that are used."""
    return [c.question for c in which.choose([(f"row {i}", row) for i, row in enumerate(rows)], seed)]


# --- which rows are used -------------------------------------------------------------------------------


def test_good_rows_are_all_used_in_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    which = choice(tokenizer)
    examples = which.choose([("", row) for row in GOOD], 0)
    assert [c.question for c in examples] == [row["question"] for row in GOOD]
    assert all(c.reasons for c in examples)
    assert which.left_out == Counter()
    first = Trace(({"role": "user", "content": "0 + 1 = ?"},), "<think>\nso 1\n</think>\n\n1")
    assert examples[0].example == encode(tokenizer, first)


def test_each_reason_to_leave_a_row_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows: Rows = [
        {"question": "one", "answer": "1", "gold": "1"},
        {"question": " ONE ", "answer": "1\n", "gold": "1"},  # twice, but for what does not tell questions apart
        {"question": "one", "answer": "uno", "gold": "uno"},  # another answer is another trace
        {"question": "Asked!", "answer": "2", "gold": "2"},
        {"question": "two", "answer": "<think>and on", "gold": "2"},
        {"question": "three", "answer": "4", "gold": "3"},
        {"question": "four", "answer": "4 " * 500, "gold": "4"},
        {"question": "five", "thinking": "5", "answer": "5", "gold": "5"},
    ]
    which = choice(tokenizer, "asked!", longest=200, verified_only=True)
    assert chosen(which, rows) == ["one", "one", "five"]
    assert which.left_out == {TWICE: 1, SEEN: 1, ENDLESS: 1, WRONG: 1, LONG: 1}


def test_a_row_is_left_out_for_one_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    # in the order in which they are asked, so that what costs most is asked of the fewest
    endless = {"question": "asked", "answer": "<think>" + "on " * 500, "gold": "3"}
    long = {"question": "q", "answer": "no " * 500, "gold": "3"}
    which = choice(tokenizer, "asked", longest=100, verified_only=True)
    assert chosen(which, [endless, endless, {**endless, "question": "p"}, long]) == []
    assert which.left_out == {SEEN: 1, TWICE: 1, ENDLESS: 1, LONG: 1}


def test_the_same_question_after_another_beginning_is_another_trace(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}]
    which = choice(tokenizer)
    rows: Rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]}, {"messages": turns}]
    assert chosen(which, rows) == ["q", "q"]
    assert which.left_out == {TWICE: 1}


def test_long_traces_are_left_out_and_counted_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    rows: Rows = [{"question": "q", "answer": "1 + " * n + "1"} for n in (1, 5, 20, 40)]
    whole = [c.example for c in choice(tokenizer).choose([("", r) for r in rows], 0)]
    limit = len(whole[2])
    for longest, count in ((limit, 3), (limit - 1, 2), (2, 0)):
        which = choice(tokenizer, longest=longest)
        assert [c.example for c in which.choose([("", r) for r in rows], 0)] == whole[:count]
        assert which.left_out == {LONG: 4 - count}


def test_traces_without_reasoning_are_told(tokenizer: PreTrainedTokenizerBase) -> None:
    rows: Rows = [{"question": q, "reasoning": r, "answer": "2"} for q, r in (("a", "x"), ("b", ""), ("c", None))]
    rows += [{"question": "d", "answer": "<think>\n\n</think>\n\n2"}, {"question": "e", "answer": "x</think>2"}]
    found = choice(tokenizer).choose([("", r) for r in rows], 0)
    assert [c.reasons for c in found] == [True, False, False, False, True]


# --- verified by the right answer ----------------------------------------------------------------------

VERIFIED = [
    ("so\n</think>\n\nThe answer is \\boxed{42}.", "42", True),
    ("so\n</think>\n\n42", "6 * 7 = 42\n#### 42", True),
    ("42", "#### 42", True),
    ("\\boxed{\\frac{1}{2}}", "0.5", True),
    ("\\boxed{0.5}", "\\frac12", True),
    ("1/2", "#### 1/2", True),
    ("$1,234$", "1234", True),
    ("\\boxed{B}", "B", True),
    ("\\boxed{C}", "B", False),
    ("Paris", "paris", True),
    ("so 42\n</think>\n\n41", "42", False),  # the thoughts do not count
    ("41", "#### 42", False),
    ("\\boxed{\\frac{2}{1}}", "0.5", False),
    ("so 42\n</think>", "42", False),
    ("London", "Paris", False),
]


@pytest.mark.parametrize(("completion", "gold", "right"), VERIFIED)
@pytest.mark.parametrize("column", ["gold", "answer", "expected_answer"])
def test_verified_only_keeps_what_ends_in_the_right_answer(
    tokenizer: PreTrainedTokenizerBase, completion: str, gold: str, right: bool, column: str
) -> None:
    row = {"question": "q", "completion": completion, column: gold}
    which = choice(tokenizer, verified_only=True)
    assert chosen(which, [row]) == ["q"] * right
    assert which.left_out == Counter({} if right else {WRONG: 1})
    assert chosen(choice(tokenizer), [row]) == ["q"]  # and all are kept where it is not asked for


def test_verified_only_needs_right_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in ({"question": "q", "answer": "2"}, {"question": "q", "solution": "so 2", "gold": {"a": 1}}):
        with pytest.raises(UserError, match=r"^row 0: `verified_only` needs the right answer.*columns: \{gold: ") as e:
            chosen(choice(tokenizer, verified_only=True), [row])
        assert not re.search(r"[\r\n]", str(e.value))
        which = choice(tokenizer, verified_only=True)
        assert chosen(which, [{**GOOD[0], "gold": "1"}, row]) == ["0 + 1 = ?"]
        assert which.left_out == {"without a right answer": 1}
    # GSM8K's own answers are no teacher's beside which a right one stands
    columns = {"answer": "answer"}
    with pytest.raises(UserError, match="`verified_only` needs the right answer"):
        chosen(choice(tokenizer, verified_only=True, columns=columns), [{"question": "q", "answer": "so\n#### 2"}])


# --- samples -------------------------------------------------------------------------------------------


def test_samples_are_drawn_by_the_seed_in_the_order_of_the_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    every = [row["question"] for row in GOOD]
    drawn = {seed: chosen(choice(tokenizer, samples=10), GOOD, seed) for seed in range(6)}
    assert len({tuple(d) for d in drawn.values()}) == 6
    for seed, some in drawn.items():
        assert len(some) == 10
        assert some == [q for q in every if q in some]
        which = choice(tokenizer, samples=10)
        assert chosen(which, GOOD, seed) == some
        assert which.left_out == {NOT_DRAWN: 30}
        assert chosen(choice(tokenizer, samples=10, seed=seed), GOOD, 99) == some  # the teacher's own comes first
    counts = Counter(q for seed in range(60) for q in chosen(choice(tokenizer, samples=10), GOOD, seed))
    assert set(counts) == set(every)  # none is never drawn
    assert max(counts.values()) < 35


@pytest.mark.parametrize("samples", [40, 41, 1000])
def test_more_samples_than_there_are_takes_all(tokenizer: PreTrainedTokenizerBase, samples: int) -> None:
    which = choice(tokenizer, samples=samples)
    assert chosen(which, GOOD) == [row["question"] for row in GOOD]
    assert which.left_out == Counter()


def test_samples_count_what_can_be_used(tokenizer: PreTrainedTokenizerBase) -> None:
    wrong = [{**row, "gold": "-1"} for row in GOOD[:30]]
    right = [{**row, "gold": row["answer"]} for row in GOOD[30:]]
    for seed in range(5):
        which = choice(tokenizer, samples=5, verified_only=True)
        some = chosen(which, wrong + right, seed)
        assert len(some) == 5
        assert set(some) <= {row["question"] for row in right}
        assert which.left_out[WRONG] + which.left_out[NOT_DRAWN] == 35


def test_more_samples_of_a_seed_hold_the_fewer(tokenizer: PreTrainedTokenizerBase) -> None:
    few, many = (set(chosen(choice(tokenizer, samples=n), GOOD, 3)) for n in (5, 25))
    assert few < many


def test_teachers_of_the_same_questions_draw_the_same_and_a_row_more_changes_nothing_else(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    drawn = set(chosen(choice(tokenizer, samples=10), GOOD, 3))
    others = [{**row, "reasoning": "in other words"} for row in reversed(GOOD)]
    assert set(chosen(choice(tokenizer, samples=10), others, 3)) == drawn
    more = set(chosen(choice(tokenizer, samples=10), [{"question": "one more", "answer": "1"}, *GOOD], 3))
    assert len(drawn - more) <= 1
    # a second trace of a question is drawn on its own
    twice = [*GOOD, *others]
    assert len(set(chosen(choice(tokenizer, samples=40), twice, 3))) < 40


# --- rows of tokens ------------------------------------------------------------------------------------


def test_rows_of_tokens_are_used_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    long_question = "Tom has 3 apples and buys 4 more, then he eats 2 of them. How many has he now?"
    trace = Trace(({"role": "user", "content": long_question},), "<think>\nso\n</think>\n\n5")
    example = encode(tokenizer, trace)
    row = {"input_ids": list(example.input_ids), "labels": list(example.labels)}
    which = choice(tokenizer)
    (found,) = which.choose([("", row), ("", row)], 0)
    assert found.example == example
    assert found.reasons
    assert long_question in found.question
    assert which.left_out == {TWICE: 1}
    for asked, left_out in ((long_question, {SEEN: 1}), ("another", {})):
        which = choice(tokenizer, asked)
        which.choose([("", row)], 0)
        assert which.left_out == left_out
    which = choice(tokenizer, longest=len(example) - 1)
    assert (which.choose([("", row)], 0), which.left_out) == ([], {LONG: 1})


def test_tokens_that_the_student_has_not_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in (len(tokenizer), -1, 2**40):
        row = {"input_ids": [1, token, 2], "labels": [IGNORE, IGNORE, 2]}
        with pytest.raises(UserError, match=r"^row 0: `input_ids` has a token outside the student's vocabulary"):
            chosen(choice(tokenizer), [row])


# --- all that is counted adds up -----------------------------------------------------------------------

cells = st.sampled_from(["a", "b", "2", "asked", "<think>x", "<think>x</think>2", "long " * 60, "2 </think> 3"])
drawn_rows = st.lists(
    st.tuples(cells, cells).map(
        lambda x: {"question": x[0], "completion": x[1], "answer": "2" if x[0] == "a" else "3"}
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(drawn_rows, st.none() | st.integers(1, 12), st.booleans(), st.integers(0, 5))
def test_every_row_is_used_or_left_out_for_a_reason(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, samples: int | None, verified: bool, seed: int
) -> None:
    which = choice(tokenizer, "asked", longest=60, samples=samples, verified_only=verified)
    used = which.choose([("", r) for r in rows], seed)
    assert len(used) + sum(which.left_out.values()) == len(rows)
    assert set(which.left_out) <= WHY
    assert samples is None or len(used) <= samples
    assert len({c.example for c in used}) == len(used)
    if which.left_out[NOT_DRAWN]:
        assert len(used) == samples
    if samples is None:  # no row's fate hangs on the others', but for those that are the same
        alone = [choice(tokenizer, "asked", longest=60, verified_only=verified).choose([("", r)], 0) for r in rows]
        assert {c.example for c in used} == {c.example for one in alone for c in one}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(drawn_rows, st.sampled_from([0.0, 0.3, 0.7]), st.none() | st.integers(12, 30))
def test_the_record_of_a_run_adds_up(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    rows: Rows,
    holdout: float,
    samples: int | None,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    asked = write(folder / "asked.jsonl", [{"question": "asked", "answer": "2"}])
    tree: dict[str, Any] = {
        "student": "s",
        "teachers": [{"name": "a", "data": [write(folder / "a.jsonl", GOOD), asked], "samples": samples}],
        "branch": {"max_length": 60},
        "eval": {"data": asked, "holdout": holdout},
    }
    tree["teachers"][0]["data"].append(write(folder / "b.jsonl", [*rows, {"question": "x", "answer": "y"}]))
    data = load_data(parse_config(tree, "test"), tokenizer)
    (record,) = data.record.teachers
    assert record.rows == 40 + 1 + len(rows) + 1
    assert record.used + record.held_out + sum(record.left_out.values()) == record.rows
    assert (record.used, record.held_out) == (len(data.train["a"]), len(data.held_out["a"]))
    lengths = sorted(len(e) for e in data.train["a"])
    assert (record.longest_tokens, record.tokens) == (lengths[-1], sum(lengths))
    assert lengths[(len(lengths) - 1) // 2] <= record.median_tokens <= lengths[len(lengths) // 2]
    assert data.record.questions == 1


# --- a whole run's data --------------------------------------------------------------------------------


def test_what_a_run_reads_is_told(tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config]) -> None:
    steps: list[tuple[str, int, int]] = []
    data = load_data(make_config(), tokenizer, lambda what, done, total: steps.append((what, done, total)))
    assert [t.teacher for t in data.record.teachers] == ["a", "b"]
    assert data.questions == [Question(f"{i} + 2 = ?", str(i + 2)) for i in range(4)]
    for record in data.record.teachers:
        assert (record.rows, record.used + record.held_out, record.left_out) == (24, 24, {})
        assert record.without_reasoning == 0
        prompt, answer = record.sample
        assert (prompt.trained, answer.trained) == (False, True)
        assert prompt.text.endswith("<|im_start|>assistant\n")
        assert answer.text.startswith(f"<think>\n{record.teacher} says ")
        assert answer.text.endswith("<|im_end|>")
        assert re.search(r"(\d+) \+ 1", prompt.text)
    assert [len(data.held_out[t]) for t in ("a", "b")] == [t.held_out for t in data.record.teachers]
    assert data.record.teachers[0].held_out == data.record.teachers[1].held_out > 0
    assert len(data.fingerprints) == 3


def test_teachers_of_other_formats_and_columns_train_the_same(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = [{"Frage": r["question"], "Gedanken": r["reasoning"], "Antwort": r["answer"]} for r in GOOD]
    named = {"question": "Frage", "reasoning": "Gedanken", "answer": "Antwort"}
    datasets.DatasetDict({"mine": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    teachers = [
        {"name": "lines", "data": write(tmp_path / "x.jsonl", GOOD)},
        {"name": "saved", "data": str(tmp_path / "saved"), "split": "mine", "columns": named},
        {"name": "joined", "data": [write(tmp_path / f"{i}.jsonl", GOOD[i : i + 20]) for i in (0, 20)]},
    ]
    data = load_data(make_config(teachers=teachers), tokenizer)
    assert data.train["lines"] == data.train["saved"] == data.train["joined"]
    assert data.held_out["lines"] == data.held_out["saved"] == data.held_out["joined"]
    assert f"{tmp_path / 'saved'} mine" in data.fingerprints
    assert [len(t.sources) for t in data.record.teachers] == [1, 1, 2]


def test_a_fingerprint_follows_the_rows_and_not_the_file(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config]
) -> None:
    config = make_config()
    source = config.teachers[0].sources[0]
    first = load_data(config, tokenizer).fingerprints
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    Path(source).write_text("\n\n".join(json.dumps(dict(reversed(r.items())), indent=None) for r in rows))
    assert load_data(config, tokenizer).fingerprints == first
    rows[3]["answer"] += " "
    write(Path(source), rows)
    changed = load_data(config, tokenizer).fingerprints
    assert {k for k in first if first[k] != changed[k]} == {source}


def test_questions_take_numbers_columns_and_a_limit(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    source = write(tmp_path / "q.jsonl", [{"task": "1", "y": 2}, {"task": "2", "y": 0.5}])
    asked = {"data": source, "columns": {"gold": "y"}, "holdout": 0.2}
    assert load_data(make_config(eval=asked), tokenizer).questions == [Question("1", "2"), Question("2", "0.5")]
    assert load_data(make_config(eval={**asked, "limit": 1}), tokenizer).questions == [Question("1", "2")]
    write(tmp_path / "q.jsonl", [{"task": "1", "y": 2}, {"task": "2", "reasoning": "r"}])
    assert load_data(make_config(eval=asked), tokenizer).record.left_out == {"without a right answer": 1}
    with pytest.raises(UserError, match=r"q\.jsonl:2: "):
        load_data(make_config(eval={**asked, "on_bad_row": "stop"}), tokenizer)


def test_traces_on_questions_of_the_evaluation_are_left_out(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    long = "Tom has 3 apples and buys 4 more, then he eats 2 of them. How many has he now?"
    rows = [*GOOD, {"question": f"Solve this. {long}", "answer": "5"}]
    teachers = [{"name": "a", "data": write(tmp_path / "mine.jsonl", rows)}]
    asked = write(
        tmp_path / "asked.jsonl", [{"question": q, "answer": "5"} for q in (long, "3 + 1 = ?", " 4 + 1  = ?")]
    )
    for overlap, count in ((13, 3), (0, 2)):
        config = make_config(teachers=teachers, eval={"data": asked, "overlap": overlap})
        assert load_data(config, tokenizer).record.teachers[0].left_out == {SEEN: count}
    config = make_config(teachers=teachers, eval={})
    assert load_data(config, tokenizer).record.teachers[0].left_out == {}


def test_traces_on_questions_for_finding_weights_are_left_out_too(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    teachers = [{"name": "a", "data": write(tmp_path / "mine.jsonl", GOOD)}]
    asked = [
        write(tmp_path / f"{n}.jsonl", [{"question": f"{n} + 1 = ?", "answer": "0"}, {"question": "x", "answer": "0"}])
        for n in (3, 4, 5)
    ]
    write(tmp_path / "4.jsonl", [{"question": "4 + 1 = ?", "answer": "0"}])
    evaluation = {"data": asked[0], "validation": asked[1], "forgetting": {"old": asked[2]}, "limit": 1}
    data = load_data(make_config(teachers=teachers, eval=evaluation), tokenizer)
    assert data.record.teachers[0].left_out == {SEEN: 2}  # what is only watched may be trained on
    assert [q.question for q in data.validation] == ["4 + 1 = ?"]
    assert [q.question for q in data.forgetting["old"]] == ["5 + 1 = ?"]
    assert set(asked) < set(data.fingerprints)


def test_held_out_traces_of_teachers_that_are_not_trained_are_measured(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config]
) -> None:
    plain = make_config()
    both = load_data(plain, tokenizer)
    traces = [t.model_dump(exclude_unset=True) for t in plain.teachers]
    own = {**plain.eval.model_dump(), "traces": traces}
    for trained in ([traces[0]], [{"name": "all", "union": traces}]):
        data = load_data(make_config(teachers=trained, eval=own), tokenizer)
        assert data.held_out == both.held_out
        assert data.train.keys() == {t["name"] for t in trained}
        held = {e.input_ids for examples in data.held_out.values() for e in examples}
        assert held
        assert not held & {e.input_ids for examples in data.train.values() for e in examples}


def test_a_teacher_of_whom_nothing_is_left_is_named_with_the_reasons(
    tokenizer: PreTrainedTokenizerBase, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    def message(rows: Rows, **settings: Any) -> str:
        teacher = {"name": "mine", "data": write(tmp_path / "mine.jsonl", rows)}
        with pytest.raises(UserError) as e:
            load_data(make_config(teachers=[teacher], **settings), tokenizer)
        assert not re.search(r"[\r\n]", str(e.value))
        return str(e.value)

    assert message(GOOD, branch={"max_length": 8}) == (
        "teacher `mine`: no traces to train on: 40 too long; branch.max_length is 8"
    )
    asked = {"question": "0 + 2 = ?", "answer": "2"}
    assert message([asked, asked]) == "teacher `mine`: no traces to train on: 1 in the evaluation, 1 duplicate"
    one = {"question": "q", "answer": "2"}
    hold = {"data": None, "holdout": 0.999999}
    assert message([one], eval=hold) == "teacher `mine`: no traces to train on: its rows are all held out"
    assert message([one], eval={"holdout": 1e-9}) == "teacher `mine`: no traces held out to measure; raise eval.holdout"


# --- holding out ---------------------------------------------------------------------------------------


def traced(question: str, completion: str = "c") -> Chosen:
    return Chosen("row 1", Example.after((1, 2, hash(completion) % 999), 1), question, True)


def test_a_question_is_held_out_for_every_teacher_or_for_none() -> None:
    first = [traced(f"question {i}", "one") for i in range(2000)]
    second = [traced(f"question {i}", "two") for i in reversed(range(0, 2000, 3))]
    train_1, held_1 = hold_out(first, 0.1, seed=0)
    train_2, held_2 = hold_out(second, 0.1, seed=0)
    assert sorted([*train_1, *held_1], key=repr) == sorted(first, key=repr)
    assert {t.question for t in held_2} <= {t.question for t in held_1}
    assert {t.question for t in train_2} <= {t.question for t in train_1}
    assert len(held_1) / 2000 == pytest.approx(0.1, abs=0.03)
    assert [t.question for t in train_1] == [t.question for t in first if t in train_1]
    assert {t.question for t in hold_out(first, 0.1, seed=1)[1]} != {t.question for t in held_1}


def test_a_larger_share_holds_out_more_of_the_same() -> None:
    traces = [traced(f"question {i}") for i in range(500)]
    assert hold_out(traces, 0, seed=0) == (traces, [])
    small, large = (set(map(repr, hold_out(traces, share, seed=0)[1])) for share in (0.1, 0.5))
    assert small < large


def test_what_is_held_out_does_not_hang_on_the_order() -> None:
    traces = [traced(f"question {i}") for i in range(100)]
    mixed = random.Random(0).sample(traces, 100)
    assert set(hold_out(mixed, 0.3, 5)[1]) == set(hold_out(traces, 0.3, 5)[1])


# --- the demo that the package carries -----------------------------------------------------------

TEACHERS = ("steps", "gains_first", "story", "hasty")


def demo(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in demo_path(name).read_text(encoding="utf-8").splitlines()]


def true_answer(question: str) -> int:
    """The first number, and then what comes and goes, read off the verbs."""
    start, *events = (s for s in re.split(r"(?<=[.?])\s+", question) if re.search(r"\d", s))
    count = int(re.findall(r"\d+", start)[0])
    for event in events:
        number = int(re.findall(r"\d+", event)[0])
        away = re.search(r"gives \d+ to|sells|loses|throws away|takes|eats", event)
        comes = re.search(r"gives (her|him) \d+|buys|finds|gets|picks up|wins", event)
        assert bool(away) != bool(comes), event
        count += -number if away else number
    return count


def test_demo_exam_questions_are_in_no_teachers_traces() -> None:
    taught = {row["question"] for t in TEACHERS for row in demo(f"teachers/{t}.jsonl")}
    held, dev = ([row["question"] for row in demo(f)] for f in ("heldout.jsonl", "dev.jsonl"))
    assert len(held) == len(set(held)) > 100
    assert not taught & {*held, *dev}
    assert not set(held) & set(dev)


@pytest.mark.parametrize("name", ["heldout.jsonl", "dev.jsonl"])
def test_demo_exam_answers_are_right(name: str) -> None:
    for row in demo(name):
        assert int(row["answer"]) == true_answer(row["question"]), row


@pytest.mark.parametrize("teacher", [t for t in TEACHERS if t != "hasty"])
def test_the_demos_good_teachers_are_right_in_every_step(teacher: str) -> None:
    equations = Counter[str]()
    for row in demo(f"teachers/{teacher}.jsonl"):
        found = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["reasoning"])
        assert found, row
        for a, sign, b, c in found:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c), row
            equations[sign] += 1
        assert found[-1][3] == row["answer"], row
        assert int(row["answer"]) == true_answer(row["question"]), row
    assert min(equations["+"], equations["-"]) > 100


def test_a_third_of_the_demos_hasty_answers_are_wrong() -> None:
    rows = demo("teachers/hasty.jsonl")
    wrong = sum(int(r["answer"]) != true_answer(r["question"]) for r in rows)
    assert wrong / len(rows) == pytest.approx(1 / 3, abs=0.08)


def test_the_demos_teachers_solve_the_same_problems() -> None:
    first, *rest = ({row["question"] for row in demo(f"teachers/{t}.jsonl")} for t in TEACHERS)
    assert all(other == first for other in rest)
