"""What is compared of one model: logits, greedy tokens, tensors, the engine, a mesh, policies."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from raas_jax import weights
from raas_jax.engine import Engine, Request
from raas_jax.generation import generate
from raas_jax.lab.parity.models import BASE, make_model
from raas_jax.model import forward
from raas_jax.params import Params
from raas_jax.policies import Policy, RaaS, create, pages_for
from raas_jax.sampling import Sampling

TOLERANCE = 2e-4
"""Of logits in float32, whose standard deviation is about one."""
NEW_TOKENS = 64
SHORT, TEXT = 5, 40
"""Tokens of a prompt within most windows, and of the texts whose logits are compared."""
POLICIES: dict[str, dict[str, Any]] = {
    "raas": {},
    "quest": {},
    "sink": {"prompt": "included"},
    "h2o": {"prompt": "evict"},
}
"""One that keeps the prompt, one that chooses pages to read, and two that may evict the prompt."""


@dataclasses.dataclass
class Parity:
    """What was found of one model; None is what does not apply, or was not asked for.

    Attributes:
      logits: the largest difference of a logit, float32, over `[2, TEXT]` tokens.
      greedy: whether all `NEW_TOKENS` tokens are the same.
      windowed: the same after a prompt that is longer than the window.
      exported: whether the tensors written are those read, by name, shape, dtype and bytes.
      engine: whether rows of the engine under a tight budget draw what `generate` draws.
      mesh: the same, on a mesh.
      policies: those of `POLICIES` whose tokens are the same where their budget covers all.
    """

    logits: float
    greedy: bool
    windowed: bool | None
    exported: bool
    engine: bool | None = None
    mesh: bool | None = None
    policies: tuple[str, ...] | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing was found to differ."""
        told = (self.greedy, self.windowed, self.exported, self.engine, self.mesh)
        missing = self.policies is not None and set(self.policies) != set(POLICIES)
        return self.logits <= TOLERANCE and False not in told and not missing


REFUSED = Parity(math.inf, False, None, False)
"""Of a model that is not even read, or not written."""


class Made(NamedTuple):
    """A random model, in transformers and here, and the folder of its files."""

    theirs: Any
    ours: Params
    folder: Path


@contextlib.contextmanager
def made(variant: str) -> Iterator[Made]:
    """A variant of `models.CASES`, for a while.

    Raises ImportError without torch, and ValueError where this library refuses it.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    model = make_model(variant)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Made(model, weights.load(folder, dtype="float32"), Path(folder))


def compare(made: Made, *, whole: bool = True, mesh: Mesh | None = None) -> Parity:
    """Compares a model with transformers.

    Args:
      made: the model.
      whole: the engine and policies, too.
      mesh: for the engine, beside one device.
    """
    model, params, folder = made
    window = params.config.window
    prompt = _prompt(_beyond_the_original(params, 21))
    wanted = _greedy(model, prompt)
    found = Parity(
        logits=_logits(model, params),
        greedy=_generated(params, prompt) == wanted,
        windowed=None,
        exported=_exported(folder),
    )
    if window:
        # Once within the window, which the answer leaves, and once beyond it.
        found.windowed = found.greedy if len(prompt) > window else None
        short = _prompt(min(SHORT, window))
        found.greedy = found.greedy and _generated(params, short) == _greedy(model, short)
    if whole:
        found.engine = _by_the_engine(params, None)
        found.mesh = None if mesh is None else _by_the_engine(params, mesh)
        found.policies = tuple(
            name
            for name, policy in _covering(params, len(prompt)).items()
            if _generated(params, prompt, policy) == wanted
        )
    return found


def _page(params: Params) -> int:
    """Tokens of a page: few, and no more than a window has."""
    return min(4, params.config.window or 4)


def _beyond_the_original(params: Params, length: int) -> int:
    # Where a text of a longrope leaves the original context, transformers changes the factors of
    # what is cached; it begins beyond, where both have the long ones.
    rope = params.config.rope
    if rope.kind != "longrope":
        return length
    return max(length, rope.original_max_position_embeddings + 1)


def _prompt(length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(2, BASE["vocab_size"], length).tolist()
    return tokens


def _logits(model: Any, params: Params) -> float:
    import torch

    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, TEXT))
    with torch.no_grad():
        wanted = _fresh(model)(torch.tensor(tokens)).logits.float().numpy()
    run = jax.jit(forward, static_argnums=0)
    found = run(params.config, params.weights, jnp.asarray(tokens, jnp.int32))
    return float(np.max(np.abs(np.asarray(found) - wanted)))


def _fresh(model: Any) -> Any:
    """A copy, since a dynamic rope of transformers remembers the longest text that it has read."""
    return copy.deepcopy(model)


def _greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    import torch

    # The cache of transformers keeps everything for a window of one token; its masks do not.
    cached = getattr(model.config, "sliding_window", None) != 1
    with torch.no_grad():
        answer = _fresh(model).generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=cached,
        )
    tokens: list[int] = answer[0, len(prompt) :].tolist()
    return tokens


def _generated(params: Params, prompt: Sequence[int], policy: Policy | None = None) -> list[int]:
    policy = policy or RaaS(NEW_TOKENS, page_size=_page(params))
    out = generate(params, list(prompt), policy=policy, max_new_tokens=NEW_TOKENS)
    return list(out.tokens)


def _exported(folder: Path) -> bool:
    """Whether what is written of a folder has its tensors."""
    with tempfile.TemporaryDirectory() as other:
        weights.convert(folder, Path(other) / "model", to="hf")
        theirs = load_file(folder / "model.safetensors")
        ours = load_file(Path(other) / "model" / "model.safetensors")

    def same(name: str) -> bool:
        a, b = theirs[name], ours[name]
        return bool(a.dtype == b.dtype and a.shape == b.shape) and a.tobytes() == b.tobytes()

    return theirs.keys() == ours.keys() and all(map(same, theirs))


def _covering(params: Params, prompt: int) -> dict[str, Policy]:
    """`POLICIES` with budgets that hold prompt and answer."""
    page = _page(params)
    budget = (pages_for(prompt + NEW_TOKENS, page) + 2) * page
    return {
        name: create(name, budget=budget, page_size=page, **options)
        for name, options in POLICIES.items()
    }


def _by_the_engine(params: Params, mesh: Mesh | None) -> bool:
    """More requests than rows, of a budget that evicts, greedy and sampled."""
    page, new = _page(params), 30
    policy = RaaS(4 * page, page_size=page)
    requests = [
        Request(
            number,
            _prompt(3 + 7 * number % 26),
            Sampling(temperature=number % 2),
            seed=number,
            max_new_tokens=4 + 11 * number % (new - 4),
        )
        for number in range(12)
    ]
    wanted = {
        request.id: alone.tokens[: request.max_new_tokens]
        for chosen in (requests[::2], requests[1::2])
        for request, alone in zip(chosen, _alone(params, policy, chosen, new), strict=True)
    }
    engine = Engine(
        params,
        policy=policy,
        rows=4,
        max_new_tokens=new,
        max_prompt_tokens=32,
        prefill_rows=1,
        mesh=mesh,
    )
    return {result.id: result.tokens for result in engine.run(requests)} == wanted


def _alone(params: Params, policy: Policy, requests: Sequence[Request], new: int) -> Iterable[Any]:
    """What `generate` gives for requests of one way of sampling."""
    outs: Iterable[Any] = generate(
        params,
        [request.prompt for request in requests],
        policy=policy,
        sampling=requests[0].sampling,
        seed=[request.seed for request in requests],
        max_new_tokens=new,
    )
    return outs
