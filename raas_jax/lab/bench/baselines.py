"""What `raas-jax bench` times beside a policy: transformers, and this library with a dense cache.

A baseline is brought to a generated length by reading prompt and generated tokens as one prompt;
the steps that are timed are the same.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from raas_jax.aot.memory import Programs
from raas_jax.decode import Plan, decode_pages, prefill, request
from raas_jax.engine.autosize import largest_batch as largest
from raas_jax.lab.bench.run import CHUNK, Run
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy
from raas_jax.policies.base import pages_for
from raas_jax.sampling import Sampler, Sampling, row_keys

WHOLE_RUNS = 2048
"""Up to this length, transformers' generate is also timed from the first token to the last."""


class Baseline(Protocol):
    """A model of transformers at one length; `whole_seconds` where a whole run was timed."""

    whole_seconds: float | None

    def time_chunk(self) -> float:
        """Seconds per step."""


class _Generate:
    """Hugging Face's dense generate, brought to a generated length by reading it as a prompt."""

    def __init__(self, model: Any, prompt: np.ndarray, run: Run, whole: bool) -> None:
        import torch

        self.model, self.chunk = model, run.chunk
        self.whole_seconds: float | None = None
        if whole:
            start = time.perf_counter()
            count = run.tokens.shape[1] + run.chunk
            self._generate(torch.as_tensor(prompt.astype(np.int64)), None, count)
            self.whole_seconds = time.perf_counter() - start
        tokens = np.concatenate([prompt, run.tokens], axis=1).astype(np.int64)
        self.tokens = torch.as_tensor(tokens)
        with torch.no_grad():
            self.cache = model(self.tokens[:, :-1], logits_to_keep=1).past_key_values

    def time_chunk(self) -> float:
        """Seconds per step, the first one left out since it sets up the call."""
        stamps = self._generate(self.tokens, copy.deepcopy(self.cache), self.chunk + 1)
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    def _generate(self, tokens: Any, cache: Any, count: int) -> list[float]:
        import torch

        stamps: list[float] = []

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[note],
        )
        assert len(stamps) == count
        return stamps


class _StaticCache:
    """Transformers with a static cache and a compiled forward pass: its quickest on a GPU."""

    whole_seconds: float | None = None

    def __init__(self, model: Any, prompt: np.ndarray, run: Run, *, compiled: bool) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.chunk = model, run.chunk
        tokens = np.concatenate([prompt, run.tokens], axis=1).astype(np.int64)
        self.tokens = torch.as_tensor(tokens).to(model.device)
        self.cache = StaticCache(model.config, max_cache_len=tokens.shape[1] + run.chunk)
        self.forward = model.forward
        if compiled:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
            self.time_chunk()  # Compiles.

    def time_chunk(self) -> float:
        """Seconds per step, greedy, with nothing but the forward pass and an argmax."""
        import torch

        with torch.no_grad():
            self.cache.reset()
            self.model(self.tokens[:, :-1], past_key_values=self.cache, logits_to_keep=1)
            token = self.tokens[:, -1:]
            self._wait()
            start = time.perf_counter()
            for _ in range(self.chunk):
                out = self.forward(token, past_key_values=self.cache)
                # A copy, since a compiled step reuses the memory of its results.
                token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
            self._wait()
        return (time.perf_counter() - start) / self.chunk

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def transformers(params: Params, prompt: np.ndarray, runs: dict[int, Run]) -> dict[int, Baseline]:
    """The same weights in transformers, for every length.

    Raises:
      ValueError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            "--against transformers needs torch. Install it: pip install 'raas-jax[dev]'."
        ) from None
    import transformers

    from raas_jax.weights.hf import save_hf

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        save_hf(params, path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        model.generation_config.eos_token_id = None
    if torch.cuda.is_available():
        model = model.to("cuda")
        return {
            length: _StaticCache(model, prompt, run, compiled=True) for length, run in runs.items()
        }
    return {
        length: _Generate(model, prompt, run, whole=length <= WHOLE_RUNS)
        for length, run in runs.items()
    }


def dense(params: Params, prompt: np.ndarray, runs: dict[int, Run]) -> dict[int, Run]:
    """This library's own steps with a cache that forgets nothing, for every length.

    Its slots are a bucket, up to half as many again as the tokens need.
    """
    return {length: _dense(params, prompt, run) for length, run in runs.items()}


def _dense(params: Params, prompt: np.ndarray, run: Run) -> Run:
    tokens = np.concatenate([prompt, run.tokens], axis=1)
    batch, length = tokens.shape
    policy = Dense()
    plan = Plan.create(params.config, policy, [length] * batch, 2 * run.chunk)
    sampler = Sampler.create([Sampling()] * batch, row_keys(0, batch))
    asked = request(jnp.full(batch, 4 * run.chunk), (), sampler)
    lengths = jnp.full(batch, length, jnp.int32)
    start = time.perf_counter()
    state, _ = prefill(params, jnp.asarray(tokens, jnp.int32), lengths, asked, plan=plan)
    pages = pages_for(run.chunk, policy.page_size)
    step = decode_pages.lower(params, state, plan=plan, pages=pages).compile()
    compiled = time.perf_counter() - start
    return Run(step, state, pages * policy.page_size, run.tokens, compiled, compiled)


def largest_batch(params: Params, prompt_tokens: int, generated: int, policy: Policy) -> int:
    """Rows that fit on this device when each generates so many tokens; nothing is run."""
    dtype = params.weights["embedding"].dtype
    pages = pages_for(CHUNK, policy.page_size)

    def account(rows: int) -> list[Any]:
        programs = Programs.create(
            params.config, policy, [prompt_tokens] * rows, generated, dtype, None
        )
        return [programs.decode(pages)]

    return largest(account, 1, None)
