"""A tiny model that reads lemma problems, and a run that is killed."""

import contextlib
import json

import pytest
from tiny_lemma import save_tiny

import raas_jax
from raas_jax.lab.runs import Results


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def params(model):
    return raas_jax.load(model)


@pytest.fixture
def killed(monkeypatch):
    """`killed(n)`: what runs within is interrupted as it adds a sample to n others."""
    add = Results.add

    @contextlib.contextmanager
    def after(samples):
        def kill(self, sample):
            if len(self.samples) == samples:
                # Half a line is what a kill leaves at worst.
                with (self.folder / "samples.jsonl").open("a") as file:
                    file.write(json.dumps(sample)[:40])
                raise KeyboardInterrupt
            add(self, sample)

        with monkeypatch.context() as patch:
            patch.setattr(Results, "add", kill)
            with pytest.raises(KeyboardInterrupt):
                yield

    return after
