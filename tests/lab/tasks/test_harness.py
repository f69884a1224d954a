"""The adapter for lm-evaluation-harness: a local task of each kind of request, offline."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra eval)")

import numpy as np
from lm_eval.api.instance import Instance
from tiny_lemma import CONFIG

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.tasks.harness import RaasLM
from raas_jax.model import forward
from raas_jax.policies import Dense
from raas_jax.scoring import scores
from raas_jax.weights import save_hf

QUESTIONS = ["1+1=", "10-3+2=", "4*5="]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
GENERATE = """task: local_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["0"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """task: local_choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["2", "11"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
ROLL = """task: local_roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, and a token for each character, with a BOS before them."""
    folder = tmp_path_factory.mktemp("tiny")
    save_hf(raas_jax.Params.random(CONFIG, seed=3), folder)
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary |= {chr(code): code for code in range(3, 128)}
    special = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, i in list(vocabulary.items())[:3]
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    tokenizer = {"version": "1.0", "added_tokens": special, "pre_tokenizer": split}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer"))
    tokenizer |= {"post_processor": template, "decoder": {"type": "Fuse"}}
    tokenizer["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"}
    settings |= {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in QUESTIONS))
    for name, text in {"generate": GENERATE, "choose": CHOOSE, "roll": ROLL}.items():
        (folder / f"{name}.yaml").write_text(text + COMMON % data)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def test_a_local_task_of_each_kind(model, tasks, tmp_path, capsys):
    args = ["lm-eval", "--model", "raas_jax", "--tasks", "local_generate,local_choose,local_roll"]
    args += ["--model_args", f"pretrained={model},policy=raas,budget=8,page_size=4,rows=2"]
    args += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples"]
    before = sys.argv
    assert main(args) == 0 and sys.argv is before
    assert "local_generate" in capsys.readouterr().out

    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "raas_jax"
    assert results["n-samples"]["local_generate"]["effective"] == 3

    params = raas_jax.load(model)
    policy = raas_jax.RaaS(8, page_size=4)
    wanted = raas_jax.generate(params, QUESTIONS, policy=policy, max_new_tokens=12, stop="0")
    samples = _samples(tmp_path / "out", "local_generate")
    assert [each["resps"][0][0] for each in samples] == [each.text for each in wanted]

    def logprob(before, scored):
        ids = [1, *map(ord, before + scored)]
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(params.config, params.weights, padded), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(logprobs[i - 1, ids[i]] for i in range(len(ids) - len(scored), len(ids)))

    for question, sample in zip(QUESTIONS, _samples(tmp_path / "out", "local_choose"), strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        # The harness puts a space between a question and its answers.
        assert found == pytest.approx([logprob(question, f" {x}") for x in ("2", "11")], abs=1e-3)
    for question, sample in zip(QUESTIONS, _samples(tmp_path / "out", "local_roll"), strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(logprob("", question), abs=1e-3)


def _samples(folder: Path, task: str) -> list[dict]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


def _instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_texts_longer_than_the_context(model):
    """Rolling windows score every token once; what stands before an answer is cut at the left."""
    lm = RaasLM(model, rows=2, max_length=8)
    whole = "0123456789abcdef"
    (rolled,) = lm.loglikelihood_rolling([_instance("loglikelihood_rolling", whole)])
    ids = [*map(ord, whole)]
    prompts, ends = [[1], ids[7:8]], [ids[:8], ids[8:]]
    found = sum(each.total for _, each in scores(lm.params, prompts, ends, Dense(), rows=2))
    assert rolled == pytest.approx(found, abs=1e-4)
    ((cut, _),) = lm.loglikelihood([_instance("loglikelihood", whole, "gh")])
    ((_, wanted),) = scores(lm.params, [ids[-7:]], [[*map(ord, "gh")]], Dense(), rows=2)
    assert cut == pytest.approx(wanted.total, abs=1e-4)
    with pytest.raises(ValueError, match="9 tokens, more than max_length"):
        lm.loglikelihood([_instance("loglikelihood", "a", "123456789")])
    with pytest.raises(ValueError, match="no room for a prompt"):
        lm.generate_until([_instance("generate_until", "a", {"max_gen_toks": 8})])


def test_chats_thoughts_and_generation_arguments(model):
    lm = RaasLM(model, think_end_token="|")
    chat = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "<bos>hi|" and lm.tok_encode(chat) == [1, *map(ord, "hi|")]
    assert lm.tok_encode("hi") == [1, *map(ord, "hi")]
    given = {"until": ["x", ""], "max_gen_toks": 4, "temperature": 0.5, "top_k": 3}
    request = lm._request(2, ("hi", given))
    assert request.sampling == raas_jax.Sampling(0.5, top_k=3) and request.seed == 2
    assert request.max_new_tokens == 4 and request.stop == ()  # A thought may hold an x.
    assert lm._cut("a x b| 1 x 2", given) == "1 "
    assert lm._request(0, ("hi", {"do_sample": False})).sampling == raas_jax.Sampling()
    with pytest.raises(ValueError, match="num_beams are not known"):
        lm._request(0, ("hi", {"num_beams": 2}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policy": "rass"}, "Did you mean"),
        ({"budgett": 8}, "budget"),
        ({"rows": 0}, "rows is 0"),
        ({"batch_size": "some"}, "batch_size is 'some'"),
        ({"pretrained": "nowhere"}, "nowhere"),
    ],
)
def test_bad_model_arguments(model, arguments, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        RaasLM(**{"pretrained": model, **arguments})


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--help"]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err
