"""Liveness marks against a brute-force recomputation from the words alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from raas_jax.lab.tasks.lemma import Knobs, draw, liveness, parse_problem


def brute_force(problem):
    """(needed_until, lookups): every value word is matched with all words before it."""
    words = ["<bos>", *problem.prompt_words, *problem.derivation_words]
    prompt = 1 + len(problem.prompt_words)
    names = {item.name for item in problem.definitions}
    # A statement is a name and a digit side by side, after the prompt.
    values = [
        index
        for index in range(prompt + 1, len(words))
        if words[index].isdigit() and words[index - 1] in names
    ]
    needed = [-1] * len(words)
    lookups = []
    for now in values:
        earlier = [index for index in values if index < now and words[index - 1] == words[now - 1]]
        if not earlier:
            continue  # the first statement of a name is computed
        assert words[earlier[-1]] == words[now]
        lookups.append((now, words[now - 1], tuple(earlier)))
        needed[earlier[-1]] = needed[earlier[-1] - 1] = now
    return tuple(needed), lookups


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40), st.data())
def test_marks_agree_with_brute_force(seed, size, data):
    late = data.draw(st.integers(0, size // 4))
    problem = draw("train", seed, 0, Knobs(size, size, late_facts=late))
    marks = liveness(problem)
    needed, lookups = brute_force(problem)
    assert marks.needed_until == needed
    assert [(each.position, each.name, each.sources) for each in marks.lookups] == lookups
    now = data.draw(st.integers(marks.prompt_tokens + 1, marks.tokens - 1))
    words = ["<bos>", *problem.prompt_words, *problem.derivation_words]
    start = now
    while start > marks.prompt_tokens and words[start - 1] != ";":
        start -= 1
    for position in range(now):
        if position < marks.prompt_tokens:
            wanted = "prompt"
        elif position >= start:
            wanted = "line"
        else:
            wanted = "live" if needed[position] >= now else "dead"
        assert marks.mark(position, now) == wanted
    assert marks.ideal(now) == {
        position for position in range(now) if marks.mark(position, now) in ("line", "live")
    }


def test_worked_by_hand():
    marks = liveness(parse_problem("a = 4; b = 9; c = a + b"))
    # <bos> and 17 words of prompt; then `a = 4 , a 4 ;` begins at 18.
    assert marks.prompt_tokens == 18
    assert marks.line_starts == (18, 25, 32, 46)
    # `a 4` at 22, 23 serves the look-up at 39; `c 3` at 43, 44 the answer at 48.
    assert [each.position for each in marks.lookups] == [39, 41, 48]
    assert [each.sources for each in marks.lookups] == [(23,), (30,), (44,)]
    assert marks.mark(23, 39) == "live" and marks.mark(23, 46) == "dead"
    assert marks.mark(19, 39) == "dead" and marks.mark(3, 39) == "prompt"
