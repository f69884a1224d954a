"""What is imported when: nothing heavy before it is needed."""

import subprocess
import sys

import pytest

import raas_jax

HEAVY = ["transformers", "orbax", "matplotlib", "tyro", "huggingface_hub", "datasets"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import raas_jax", ["jax", "flax", *HEAVY]),
        (
            "import raas_jax; raas_jax.generate, raas_jax.load, raas_jax.Engine, raas_jax.score",
            HEAVY,
        ),
    ],
)
def test_nothing_heavy_is_imported_early(code, absent):
    check = f"{code}; import sys; print(*({absent!r} & sys.modules.keys()))"
    check = check.replace(repr(absent), repr(set(absent)))
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_every_public_name_is_there():
    assert set(raas_jax.__all__) <= set(dir(raas_jax))
    for name in raas_jax.__all__:
        assert getattr(raas_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'gnerate'"):
        raas_jax.gnerate  # noqa: B018


def test_a_module_does_not_hide_a_function():
    """Whatever is imported first, `raas_jax.generate` and `raas_jax.score` are functions."""
    code = (
        "import raas_jax.engine, raas_jax.scoring, raas_jax.generation, raas_jax; "
        "print(callable(raas_jax.generate), callable(raas_jax.score))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "True"]
