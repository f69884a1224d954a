"""Sections `torch-1`, `torch-64` and `vllm`: the same shape in other programs on the same GPU.

Their weights are random too, in bfloat16, and they decode greedily. Nothing here touches the device
through JAX.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from raas_jax.lab.bench.baselines import StaticCache
from raas_jax.lab.device_check.check import Check
from raas_jax.lab.device_check.shapes import BATCHES

STEPS = 64
"""Timed together."""
TURNS = 3


def by_torch(check: Check, batch: int) -> None:
    """Transformers with a static cache and compiled steps, near and far."""
    import torch

    if not torch.cuda.is_available():
        check.journal.write("missing", f"transformers, batch {batch}", why="torch sees no CUDA")
        return
    model = transformers_model(check.model, "cuda", "bfloat16")
    rng = np.random.default_rng(0)
    for length in (check.sizes.near, check.sizes.far):
        what = f"transformers, batch {batch}, at {length:,} tokens"
        with check.journal.attempt(what):
            before = check.sizes.prompt + length
            tokens = rng.integers(0, model.config.vocab_size, (batch, before), dtype=np.int32)
            began = time.perf_counter()
            decode = StaticCache(model, tokens, STEPS, compiled=True)
            compile_seconds = time.perf_counter() - began
            seconds = statistics.median(decode.time_chunk() for _ in range(TURNS))
            check.journal.figure(
                what,
                1e3 * seconds,
                "ms/step",
                tokens_per_second=batch / seconds,
                compile_seconds=compile_seconds,
            )
            del decode
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def transformers_model(folder: Path, device: str, dtype: str) -> Any:
    """A model of this shape with random weights, made where it runs."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    return model.eval()


def by_vllm(check: Check) -> None:
    """vLLM's own engine for offline work; a step is what more tokens take, over their number."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    sizes = check.sizes
    longest = sizes.prompt + sizes.far + 2 * STEPS
    engine = LLM(
        model=str(check.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
    )
    vocabulary = check.config().vocab_size
    rng = np.random.default_rng(0)

    def seconds(batch: int, tokens: int, new: int) -> float:
        prompts = [
            {"prompt_token_ids": rng.integers(0, vocabulary, tokens).tolist()} for _ in range(batch)
        ]
        asked = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engine.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - began

    # More rows would not fit far on, and vLLM would let them wait for one another.
    for length, batches in ((sizes.near, BATCHES), (sizes.far, BATCHES[:2])):
        for batch in batches:
            what = f"vLLM, batch {batch}, at {length:,} tokens"
            with check.journal.attempt(what):
                before = sizes.prompt + length
                seconds(batch, before, 2)
                few = statistics.median(seconds(batch, before, 2) for _ in range(TURNS))
                many = statistics.median(seconds(batch, before, 2 + STEPS) for _ in range(TURNS))
                ms = 1e3 * (many - few) / STEPS
                check.journal.figure(what, ms, "ms/step", tokens_per_second=1e3 * batch / ms)
