"""Properties of generator, grader, splits and typed problems."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raas_jax.lab.tasks.lemma import Knobs, draw, grade, normalise, parse_problem, split_of
from raas_jax.lab.tasks.lemma.draws import SPLITS


@st.composite
def drawn(draw_value):
    smallest = draw_value(st.integers(1, 64))
    knobs = Knobs(
        smallest=smallest,
        largest=draw_value(st.integers(smallest, 64)),
        late_facts=draw_value(st.integers(0, smallest // 4)),
        question_share=draw_value(st.sampled_from([0.0, 0.25, 1.0])),
        reuse_exponent=draw_value(st.sampled_from([0.0, 1.0, 2.0])),
    )
    split = draw_value(st.sampled_from(SPLITS))
    return split, draw(split, draw_value(st.integers(0, 2**32)), 0, knobs), knobs


@settings(deadline=None)
@given(drawn())
def test_every_derivation_is_graded_right_and_read_back(item):
    split, problem, knobs = item
    result = grade(problem, problem.derivation)
    assert result.answer and result.derivation and result.finished
    assert len(result.lines) == len(problem.definitions) + 1
    assert knobs.smallest <= len(problem.definitions) <= knobs.largest
    assert split_of(problem.prompt) == split
    assert parse_problem(problem.prompt) == problem
    assert normalise(problem.prompt.replace(" ", "")) == problem.prompt


@settings(deadline=None)
@given(drawn(), st.data())
def test_any_single_changed_value_is_graded_wrong(item, data):
    _, problem, _ = item
    words = list(problem.derivation_words)
    spots = [index for index, word in enumerate(words) if word.isdigit()]
    spot = data.draw(st.sampled_from(spots))
    words[spot] = str((int(words[spot]) + data.draw(st.integers(1, 9))) % 10)
    result = grade(problem, " ".join(words))
    assert not result.derivation
    assert sum(not right for right in result.lines) == 1
    assert result.answer == (spot != len(words) - 1)


@settings(deadline=None, max_examples=30)
@given(drawn(), st.data())
def test_a_cut_derivation_is_wrong(item, data):
    _, problem, _ = item
    words = problem.derivation_words
    result = grade(problem, " ".join(words[: data.draw(st.integers(0, len(words) - 1))]))
    assert not result.derivation and not result.answer


def test_extra_line_is_wrong():
    problem = parse_problem("a = 4; b = 2; c = a * b; ? c")
    assert problem.answer == 8
    assert not grade(problem, problem.derivation + " ; a = 4 , a 4 ;").derivation


def test_worked_by_hand():
    problem = parse_problem("a=4;b=9;c=a+b")
    assert problem.prompt == "a = 4 ; b = 9 ; c = a + b ; ? c :"
    assert problem.derivation == (
        "a = 4 , a 4 ; b = 9 , b 9 ; c = a + b , a 4 b 9 , c 3 ; answer c 3"
    )


def test_same_index_same_problem():
    knobs = Knobs(24, 48)
    assert draw("test", 1, 5, knobs) == draw("test", 1, 5, knobs)
    assert draw("test", 1, 5, knobs) != draw("test", 2, 5, knobs)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_late_facts_are_stated_once_and_needed_only_at_the_end(seed, late):
    problem = draw("train", seed, 0, Knobs(24, 48, late_facts=late))
    count = len(problem.definitions)
    last = problem.definitions[-late:]
    uses = [
        {
            index
            for index, item in enumerate(problem.definitions)
            if fact in (item.left, item.right) and not item.is_literal
        }
        for fact in {name for item in last for name in (item.left, item.right)}
    ]
    # Of the operands of the last lines, as many are used nowhere before them.
    assert sum(min(use) >= count - late for use in uses) >= late
    assert problem.question == problem.definitions[-1].name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = 4; c = a + b", "uses 'b' before it is defined"),
        ("a = 4; b = a / a", "operator '/'"),
        ("a = 4; a = 5", "repeats 'a'"),
        ("hello = 4", "not a name the model knows"),
        ("a = 12", "single digits"),
        ("a = 4; b = a + 3", "operands are names"),
        ("a = 4; b = a + a + a", "two operands"),
        ("a = 4; ? z", "not defined"),
        ("a = 4; ? a; b = 3", "the question comes last"),
        ("a + 4", "should read"),
        ("a = 4; b = a", "should give a digit, or two names"),
        ("a = 4; ? a b", "should name one"),
        ("", "no definition"),
    ],
)
def test_typed_mistakes_get_a_clear_message(text, says):
    with pytest.raises(ValueError, match="problem: ") as error:
        parse_problem(text)
    assert says in str(error.value)


def test_knobs_name_what_is_wrong():
    with pytest.raises(ValueError, match="largest=200"):
        Knobs(4, 200)
    with pytest.raises(ValueError, match="late_facts=9"):
        dataclasses.replace(Knobs(24, 48), late_facts=9)
    with pytest.raises(ValueError, match="split='dev'"):
        draw("dev", 0, 0, Knobs())
