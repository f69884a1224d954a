"""The shipped model: an ordinary folder, and no worse than it was."""

import numpy as np
import pytest

import raas_jax
from raas_jax import tokenizer
from raas_jax.lab.tasks.lemma import Knobs, draw, grade, parse_problem
from raas_jax.lab.tasks.lemma.tokenizer import BOS_ID, encode
from raas_jax.lab.train.measure import held_out, wrong_tokens
from raas_jax.policies import Dense

# The committed weights get all of these fixed problems right; one first_error in 25 is forgiven,
# since other hardware rounds otherwise.
EXACT_SMALL, EXACT_LARGE = 0.96, 0.96


@pytest.fixture(scope="module")
def params():
    return raas_jax.load("demo")


def test_tokenizer_agrees_with_the_words(params):
    problem = draw("test", 0, 0, Knobs())
    found = tokenizer.load(params)
    ids = [BOS_ID, *encode(problem.prompt_words)]
    assert found(problem.prompt)["input_ids"] == ids
    assert found(problem.prompt.removesuffix(" :").replace(" ", ""))["input_ids"] == ids
    words = encode(problem.derivation_words)
    assert found.decode(words) == problem.derivation
    assert found(problem.derivation, add_special_tokens=False)["input_ids"] == words


@pytest.mark.parametrize(
    ("smallest", "largest", "wanted"), [(4, 16, EXACT_SMALL), (24, 48, EXACT_LARGE)]
)
def test_accuracy_does_not_fall(params, smallest, largest, wanted):
    problems = held_out(25, Knobs(smallest, largest), seed=50)
    wrong = wrong_tokens(params.config, params.weights, problems)
    share = np.mean([len(each) == 0 for each in wrong])
    assert share >= wanted


def test_generate_writes_what_the_forward_pass_predicts(params):
    problems = held_out(3, Knobs(6, 8), seed=51)
    wrong = wrong_tokens(params.config, params.weights, problems)
    outputs = raas_jax.generate(
        params, [each.prompt for each in problems], policy=Dense(), max_new_tokens=128
    )
    for problem, output, missed in zip(problems, outputs, wrong, strict=True):
        assert grade(problem, output.text).derivation == (len(missed) == 0)
        if not len(missed):
            assert output.finish_reason == "stop"


def test_transformers_writes_the_same(params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    problem = held_out(1, Knobs(6, 6), seed=52)[0]
    ours = raas_jax.generate(params, problem.prompt, policy=Dense(), max_new_tokens=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(params.source, dtype=torch.float32)
    ids = tokenizer.load(params)(problem.prompt, return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=128, do_sample=False)[0]
    assert theirs[ids["input_ids"].shape[1] :].tolist() == list(ours.tokens)


def test_typed_problem(params):
    problem = parse_problem("a=4; b=9; c=a+b")
    assert tokenizer.load(params)("a=4; b=9; c=a+b; ? c")["input_ids"] == [
        BOS_ID,
        *encode(problem.prompt_words),
    ]
