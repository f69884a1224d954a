"""An allotment for one budget, found where it will be used: on a model that forgets already.

Beside a model that forgets nothing, one head after the other looks dispensable, since what it
forgets others still know; all together they may not be. So the model is run as it would decode
under an allotment, all tokens of a layer at once, and the gradient of KL(dense || forgetting) says
what every head would win with more pages, and lose with fewer. Pages go from those that lose least
to those that win most; a step that does not lower the divergence is halved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from raas_jax.allotting.dense import backward, backward_through, embed, forward, pages_seen
from raas_jax.allotting.losses import checked, read_under
from raas_jax.allotting.simulate import simulate
from raas_jax.model import ends
from raas_jax.params import Params
from raas_jax.policies import Allotment, Budgeted
from raas_jax.scoring import in_blocks

GRID = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256)
"""Sizes in pages that a head may have, as far as the texts go."""
FIRST_STEP, LAST_STEP = 1.0, 0.1
"""By what share of its pages a head may grow at once."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """The texts under an allotment.

    Attributes:
      chosen: number in the grid of each head's size, `[L, K]`, of layers that see everything.
      divergence: KL(dense || forgetting), mean over the tokens after the prompt, nats.
      back: its gradient, at what the last layer gives of every text, `[1, T, D]`.
      inputs: of every layer, and then what the last one gives; of every text `[1, T, D]`.
      held: bool `[n, B, sizes, K, n]`, see `simulate`, of every layer; None where it is a window.
    """

    chosen: np.ndarray
    divergence: float
    back: list[jax.Array]
    inputs: list[list[jax.Array]]
    held: list[jax.Array | None]


def refine(
    params: Params,
    texts: Sequence[Sequence[int]],
    start: Allotment,
    *,
    policy: Budgeted,
    prompt_tokens: int,
    rounds: int,
    progress: bool | None = None,
) -> Allotment:
    """The shares of the policy's budget, from those of `start` on or from equal ones.

    From whichever of the two diverges less, both in sizes of the grid: a mean of 13 pages begins,
    and is called even, at 12. See `allot` for the rest.
    """
    tokens, prompt, _ = checked(texts, prompt_tokens, policy)
    P, mean = policy.page_size, policy.budget // policy.page_size
    model = _Model(params.stacked(), tokens, prompt, policy)
    hidden = None if progress is None else not progress
    with tqdm(total=rounds, unit="round", disable=hidden) as bar:
        given = start.pages(mean, P, policy.least_pages)
        even, other = (
            model.run(model.nearest(each)) for each in (np.full_like(given, mean), given)
        )
        best = min(even, other, key=lambda found: found.divergence)
        changes, step = model.changes(best), FIRST_STEP
        for _ in range(rounds):
            bar.set_postfix_str(f"KL {best.divergence:.4g}, evenly {even.divergence:.4g}")
            moved = model.run(model.moved(best.chosen, changes, step, mean))
            bar.update()
            if moved.divergence < best.divergence:
                best, changes = moved, model.changes(moved)
            elif (step := step / 2) < LAST_STEP:
                break
    made = {
        **start.made,
        "measure": "divergence",
        "budget": policy.budget,
        "evenly": even.divergence,
        "refined": best.divergence,
    }
    return Allotment.proportional(model.grid[best.chosen], start.model, made)


class _Model:
    """A model and texts, run under allotments whose sizes are those of a grid."""

    def __init__(self, params: Params, tokens: np.ndarray, prompt: int, policy: Budgeted):
        self.params, self.policy, P = params, policy, policy.page_size
        self.at = {"prompt": prompt, "P": P}
        self.places = params.config.layer_places
        self.shape = params.config.full_layers, params.config.num_key_value_heads
        pages = (tokens.shape[1] - prompt) // P
        self.grid = np.asarray([size for size in GRID if policy.least_pages <= size < pages])
        self.embedded = [embed(params, jnp.asarray(row)) for row in tokens]
        self.dense = [self._dense(x) for x in self.embedded]

    def _dense(self, x: jax.Array) -> jax.Array:
        for number, (kind, _) in enumerate(self.places):
            x = forward(self.params, x, jnp.int32(number), kind=kind)
        return x

    def nearest(self, pages: np.ndarray) -> np.ndarray:
        """The largest sizes of the grid that are no larger; the smallest where there are none."""
        return np.maximum(np.searchsorted(self.grid, pages, side="right") - 1, 0)

    def run(self, chosen: np.ndarray) -> Pass:
        """The texts under so large caches."""
        sizes = tuple(self.grid.tolist())
        inputs: list[list[jax.Array]] = [self.embedded]
        kept: list[jax.Array | None] = []
        for number, (kind, place) in enumerate(self.places):
            x, layer = inputs[-1], jnp.int32(number)
            if kind == "window":
                inputs.append([forward(self.params, each, layer, kind=kind) for each in x])
                kept.append(None)
                continue
            seen = [pages_seen(self.params, each, layer, **self.at) for each in x]
            held = simulate(self.policy, sizes, jax.tree.map(lambda *x: jnp.stack(x), *seen))
            kept.append(held)
            after = [
                forward(self.params, each, layer, self._own(held, row, chosen[place]), **self.at)
                for row, each in enumerate(x)
            ]
            inputs.append(after)
        ended = [
            _divergence(self.params, each, dense, self.at["prompt"])
            for each, dense in zip(inputs[-1], self.dense, strict=True)
        ]
        divergence = float(np.mean([each for each, _ in ended]))
        return Pass(chosen, divergence, [back for _, back in ended], inputs, kept)

    def _own(self, held: jax.Array, row: int, chosen: np.ndarray) -> jax.Array:
        """What each head really holds of a text: `[n, K, n]`."""
        return held[:, row, jnp.asarray(chosen), jnp.arange(len(chosen))]

    def changes(self, found: Pass) -> np.ndarray:
        """By how much the divergence changes with each size of each head, `[L, K, sizes]`."""
        back = list(found.back)
        changes = np.zeros((*self.shape, len(self.grid)))
        for number, (kind, place) in reversed(list(enumerate(self.places))):
            layer, held = jnp.int32(number), found.held[number]
            for row, x in enumerate(found.inputs[number]):
                if held is None:
                    back[row] = backward_through(self.params, x, back[row], layer, kind=kind)
                    continue
                own = self._own(held, row, found.chosen[place])
                of_text = backward(self.params, x, back[row], layer, own, **self.at)
                back[row] = of_text.at_input
                read = read_under(of_text.seen.mass, of_text.worth, held[:, row])
                changes[place] += np.asarray(jnp.sum(read, axis=-1)).T
        current = np.take_along_axis(changes, found.chosen[..., None], axis=-1)
        relative: np.ndarray = (changes - current) / len(back)
        return relative

    def moved(self, chosen: np.ndarray, changes: np.ndarray, step: float, mean: int) -> np.ndarray:
        """The sizes of the least expected divergence within a step of the present ones."""
        pages, expected = self.grid[chosen], _never_rising(changes, chosen)
        low = self.nearest(np.ceil(pages / (1 + step)).astype(int))
        high = np.maximum(self.nearest(np.floor(pages * (1 + step)).astype(int)), chosen + 1)
        low, high = np.minimum(low, np.maximum(chosen - 1, 0)), np.minimum(high, len(self.grid) - 1)
        now: np.ndarray = low.copy()
        left = mean * low.size - int(np.sum(self.grid[low]))
        while True:
            saved, to = self._best_steps(now, high, expected, left)
            head = np.unravel_index(np.argmax(saved), saved.shape)
            if saved[head] < 0:
                return now
            left -= int(self.grid[to[head]] - self.grid[now[head]])
            now[head] = to[head]

    def _best_steps(
        self, now: np.ndarray, high: np.ndarray, changes: np.ndarray, left: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What each head's best step up saves per page, -1 if none fits; and where it leads."""
        index = np.arange(len(self.grid))
        more = self.grid - self.grid[now][..., None]
        there = (index > now[..., None]) & (index <= high[..., None]) & (more <= left)
        lost = np.take_along_axis(changes, now[..., None], axis=-1) - changes
        per_page = np.where(there, lost / np.maximum(more, 1), -1.0)
        return np.max(per_page, axis=-1), np.argmax(per_page, axis=-1)


