"""Belady's victims: brute force on tiny histories, and the whole round trip through a decode."""

import itertools

import numpy as np
import pytest
from tiny import WINDOWS, prompts_of, random_params

from raas_jax import Dense, RaaS
from raas_jax.lab.inspect.ceiling import accesses, belady, ceiling, next_access
from raas_jax.lab.inspect.recording import record
from raas_jax.lab.runs import LemmaTask

P = 2


def first_loss(script, used, slots):
    """The first step at which a page is used that is gone; the number of steps if there is none."""
    held = {}
    for step in range(len(used)):
        if step and step % P == 0:
            page = step // P - 1
            held[script[page]] = page
        written = set(range(step // P))
        for page in written - set(held.values()):
            if used[step][page]:
                return step
    return len(used)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_is_used_is_lost_sooner_than_it_must_be(seed):
    """Of all possible sequences of victims none holds out longer (slots 2, pages 6)."""
    pages, slots = 6, 2
    rng = np.random.default_rng(seed)
    used = rng.random((pages * P, 1, 1, pages)) < 0.2
    script = belady(used, P, slots, pages)[0, 0].tolist()
    assert script[:slots] == [0, 1] and set(script) <= {0, 1}
    best = max(
        first_loss([0, 1, *rest], used[:, 0, 0], slots)
        for rest in itertools.product(range(slots), repeat=pages - slots)
    )
    assert first_loss(script, used[:, 0, 0], slots) == best


def test_by_hand():
    """Pages 0, 1 | 2, 3: page 0 is used at step 7, page 1 never again, page 2 at step 9."""
    used = np.zeros((10, 1, 1, 5), bool)
    used[7, 0, 0, 0] = used[9, 0, 0, 2] = True
    assert next_access(used)[4, 0, 0].tolist() == [7, NEVER, 9, NEVER, NEVER]
    # At step 6 page 2 takes the place of page 1; at step 8 page 0 has had its last use, and page 3
    # takes its place; what comes after the record goes round, the oldest page first.
    assert belady(used, P, 2, 6)[0, 0].tolist() == [0, 1, 1, 0, 1, 0]


NEVER = np.iinfo(np.int32).max


def test_the_recorded_future_is_followed(params):
    """Victims in the decode are the script's; with room for all, the answer is the dense one."""
    task = LemmaTask(problems=2, smallest=4, largest=4, max_new_tokens=23)
    items = task.items(params)
    ask = [[item.prompt for item in items], [item.limit for item in items]]
    dense = dict(record(params, *ask, Dense(page_size=P), stop_tokens=()))
    policy, answer = ceiling(24, P, 23, 0.1)
    ample = dict(answer(params, *ask, policy, stop_tokens=()))
    assert [ample[i].tokens for i in (0, 1)] == [dense[i].tokens for i in (0, 1)]

    watched = dict(
        record(params, *ask, RaaS(32, 0.1, page_size=P), stop_tokens=(), every_step=True)
    )
    policy, answer = ceiling(6, P, 23, 0.1)
    tight = dict(answer(params, *ask, policy, stop_tokens=(), rows=3))
    for index in (0, 1):
        script = belady(accesses(watched[index].stamps), P, 3, policy.boundaries)
        present = tight[index].present
        for layer, head in itertools.product(range(2), range(2)):
            held = {}
            for page in range(len(present)):
                wanted = np.zeros(len(present), bool)
                wanted[[*held.values(), page]] = True
                np.testing.assert_array_equal(present[page, layer, head], wanted)
                held[script[layer, head, page]] = page


def test_layers_that_see_a_window_have_no_victims():
    """The script is that of the layers that see everything, in their order."""
    sharp, prompts, limits = random_params(WINDOWS, sharpness=3.0), prompts_of([5, 6]), [27, 27]
    ask = [sharp, prompts, limits]
    dense = dict(record(*ask, RaaS(32, 0.12, page_size=P), stop_tokens=(), every_step=True))
    policy, answer = ceiling(6, P, 27, 0.12)
    tight = dict(answer(*ask, policy, stop_tokens=()))
    assert policy.boundaries == 14
    for index in (0, 1):
        accessed = accesses(dense[index].stamps)
        assert accessed.shape[1] == 2
        script, present = belady(accessed, P, 3, 14), tight[index].present
        for layer, head in itertools.product(range(2), range(2)):
            held = {}
            for page in range(len(present)):
                assert set(np.flatnonzero(present[page, layer, head])) == {*held.values(), page}
                held[script[layer, head, page]] = page


def test_accesses_are_what_exceeds_the_threshold(params):
    """A page counts as used at a step exactly where its stamp is that step's clock."""
    stamps = np.array([[1, -1], [1, 2], [3, 2]], np.int32).reshape(3, 1, 1, 2)
    wanted = [[True, False], [False, True], [True, False]]
    assert accesses(stamps)[:, 0, 0].tolist() == wanted
