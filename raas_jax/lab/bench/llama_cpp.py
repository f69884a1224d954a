"""What `raas-jax bench` times beside a policy: llama.cpp, by the package llama-cpp-python.

The weights go to it in a GGUF file, in the data type that they have, and so does its cache in
float32 or else float16. It decodes greedily on as many threads as there are cores.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from raas_jax.lab.bench.turns import cores
from raas_jax.model import MATRICES, separate
from raas_jax.params import Params

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
"""Our name of a layer's array, and llama.cpp's."""
PREFILL = 512
"""Tokens that are read at once."""


class LlamaCpp:
    """The same weights in llama.cpp."""

    def __init__(self, params: Params) -> None:
        """Takes the weights through a temporary file.

        Raises:
          ValueError: llama-cpp-python or gguf is missing, or llama.cpp cannot run this model.
        """
        for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"it needs {package}: pip install llama-cpp-python gguf.")
        import llama_cpp

        silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(silent, None)
        self._silent = silent  # Which is called as long as the library is used.
        self._float32 = params.dtype == jnp.float32
        self._vocabulary = params.config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(params, file)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False  # The file is gone before the first step.
            self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise ValueError(f"it cannot read a model of the type {params.config.model_type}.")

    def begin(self, tokens: np.ndarray, chunk: int) -> Decode:
        """After these tokens `[B, T]`."""
        import llama_cpp

        rows, length = tokens.shape
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = rows * (length + chunk)
        options.n_seq_max = rows
        options.n_batch = options.n_ubatch = max(PREFILL, rows)
        options.n_threads = options.n_threads_batch = cores()
        if self._float32:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise ValueError(f"it has no memory for {rows} rows of {length + chunk} tokens.")
        return Decode(context, self._vocabulary, tokens, chunk)


class Decode:
    """llama.cpp's decode at one length."""

    whole_seconds: float | None = None
    kv_bytes: int | None = None

    def __init__(self, context: Any, vocabulary: int, tokens: np.ndarray, chunk: int) -> None:
        """Reads all tokens `[B, T]` but the last of each row."""
        self._context, self._vocabulary, self._chunk = context, vocabulary, chunk
        self._last, self._length = tokens[:, -1], tokens.shape[1] - 1
        for row, own in enumerate(tokens[:, :-1]):
            for first in range(0, self._length, PREFILL):
                part = own[first : first + PREFILL]
                positions = np.arange(first, first + len(part))
                self._step(part, positions, np.full(len(part), row))

    def time_chunk(self) -> float:
        """Seconds per step, greedy; the chunk is forgotten again."""
        import llama_cpp

        start = time.perf_counter()
        self.greedy(self._chunk)
        seconds = time.perf_counter() - start
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, -1, self._length, -1)
        return seconds / self._chunk

    def greedy(self, count: int) -> np.ndarray:
        """The next tokens, int `[count, B]`."""
        rows = np.arange(len(self._last))
        token, found = self._last, []
        for step in range(count):
            logits = self._step(token, np.full(len(rows), self._length + step), rows)
            token = np.argmax(logits, axis=-1)
            found.append(token)
        return np.stack(found)

    def _step(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Logits of what follows each token `[n]`, or of the last where they are of one row."""
        import llama_cpp

        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            one = len(set(rows.tolist())) == 1
            for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
                batch.token[i], batch.pos[i] = int(token), int(position)
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(row)
                batch.logits[i] = not one or i == len(tokens) - 1
            if llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")
        finally:
            llama_cpp.llama_batch_free(batch)
        wanted = [len(tokens) - 1] if one else range(len(tokens))
        shape = (self._vocabulary,)
        return np.stack(
            [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, i), shape)
                for i in wanted
            ]
        )


def write_gguf(params: Params, file: Path) -> None:
    """Writes the weights as GGUF, without a tokenizer.

    Raises ValueError for a model that llama.cpp reads in another way than ours.
    """
    import gguf

    c = params.config
    if c.model_type not in ARCHITECTURES:
        raise ValueError(f"it is not given models of the type {c.model_type}.")
    if c.window_layers or c.sinks:
        what = f"a window of {c.window} tokens" if c.window_layers else "sinks"
        raise ValueError(f"it is not given models with {what}.")
    if c.rope.kind not in ("default", "linear"):
        raise ValueError(f"it is not given models with rope of the type {c.rope.kind}.")
    writer = gguf.GGUFWriter(file, ARCHITECTURES[c.model_type])
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    if c.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope.factor)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, array: Any) -> None:
        values = np.asarray(array)
        if values.ndim == 1 or values.dtype == np.float32:
            writer.add_tensor(name, values.astype(np.float32))
        elif values.dtype == np.float16:
            writer.add_tensor(name, values)
        else:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    weights = separate(params.weights)
    add("token_embd.weight", weights["embedding"])
    add("output_norm.weight", weights["norm"])
    if not c.tie_word_embeddings:
        add("output.weight", weights["head"])
    for number, layer in enumerate(weights["layers"]):
        for name, array in layer.items():
            values = np.asarray(array)
            if ARCHITECTURES[c.model_type] == "llama" and name in ("q", "k", "q_bias", "k_bias"):
                values = _in_pairs(values)
            values = values.reshape(-1, values.shape[-1]) if name in MATRICES else values.ravel()
            add(f"blk.{number}.{NAMES[name]}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_pairs(values: np.ndarray) -> np.ndarray:
    """Heads `[N, H, ...]` with the pairs that rope turns side by side, as llama.cpp's Llama."""
    heads, size = values.shape[:2]
    halves = values.reshape(heads, 2, size // 2, *values.shape[2:])
    return halves.swapaxes(1, 2).reshape(values.shape)
