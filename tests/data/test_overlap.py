"""Whether a question was seen before: as a whole, or by a long run of the same words."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mot_lora.data.overlap import Overlap, grams, normalized

SIGNS = ["+", "-", "*", "/", "=", "%", "$", "<", "^", "\\"]
words = st.sampled_from([*"abcdefgh", "two", "3", "42", "0"]) | st.sampled_from(SIGNS)
punctuation = st.sampled_from([" ", "  ", "\n", "\t", ", ", ". ", "? ", " (", ") ", " 'x"[:2], '" ', "; ", ": ", "! "])
fuzzed = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def spoken(data: st.DataObject, run: list[str]) -> str:
    """The words as somebody else might have written them: other spaces, punctuation and case."""
    upper = data.draw(st.booleans())
    text = "".join(w + data.draw(punctuation) for w in run)
    return text.upper() if upper else text


def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@fuzzed
@given(st.data(), st.integers(1, 13))
def test_a_run_of_n_words_of_a_question_is_an_overlap(data: st.DataObject, n: int) -> None:
    asked = data.draw(st.lists(words, min_size=n, max_size=n + 12))
    at = data.draw(st.integers(0, len(asked) - n))
    before, after = data.draw(st.lists(words, max_size=5)), data.draw(st.lists(words, max_size=5))
    assert spoken(data, [*before, *asked[at : at + n], *after]) in Overlap([spoken(data, asked)], n)


@fuzzed
@given(st.data(), st.integers(2, 13))
def test_one_word_less_is_none(data: st.DataObject, n: int) -> None:
    asked = data.draw(st.lists(words, min_size=n, max_size=n + 12))
    at = data.draw(st.integers(0, len(asked) - n + 1))
    # words that no question has around the n - 1 that are shared
    text = spoken(data, ["other", *asked[at : at + n - 1], "words"])
    assert text not in Overlap([spoken(data, asked)], n)
    assert text in Overlap([spoken(data, asked)], n - 1)


@fuzzed
@given(st.data(), st.integers(1, 6))
def test_an_overlap_is_a_common_run_or_the_same_whole(data: st.DataObject, n: int) -> None:
    asked, other = (data.draw(st.lists(words, min_size=1, max_size=14)) for _ in range(2))
    text, question = spoken(data, other), spoken(data, asked)
    expected = bool(runs(asked, n) & runs(other, n)) or normalized(text) == normalized(question)
    assert (text in Overlap([question, "something else entirely"], n)) == expected


@fuzzed
@given(st.data(), st.integers(0, 20))
def test_a_whole_question_is_seen_however_short_it_is(data: st.DataObject, n: int) -> None:
    asked = data.draw(st.lists(words, min_size=1, max_size=8))
    text = " ".join(asked)
    assert text in Overlap([f" {text.upper()}\n"], n)
    assert text.replace(" ", "\u00a0 \t") in Overlap([text], n)
    assert f"{text} zero" not in Overlap([text], len(asked) + 1)


@fuzzed
@given(st.data())
def test_0_compares_whole_questions_only(data: st.DataObject) -> None:
    asked, other = (data.draw(st.lists(words, min_size=1, max_size=20).map(" ".join)) for _ in range(2))
    assume(asked != other)
    assert asked in Overlap([asked], 0)
    assert (other in Overlap([asked], 0)) == (other == asked)
    assert f"{asked} {asked}" not in Overlap([asked], 0)


ELEVEN = "Tom has 3 apples and buys 4 more. How many now"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2 + 2 = 4", 5),
        ("2+2=4", 5),
        ("x^2 - 3x", 5),  # x ^ 2 - 3x
        ("it's", 2),
        ("a, b. (c)! \"d\"? 'e'; f: g", 7),
        ("50% of $20", 5),
        ("x_1 = 5", 3),
        ("\u00bd \u2212 \uff11", 5),  # a fraction is three signs, and a minus is not a hyphen
        ("", 0),
        ("?!", 0),
        (ELEVEN, 11),
    ],
)
def test_signs_of_arithmetic_are_words_and_punctuation_is_not(text: str, count: int) -> None:
    assert len(grams(text, count)) == 1
    assert grams(text, count + 1) == set()
    assert len(next(iter(grams(text, count)))) == count


def test_other_numbers_make_another_question() -> None:
    # questions made by a template share all but their numbers, and those are what is asked
    asked = "Sarah has 12 marbles. She buys 7. How many marbles does she have now?"
    assert asked.replace("12", "13").replace("7", "9") not in Overlap([asked], 13)
    assert f"Please help: {asked} Thank you." in Overlap([asked], 13)
    assert f"Please help: {asked} Thank you." not in Overlap([asked], 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How MUCH is\n2 + 2?", " how much  is 2 + 2? "),
        ("\uff12 \uff0b \uff12", "2 + 2"),
        ("Straße", "STRASSE"),
        ("e\u0301", "\u00e9"),
        ("a\u00a0b\u2028c", "a b c"),
    ],
)
def test_normalised_texts_are_equal(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert one in Overlap([other], 13)


def test_what_is_no_text_overlaps_with_nothing() -> None:
    assert None not in Overlap(["None"], 1)
    assert "a" not in Overlap([], 13)
    assert "" not in Overlap(["a b c"], 1)