def _never_rising(changes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The changes as they can be believed: more pages than now cost nothing, and fewer save none.

    Where a slope says otherwise, it is only a slope.
    """
    above = np.arange(changes.shape[-1]) > chosen[..., None]
    up = np.minimum.accumulate(np.where(above, changes, 0.0), axis=-1)
    down = np.maximum.accumulate(np.where(above, 0.0, changes)[..., ::-1], axis=-1)[..., ::-1]
    return np.where(above, up, np.maximum(down, 0.0))


@partial(jax.jit, static_argnames="prompt")
def _divergence(
    params: Params, x: jax.Array, dense: jax.Array, prompt: int
) -> tuple[jax.Array, jax.Array]:
    """KL(dense || x), mean over the tokens after the prompt, and its gradient, of `[1, T, D]`."""
    model, T = ends(params.config, params.weights), x.shape[1]

    def of_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, dense = block
        wanted = jax.nn.log_softmax(model.logits(dense[:, 0]), axis=-1)
        logits, pull = jax.vjp(lambda x: model.logits(x[:, 0]), x)
        logs = jax.nn.log_softmax(logits, axis=-1)
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - logs), axis=-1)
        gradient: jax.Array = pull((jnp.exp(logs) - jnp.exp(wanted)).astype(logits.dtype))[0]
        return divergence[:, None], gradient

    by_token = tuple(jnp.swapaxes(each, 0, 1) for each in (x, dense))
    divergence, gradient = in_blocks(of_block, by_token)
    after = jnp.asarray(np.arange(T) >= prompt, jnp.float32)[:, None] / (T - prompt)
    scaled = (gradient * after[..., None]).astype(x.dtype)
    return jnp.sum(divergence * after), jnp.swapaxes(scaled, 0, 1)
