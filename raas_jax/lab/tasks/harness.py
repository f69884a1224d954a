"""A model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

`raas-jax lm-eval` registers it as `raas_jax`; versions of the harness that look for plugins find it
by themselves. Generation runs on the engine, under the policy. Log-likelihoods are of one dense
forward pass: what a task scores is given, not decoded, and no policy evicts what is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from raas_jax import tokenizer
from raas_jax.engine import Engine, Request, Result
from raas_jax.policies import Dense, Policy, parse
from raas_jax.sampling import Sampling
from raas_jax.scoring import scores
from raas_jax.weights import load

DEFAULT_ROWS = 16
# The harness's own generation arguments that need no doing of ours.
IGNORED = frozenset({"do_sample", "until", "max_gen_toks", "temperature"})
SAMPLING = frozenset({"top_k", "top_p", "min_p"})
Tokens = tuple[tuple[str, str], list[int], list[int]]

_log = logging.getLogger(__name__)


@register_model("raas_jax")
class RaasLM(TemplateLM):  # type: ignore[misc]  # The harness has no types.
    """`raas_jax` for the harness; the arguments are those of `--model_args`."""

    def __init__(
        self,
        pretrained: str,
        policy: str | Policy = "raas",
        dtype: str | None = None,
        rows: int | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        think_end_token: str | None = None,
        **options: Any,
    ):
        """Loads the model.

        Args:
          pretrained: anything that `raas_jax.load` takes.
          policy: its name, or a policy of one's own.
          dtype: of the weights.
          rows: answers at once; "auto" takes as many as fit the device's memory. By default
            `batch_size`, and 16 where that is the harness's own default of 1.
          batch_size, max_batch_size: of the harness; see `rows`.
          device: of the harness; jax chooses its own (JAX_PLATFORMS).
          max_length: of context and answer together; the model's context by default.
          max_gen_toks: tokens to generate where a task does not say.
          seed: of sampling.
          think_end_token: what ends a thought, such as `</think>`: only the text after it is given
            to the task, and only there its stop strings count.
          **options: of the policy, such as budget and page_size.

        Raises:
          ValueError, TypeError: a wrong argument, with near matches for an unknown one.
        """
        super().__init__()
        if isinstance(policy, Policy) and options:
            raise ValueError(f"policy is an instance, so {', '.join(options)} belong to it.")
        self.policy = policy if isinstance(policy, Policy) else parse(policy, **options)
        self._rows = _rows(rows, batch_size, max_batch_size)
        self.params = load(pretrained, dtype=dtype)
        self.tokenizer = tokenizer.load(self.params)
        self.max_length = max_length or self.params.config.context
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        self.think_end_token = think_end_token

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        stops = tokenizer.stop_token_ids(self.params)
        if not stops:
            raise ValueError(f"{self.params.source} names no token that ends a text.")
        return stops[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.params.source).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {self.params.source} has no chat template; leave "
                "--apply_chat_template out."
            )
        # The harness asks for no new turn where the last message is one to be continued.
        return tokenizer.chat_text(self.params, chat_history, "chat_history")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; by default as those of a prompt."""
        if add_special_tokens is None and string:
            return tokenizer.encode(self.params, string)[0][0]
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens is not False)[
            "input_ids"
        ]
        return [int(token) for token in ids]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers under the policy, in the order of the requests."""
        asked = [self._request(index, each.args) for index, each in enumerate(requests)]
        answers: dict[int, str] = {}
        with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm) as bar:
            for result in self._run(asked):
                index = int(result.id)
                if result.error is not None:
                    raise ValueError(f"request {index} cannot be answered: {result.error}")
                context, arguments = requests[index].args
                answers[index] = self._cut(result.text or "", arguments)
                self.cache_hook.add_partial("generate_until", (context, arguments), answers[index])
                bar.update()
        if len(answers) < len(asked):
            raise KeyboardInterrupt
        return [answers[index] for index in range(len(asked))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts, in windows of the context's length, each token scored once."""
        windows: list[Tokens] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm, keep=False)
        for owner, (logprob, _) in zip(owners, found, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, keep: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        prompts = [self._fitting(before, scored) for _, before, scored in requests]
        continuations = [scored for _, _, scored in requests]
        rows = DEFAULT_ROWS if self._rows == "auto" else self._rows
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for index, each in scores(self.params, prompts, continuations, Dense(), rows=rows):
                found[index] = (each.total, bool(each.greedy.all()))
                if keep:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                bar.update()
        return [found[index] for index in range(len(requests))]

    def _fitting(self, before: list[int], scored: list[int]) -> list[int]:
        """As much of the end of `before` as the context holds; the last token is not read."""
        if len(scored) > self.max_length:
            raise ValueError(
                f"a continuation has {len(scored)} tokens, more than max_length, which is "
                f"{self.max_length}."
            )
        room = self.max_length + 1 - len(scored)
        return before[max(0, len(before) - room) :]

    def _request(self, index: int, arguments: tuple[str, dict[str, Any]]) -> Request:
        context, given = arguments
        wanted = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        limit = int(wanted["max_gen_toks"])
        unknown = set(wanted) - IGNORED - SAMPLING
        if unknown:
            raise ValueError(
                f"generation arguments {', '.join(sorted(unknown))} are not known; there are "
                f"{', '.join(sorted(IGNORED | SAMPLING))}."
            )
        sampling = Sampling(0.0)
        if wanted.get("do_sample"):
            given = {name: wanted[name] for name in SAMPLING if name in wanted}
            sampling = Sampling(float(wanted.get("temperature", 1.0)), **given)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - limit
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {limit}, which leaves no room for a prompt in max_length, "
                f"{self.max_length}; generate less."
            )
        if len(ids) > room:
            _log.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        stop = () if self.think_end_token else _stops(wanted)
        return Request(
            index, ids[-room:], sampling, seed=self.seed + index, max_new_tokens=limit, stop=stop
        )

    def _run(self, requests: Sequence[Request]) -> Iterator[Result]:
        if not requests:
            return
        engine = Engine(
            self.params,
            policy=self.policy,
            rows="auto" if self._rows == "auto" else min(self._rows, len(requests)),
            max_new_tokens=max(request.max_new_tokens or 1 for request in requests),
            max_prompt_tokens=max(len(request.prompt) for request in requests),
        )
        # Long prompts first, so that what does not fit shows at once.
        longest_first: list[Request] = sorted(requests, key=lambda each: -len(each.prompt))
        yield from engine.run(longest_first)

    def _cut(self, answer: str, arguments: dict[str, Any]) -> str:
        stops = _stops(normalize_gen_kwargs(arguments, self.max_gen_toks))
        return str(postprocess_generated_text(answer, list(stops), self.think_end_token))


def _stops(arguments: Any) -> tuple[str, ...]:
    return tuple(stop for stop in arguments["until"] if stop)


def _rows(
    rows: int | str | None, batch_size: int | str | None, most: int | None
) -> int | Literal["auto"]:
    name, value = ("batch_size", batch_size) if rows is None else ("rows", rows)
    if value is None or (name == "batch_size" and str(value) == "1"):
        value = DEFAULT_ROWS
    if isinstance(value, str) and value.startswith("auto"):
        return "auto" if most is None else most
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value!r}; give a number of rows, or auto.")
    return count if most is None else min(count, most)
