"""Loading holds at most the largest shard and one tensor above the model itself."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from raas_jax.config import ModelConfig
from raas_jax.params import Params
from raas_jax.weights import hf, save_hf

MIB = 2**20
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)
# What the process holds beside the arrays moves by a few MiB: compiled programs, free lists.
SLACK = 24 * MIB

SCRIPT = """
import json, sys
import jax
import raas_jax.weights as weights

def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

small, large, dtype = sys.argv[1:]
weights.load(small, dtype=dtype)  # imports and starts all that stays
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = resident("VmRSS:")
params = weights.load(large, dtype=dtype)
jax.block_until_ready(params)
print(json.dumps({
    "peak": resident("VmHWM:") - before,
    "model": sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights)),
}))
"""


def _zeros(config: ModelConfig, dtype: str) -> Params:
    shapes = hf.flat_shapes(config, dtype)
    return Params(hf.unflatten({k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items()}), config)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float32"), ("bfloat16", "float32")])
def test_peak_host_memory(tmp_path, stored, wanted):
    size = {"float32": 4, "bfloat16": 2}  # bytes
    small = ModelConfig(16, 8, 8, 1, 1, 1, 8)
    shard = 64 * MIB
    save_hf(_zeros(small, stored), tmp_path / "small")
    save_hf(_zeros(CONFIG, stored), tmp_path / "large", shard_bytes=shard)
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    command = [sys.executable, "-c", SCRIPT, tmp_path / "small", tmp_path / "large", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "large")
    found = json.loads(done.stdout)
    tensor = CONFIG.vocab_size * CONFIG.hidden_size * size[wanted]
    assert found["model"] > 300 * MIB
    assert found["peak"] - found["model"] <= max(files) + tensor + SLACK, found
    # A second copy of the model, or of one stacked array, would show.
    assert found["peak"] - found["model"] < CONFIG.num_hidden_layers * tensor, found
