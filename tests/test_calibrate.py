"""The centres of a model's queries: what they are, and the command that makes them."""

from __future__ import annotations

import dataclasses

import by_the_book as book
import jax
import numpy as np
import oracle
import pytest
from cheap import CONFIG
from tiny import prompts_of, random_params
from tiny_lemma import save_tiny

from raas_jax import policies
from raas_jax.calibrate import calibrate
from raas_jax.cli.main import main
from raas_jax.files import FileError
from raas_jax.plan import Plan
from raas_jax.policies import TriAttention
from raas_jax.policies.triattention import Centres


class Watched(oracle.Network):
    """Remembers every query as it is before its rotation: at position 0, nothing turns."""

    def heads_of(self, layer, name, h, position):
        if name == "q":
            self.seen[layer].append(super().heads_of(layer, "q", h, 0))
        return super().heads_of(layer, name, h, position)


def test_centres_are_means_of_unrotated_queries(tmp_path):
    params, sequences = random_params(CONFIG, 3), prompts_of([5, 40], 1)
    network = Watched(
        jax.tree.map(np.asarray, params.weights), theta=CONFIG.rope.theta, eps=CONFIG.rms_norm_eps
    )
    network.seen = [[] for _ in network.layers]
    for ids in sequences:
        book.Sequence(network, book.Method(1, 1), ids)
    seen = np.array(network.seen)  # [L, tokens, N, H]
    assert seen.shape == (2, 45, 4, 8)
    found = calibrate(params, sequences)
    np.testing.assert_allclose(found.centre, seen.mean(axis=1), atol=1e-5)
    lengths = abs(seen[..., :4] + 1j * seen[..., 4:]).mean(axis=1)
    np.testing.assert_allclose(found.length, lengths, atol=1e-5)
    wanted = [CONFIG.rope.theta ** (-2 * i / 8) for i in range(4)]
    np.testing.assert_allclose(found.frequency, wanted, rtol=1e-6)
    found.write(tmp_path / "centres")
    for saved, array in zip(Centres.read(tmp_path / "centres"), found, strict=True):
        np.testing.assert_array_equal(saved, array)
    with pytest.raises(ValueError, match="sequences have nothing to read"):
        calibrate(params, [[1], []])


def test_what_is_no_calibration_is_named(tmp_path):
    good = calibrate(random_params(CONFIG), prompts_of([5]))
    file = tmp_path / "centres"
    good._replace(length=good.length[:1]).write(file)
    wrong = [("shapes", file.read_bytes())]
    for name, array in [
        ("finite", good.length * np.nan),
        ("float32", good.length.astype(np.float16)),
    ]:
        good._replace(length=array).write(file)
        wrong.append((name, file.read_bytes()))
    good.write(file)
    cut = file.read_bytes()[:-10]
    wrong += [("deserializing", data) for data in (b"", cut, b"[" * 9999)]
    for said, data in wrong:
        file.write_bytes(data)
        with pytest.raises(FileError, match=f"centres is no calibration .*{said}.* Make it anew"):
            TriAttention(64, calibration=str(file))
    with pytest.raises(FileError, match="a folder, a pipe"):
        TriAttention(64, calibration=str(tmp_path))
    assert not [each for each in tmp_path.iterdir() if each != file]


@pytest.mark.parametrize(
    "size", [{"num_hidden_layers": 3}, {"num_attention_heads": 2}, {"head_dim": 16}], ids=str
)
def test_a_calibration_of_another_model_is_refused(tmp_path, size):
    calibrate(random_params(CONFIG), prompts_of([5])).write(tmp_path / "centres")
    policy = TriAttention(64, calibration=str(tmp_path / "centres"), dense_layers=1)
    Plan.create(CONFIG, policy, [5], 64)
    with pytest.raises(ValueError, match="calibration is .*2 layers, 4 query heads and head dim 8"):
        Plan.create(dataclasses.replace(CONFIG, **size), policy, [5], 64)


def test_another_file_under_the_same_name_is_another_policy(tmp_path):
    file, centres = tmp_path / "centres", calibrate(random_params(CONFIG), prompts_of([5]))
    centres.write(file)
    first, again = TriAttention(64, calibration=str(file)), TriAttention(64, calibration=str(file))
    centres._replace(length=2 * centres.length).write(file)
    assert first == again != TriAttention(64, calibration=str(file))
    with pytest.raises(ValueError, match="contents have changed"):
        dataclasses.replace(first, budget=128)


def test_the_command(tmp_path, capsys):
    model, file = save_tiny(tmp_path / "model"), str(tmp_path / "centres")
    prompts = tmp_path / "prompts"
    prompts.write_text("a = 4 ; b = 9 ; ? b\na = 1 ; ? a\n")
    args = ["calibrate", "--model", model, "--out", file]
    assert main([*args, "--prompts", str(prompts), "-n", "20"]) == 0
    assert f"{file}: " in capsys.readouterr().out
    assert main([*args]) == 2 and "--prompts is not given" in capsys.readouterr().err
    assert policies.parse(f"triattention:calibration={file}", budget=64).budget == 64
