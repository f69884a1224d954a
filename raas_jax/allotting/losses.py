"""What each head of a model loses with fewer pages, in nats of the next token's distribution.

A head that sees only some of a text gives another output than the dense one, `d` apart. To second
order the divergence KL(dense || changed) of all next tokens is half of `dᵀ F d`, F the Fisher
information of the outputs: the mean of `g gᵀ`, where g is the gradient of the log-likelihood of
tokens that are drawn from the model itself. So half of `(g · d)²`, summed over the head's own
group of query heads, is what the head's loss costs at a token. Heads and tokens are taken for
themselves: what their losses do together is left out.

Layers are read one at a time, forwards for their inputs and backwards for the gradients. Those that
see a window forget nothing that they could read: they only hand on what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from raas_jax import identity
from raas_jax.allotting.dense import backward, backward_through, embed, forward
from raas_jax.allotting.simulate import Sums, simulate
from raas_jax.model import ends
from raas_jax.params import Params
from raas_jax.policies import Allotment, Budgeted
from raas_jax.scoring import in_blocks

PAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes at which heads are looked at, as far as the texts go."""


def curves(
    params: Params,
    texts: Sequence[Sequence[int]],
    *,
    policy: Budgeted,
    prompt_tokens: int,
    seed: int,
    temperature: float,
    progress: bool | None,
) -> Allotment:
    """What each key/value head loses at several sizes, by a policy of `simulated`.

    Of the layers that see everything.

    See `allot`.
    """
    P = policy.page_size
    tokens, prompt, sizes = checked(texts, prompt_tokens, policy)
    B, T = tokens.shape
    params = params.stacked()  # One program serves all layers.
    places, L = params.config.layer_places, params.config.full_layers
    hidden = None if progress is None else not progress
    with tqdm(total=2 * len(places), unit="layer", disable=hidden) as bar:
        inputs = [[embed(params, jnp.asarray(row))] for row in tokens]
        for number, (kind, _) in enumerate(places):
            for of_text in inputs:
                of_text.append(forward(params, of_text[-1], jnp.int32(number), kind=kind))
            bar.update()
        root = jax.random.key(seed)
        back = [
            _drawn_gradient(params, of_text.pop(), jax.random.fold_in(root, row), temperature)
            for row, of_text in enumerate(inputs)
        ]
        losses = np.zeros((L, params.config.num_key_value_heads, len(sizes)))
        for number, (kind, place) in reversed(list(enumerate(places))):
            found, of_layer = [], jnp.int32(number)
            for row, of_text in enumerate(inputs):
                x = of_text.pop()
                if kind == "window":
                    back[row] = backward_through(params, x, back[row], of_layer, kind=kind)
                    continue
                found.append(backward(params, x, back[row], of_layer, prompt=prompt, P=P))
                back[row] = found[-1].at_input
            bar.update()
            if not found:
                continue
            seen = jax.tree.map(lambda *x: jnp.stack(x), *(each.seen for each in found))
            held = simulate(policy, sizes, seen)
            for row, each in enumerate(found):
                losses[place] += np.asarray(_losses(each.seen.mass, each.worth, held[:, row])).T
    # With room for all of it, nothing of a text is lost.
    whole = (T - prompt) // P
    curves = np.concatenate([losses / B, np.zeros_like(losses[..., :1])], axis=-1)
    made = {
        "policy": type(policy).__name__,
        "texts": B,
        "tokens": T,
        "prompt_tokens": prompt,
        "measure": "nats",
        "seed": seed,
        "temperature": temperature,
    }
    return Allotment(np.asarray([*sizes, whole]) * P, curves, identity.likeness(params), made)


def room(length: int, prompt_tokens: int, policy: Budgeted) -> tuple[int, int, tuple[int, ...]]:
    """What texts of so many tokens have room for.

    Returns:
      Tokens of the prompt, whole pages; pages after it; and the sizes that can be looked at, pages.

    Raises:
      ValueError: there are fewer than two such sizes, whatever the texts or in these.
    """
    P, least = policy.page_size, policy.least_pages
    prompt = -(-max(prompt_tokens, 1) // P) * P
    pages = max(0, length - prompt) // P
    possible = [size for size in PAGES if size >= least]
    if len(possible) < 2:
        raise ValueError(
            f"policy is {policy!r}, which never evicts {least} pages of a head; sizes up to "
            f"{PAGES[-1]} are looked at. Use a larger page_size, or reserve less."
        )
    sizes = tuple(size for size in possible if size < pages)
    if len(sizes) < 2:
        raise ValueError(
            f"texts have {pages} pages of {P} tokens after the prompt; give longer ones, of a "
            f"length of at least {prompt + (possible[1] + 1) * P}, or use a smaller page_size."
        )
    return prompt, pages, sizes


def checked(
    texts: Sequence[Sequence[int]], prompt_tokens: int, policy: Budgeted
) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """The tokens `[B, T]`, whole pages after the prompt; the prompt, whole pages; and the sizes."""
    lengths = {len(text) for text in texts}
    if len(lengths) != 1:
        raise ValueError(
            f"texts have the lengths {sorted(lengths)}; give at least one, all of one length."
        )
    prompt, pages, sizes = room(lengths.pop(), prompt_tokens, policy)
    whole = prompt + pages * policy.page_size
    return np.asarray(texts, np.int32)[:, :whole], prompt, sizes


@jax.jit
def _drawn_gradient(params: Params, x: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """Gradient, at the last layer's outputs `[1, T, D]`, of the likelihood of drawn next tokens."""
    model = ends(params.config, params.weights)

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, number = block
        keys = jax.vmap(partial(jax.random.fold_in, key))(number[:, 0])
        logits, pull = jax.vjp(lambda x: model.logits(x[:, 0]), x)
        drawn = jax.vmap(jax.random.categorical)(keys, logits / temperature)
        above = jax.nn.one_hot(drawn, logits.shape[-1]) - jax.nn.softmax(logits / temperature)
        gradient: jax.Array = pull(above / temperature)[0]
        return gradient

    by_token = jnp.swapaxes(x, 0, 1)
    found: jax.Array = in_blocks(of_block, (by_token, jnp.arange(len(by_token))[:, None]))
    return jnp.swapaxes(found, 0, 1)


@jax.jit
def _losses(mass: Sums, worth: Sums, held: jax.Array) -> jax.Array:
    """Mean over the tokens after the prompt, in nats: `[sizes, K]`, of held `[n, sizes, K, n]`."""
    dense = jnp.sum(worth.always + jnp.sum(worth.page, axis=-1), axis=1)
    return jnp.mean((read_under(mass, worth, held) - dense) ** 2, axis=-1) / 2


@jax.jit
def read_under(mass: Sums, worth: Sums, held: jax.Array) -> jax.Array:
    """`g · out` of each head under each size: `[sizes, K, t]`, of held `[n, sizes, K, n]`.

    The heads of a group hold the same pages: what they read, they read together.
    """
    t, n = mass.page.shape[2:]
    written = jnp.arange(t) // (t // n)

    def of_size(held: jax.Array) -> jax.Array:
        visible = (held | jnp.eye(n, dtype=bool)[:, None])[written]
        visible = jnp.swapaxes(visible, 0, 1)[:, None]

        def left(sums: Sums) -> jax.Array:
            return sums.always + jnp.sum(jnp.where(visible, sums.page, 0.0), axis=-1)

        return jnp.sum(left(worth) / left(mass), axis=1)

    found: jax.Array = jax.lax.map(of_size, jnp.swapaxes(held, 0, 1))
    return found
