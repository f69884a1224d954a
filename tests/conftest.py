"""What every test shares: the CPU, strict promotion of dtypes, and the data beside the checkout."""

import os
from pathlib import Path

# Before jax is imported. Where an accelerator is wanted, the environment says so.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a suite's time is compiling; `OPTIMISED` says which tests are about the programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Two workers run at once; a thread pool of torch in each would only get in the other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asks the network for a model.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from hypothesis import HealthCheck, settings
from quick import quickly

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling makes the first example slow, and the machine may be busy: no deadlines.
settings.register_profile(
    "raas_jax", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("raas_jax")


# Files whose tests compile little: `pytest -m fast` takes under a minute on two cores.
FAST = {
    *("cli/test_convert", "cli/test_main", "cli/test_options", "cli/test_prompts"),
    *(
        "lab/runs/test_layout",
        "lab/runs/test_statistics",
        "lab/runs/test_tables",
        "lab/test_limits",
    ),
    *("lab/tasks/test_benchmarks", "lab/tasks/test_liveness", "lab/tasks/test_problems"),
    *("pallas_kernels/test_dispatch", "policies/test_options", "policies/test_spec"),
    *("policies/test_allotment", "lab/test_allotment_rules"),
    *(
        "test_config",
        "test_import",
        "test_model",
        "test_products",
        "test_recompilation",
        "test_sampling",
        "test_tokenizer",
    ),
    *("weights/test_hf", "weights/test_load"),
}


# Files whose tests look at compiled programs, or at their memory or time.
OPTIMISED = {
    *("cli/test_main", "engine/test_copies", "lab/test_limits", "policies/test_compiled"),
    "lab/bench/test_bandwidth",
    *("test_constant_memory", "test_model", "test_products"),
    "test_real_models",
}


# Long files in which another Python or jax would hardly change anything; CI runs them on one.
ONCE = {
    *("engine/test_policies", "lab/fidelity/test_findings", "lab/fidelity/test_comparison"),
    *("lab/inspect/test_ceiling", "lab/runs/test_benchmark", "lab/runs/test_migration"),
    *("lab/runs/test_run", "lab/runs/test_study", "lab/tasks/test_harness", "test_notebooks"),
    *("cli/test_shell", "lab/bench/test_throughput", "lab/inspect/test_recording"),
    *("lab/trace/test_trace", "lab/train/test_train", "policies/test_by_the_book"),
    *("policies/test_every_policy", "test_invariance"),
    *("policies/test_every_policy_allotted", "cli/test_allot", "test_refining"),
    *("lab/test_allotment_rivals", "lab/fidelity/test_foreseen", "lab/fidelity/test_measure"),
    *("lab/device_check/test_driver", "lab/device_check/test_sections", "cli/test_device_check"),
    *("cli/test_bench", "engine/test_damaged_saves", "lab/tasks/test_grading"),
}


def name_of(path):
    return path.relative_to(Path(__file__).parent).with_suffix("").as_posix()


def pytest_collection_modifyitems(items):
    for item in items:
        name = name_of(item.path)
        if name in FAST:
            item.add_marker(pytest.mark.fast)
        if name in ONCE:
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True, scope="module")
def few_programs(request):
    """Compiled programs take memory mappings, of which a process has only so many."""
    name = name_of(request.path)
    optimised = name in OPTIMISED or name.startswith("aot/")
    quickly(not optimised)
    yield
    jax.clear_caches()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real configs, data and a small trained model, kept beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real configs, data and models), which is not here")
    return SHARED
