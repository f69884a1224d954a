"""What `raas-jax bench` times beside a policy: other decoders of the same weights.

A baseline is brought to a generated length by reading prompt and generated tokens as one prompt;
the steps that are timed are the same.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from raas_jax.decode import cache_bytes
from raas_jax.lab.bench.llama_cpp import LlamaCpp
from raas_jax.lab.bench.turns import TimedDecode, timed
from raas_jax.params import Params
from raas_jax.policies import Dense, pages_for
from raas_jax.session import Session

NAMES = ("transformers", "llama.cpp", "dense")
WHOLE_RUNS = 2048
"""Up to this length, transformers' generate is also timed from the first token to the last."""


class Baseline(Protocol):
    """A decoder at one length.

    Attributes:
      whole_seconds: of a run from the first token to the last, where one was timed.
      kv_bytes: memory of its cache, where that is known.
    """

    @property
    def whole_seconds(self) -> float | None: ...
    @property
    def kv_bytes(self) -> int | None: ...
    def time_chunk(self) -> float:
        """Seconds per step."""


def of_name(name: str, params: Params, prompt_tokens: int) -> Callable[[np.ndarray, int], Baseline]:
    """Takes tokens `[B, T]`, the first `prompt_tokens` the prompt, and the steps to time.

    Raises ValueError for one that is not installed, or that cannot run the model.
    """
    if name == "transformers":
        return partial(_Transformers(params).begin, prompt_tokens)
    return LlamaCpp(params).begin if name == "llama.cpp" else partial(_Dense, params)


class _Generate:
    """Hugging Face's dense generate, brought to a generated length by reading it as a prompt."""

    kv_bytes: int | None = None

    def __init__(self, model: Any, tokens: np.ndarray, chunk: int, prompt_tokens: int) -> None:
        import torch

        self.model, self.chunk = model, chunk
        self.tokens = torch.as_tensor(tokens.astype(np.int64))
        self.whole_seconds: float | None = None
        generated = tokens.shape[1] - prompt_tokens
        if generated < WHOLE_RUNS:
            whole = self.tokens[:, :prompt_tokens], None, generated + chunk
            _, self.whole_seconds = timed(partial(self._generate, *whole))
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


class StaticCache:
    """Transformers with a static cache and a compiled forward pass: its quickest on a GPU."""

    whole_seconds: float | None = None
    kv_bytes: int | None = None

    def __init__(self, model: Any, tokens: np.ndarray, chunk: int, *, compiled: bool) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.chunk = model, chunk
        self.tokens = torch.as_tensor(tokens.astype(np.int64)).to(model.device)
        self.cache = StaticCache(model.config, max_cache_len=tokens.shape[1] + chunk)
        self.forward = model.forward
        if compiled:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
            self.time_chunk()  # Compiles.

    def time_chunk(self) -> float:
        """Seconds per step, greedy, with nothing but the forward pass and an argmax."""
        import torch

        def wait() -> None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()

        with torch.no_grad():
            self.cache.reset()
            self.model(self.tokens[:, :-1], past_key_values=self.cache, logits_to_keep=1)
            token = self.tokens[:, -1:]
            wait()
            start = time.perf_counter()
            for _ in range(self.chunk):
                out = self.forward(token, past_key_values=self.cache)
                # A copy, since a compiled step reuses the memory of its results.
                token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
            wait()
        return (time.perf_counter() - start) / self.chunk


class _Transformers:
    """The same weights in transformers."""

    def __init__(self, params: Params) -> None:
        """Takes the weights through a temporary folder. Raises ValueError without torch."""
        try:
            import torch
        except ImportError:
            raise ValueError("it needs torch: pip install torch.") from None
        import transformers

        from raas_jax.weights.hf import save_hf

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model")
            save_hf(params, path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        model.generation_config.eos_token_id = None
        self._model: Any = model.to("cuda") if torch.cuda.is_available() else model

    def begin(self, prompt_tokens: int, tokens: np.ndarray, chunk: int) -> _Generate | StaticCache:
        """After these tokens `[B, T]`, of which the first `prompt_tokens` are the prompt."""
        if self._model.device.type == "cuda":
            return StaticCache(self._model, tokens, chunk, compiled=True)
        return _Generate(self._model, tokens, chunk, prompt_tokens)


class _Dense:
    """This library's own steps, with a cache that forgets nothing.

    Its slots are a bucket, up to half as many again as the tokens need.
    """

    whole_seconds: float | None = None

    def __init__(self, params: Params, tokens: np.ndarray, chunk: int) -> None:
        """After tokens `[B, T]`."""
        session = Session.create(params, Dense(), [tokens.shape[1]] * len(tokens), 2 * chunk)
        pages = pages_for(chunk, session.plan.page_size)
        decode = TimedDecode.start(session, tokens.tolist(), 0, pages)
        self.time_chunk = decode.time_chunk
        self.kv_bytes = cache_bytes(decode.state)
