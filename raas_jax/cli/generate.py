"""`raas-jax generate`: answers on standard output, what they took on standard error."""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import raas_jax
from raas_jax import checks
from raas_jax.cli import options, streams
from raas_jax.cli.errors import INTERRUPTED, WRONG, note
from raas_jax.cli.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclasses.dataclass
class Generate:
    """Answer a prompt, or a file of them."""

    prompt: Annotated[str | None, tyro.conf.Positional, options.unset("[PROMPT]")] = None
    """Text to answer; or give --prompt-file."""
    prompt_file: options.File = None
    """Prompts, one per line, as text or JSON ({"prompt": ...}, {"messages": [...]}); - is stdin."""
    model: options.Model = "demo"
    dtype: options.Dtype = None
    max_new_tokens: options.MaxNewTokens = None
    """Most tokens of an answer; by default what the model's context leaves, at most 32768."""
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Text before which an answer stops."""
    chat: bool = False
    """Put PROMPT into the model's chat template, as the user's message."""
    json: bool = False
    """Print one JSON object per prompt instead of streaming text."""
    rows: options.Rows = 1
    """Prompts that are answered at once, with --json."""
    policy: options.PolicyOptions = dataclasses.field(default_factory=options.PolicyOptions)
    sampling: options.SamplingOptions = dataclasses.field(default_factory=options.SamplingOptions)

    def run(self) -> int:
        """Prints the answers. Ctrl-C ends with what there is, and exit code 130."""
        from raas_jax import tokenizer

        given = self._prompts()
        prompts = [self._prepare(prompt) for prompt in given]
        wanted: dict[str, Any] = {
            "policy": self.policy.create(),
            "sampling": self.sampling.create(),
            "seed": self.sampling.seed,
            "max_new_tokens": self.max_new_tokens,
            "stop": tokenizer.stop_strings(map(streams.typed, self.stop)),
        }
        for flag, why in self._idle(given):
            note(f"{flag} has no effect {why}.")
        params = raas_jax.load(self.model, dtype=self.dtype)
        if self.sampling.temperature and self.sampling.top_k > params.config.vocab_size:
            note(
                f"--top-k is more than the model's {params.config.vocab_size} tokens: all are kept."
            )
        answer = self._print_json if self.json else self._stream
        reasons = answer(params, prompts, wanted)
        return INTERRUPTED if "interrupted" in reasons else WRONG if "error" in reasons else 0

    def _idle(self, prompts: list[Prompt]) -> Iterator[tuple[str, str]]:
        """Flags that were given and change nothing, and why."""
        if self.rows != 1 and not self.json:
            yield "--rows", "without --json: prompts are answered one after another"
        if self.chat and not any(isinstance(prompt, str) for prompt in prompts):
            yield "--chat", "on prompts that are ids or messages already"
        drawn, default = self.sampling, options.SamplingOptions()
        if drawn.temperature == 0:
            for name in ("top_k", "top_p", "min_p", "seed"):
                if getattr(drawn, name) != getattr(default, name):
                    yield "--" + name.replace("_", "-"), "at --temperature 0, which is greedy"

    def _prompts(self) -> list[Prompt]:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError(
                'give a prompt, as in `raas-jax generate "..."`, or --prompt-file FILE, and not '
                "both (--prompt-file - reads standard input)."
            )
        if self.prompt is not None:
            return [checks.whole_text("PROMPT", streams.typed(self.prompt))]
        return read_prompts(str(self.prompt_file))

    def _prepare(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str) and self.chat:
            return [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) and self.model == "demo":
            from raas_jax.lab.tasks.lemma import normalise

            return normalise(prompt)  # Says clearly what is wrong with a typed problem.
        return prompt

    def _stream(
        self, params: raas_jax.Params, prompts: list[Prompt], wanted: dict[str, Any]
    ) -> set[str | None]:
        """Prints each answer as it comes, and gives why they ended."""
        from tqdm import tqdm

        reasons: set[str | None] = set()

        # Where the text itself does not go to the terminal, a bar shows that something happens.
        hidden = sys.stdout.isatty() or not sys.stderr.isatty()
        for number, prompt in enumerate(prompts):
            if number:
                print()
            clock = _Clock()
            with tqdm(unit=" tokens", delay=1, disable=hidden) as bar:
                pieces = raas_jax.stream(params, prompt, **wanted)
                try:
                    for piece in pieces:
                        output = _show(piece, clock, bar)
                except KeyboardInterrupt:
                    # It came while a piece was shown: told of it, their maker ends the answer.
                    assert isinstance(pieces, Generator)
                    output = _show(pieces.throw(KeyboardInterrupt), clock, bar)
            assert output is not None
            print(*output.tokens if output.text is None else "", flush=True)
            print(summary(output, clock.tokens_per_second), file=sys.stderr, flush=True)
            reasons.add(output.finish_reason)
            if output.error is not None:
                streams.say(f"error: {output.error}")
            if output.finish_reason == "interrupted":
                break
        return reasons

    def _print_json(
        self, params: raas_jax.Params, prompts: list[Prompt], wanted: dict[str, Any]
    ) -> set[str | None]:
        """Prints one object per prompt, in their order, and gives why they ended."""
        began, tokens = time.perf_counter(), 0
        reasons: set[str | None] = set()
        # Where a character would become a question mark, JSON has a way to write it.
        escape = not codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")
        for start in range(0, len(prompts), self.rows):
            outputs = raas_jax.generate(params, prompts[start : start + self.rows], **wanted)
            for output in outputs:
                print(json.dumps(as_json(output), ensure_ascii=escape), flush=True)
                tokens += len(output.tokens)
            reasons.update(output.finish_reason for output in outputs)
            if "interrupted" in reasons:
                return reasons
        seconds = time.perf_counter() - began
        many = f"{len(prompts)} prompts, {tokens} tokens in {seconds:.1f} s"
        print(f"{many} ({tokens / seconds:.0f} tokens/s)", file=sys.stderr)
        return reasons


class _Clock:
    """Tokens per second, without what was compiled for the first ones."""

    def __init__(self) -> None:
        self._stamps: list[tuple[int, float]] = []

    def count(self, tokens: int) -> None:
        self._stamps.append((tokens, time.perf_counter()))

    @property
    def tokens_per_second(self) -> float | None:
        """None for an answer that is too short to tell."""
        if len(self._stamps) < 4:
            return None
        (first, began), (last, ended) = self._stamps[1], self._stamps[-1]
        return (last - first) / (ended - began)


def _show(piece: raas_jax.Piece, clock: _Clock, bar: tqdm) -> raas_jax.Output | None:
    clock.count(piece.generated_tokens)
    bar.update(piece.generated_tokens - bar.n)
    # A model may write what a terminal would obey; a file or another program gets it as it is.
    print(checks.printable(piece.text) if sys.stdout.isatty() else piece.text, end="", flush=True)
    return piece.output


def as_json(output: raas_jax.Output) -> dict[str, Any]:
    """The object that `--json` prints."""
    assert output.stats is not None
    sizes = ("prompt_tokens", "generated_tokens", "kept_pages", "evicted_pages")
    return {
        "text": output.text,
        "token_ids": list(output.tokens),
        "finish_reason": output.finish_reason,
        **({} if output.error is None else {"error": output.error}),
        **{name: getattr(output.stats, name) for name in (*sizes, "kv_bytes", "dense_kv_bytes")},
        **({} if output.stats.allotment is None else {"allotment": output.stats.allotment}),
    }


def summary(output: raas_jax.Output, speed: float | None = None) -> str:
    """Two lines on what an answer took, beside what a dense cache would have taken.

    Of an answer of which nothing was forgotten, whole pages and padding take more than its tokens
    would: there is nothing to compare.
    """
    stats = output.stats
    assert stats is not None
    ends = {
        "stop": "finished",
        "length": "cut off at --max-new-tokens or the model's context",
        "interrupted": "interrupted",
        "error": "ended by an error",
    }
    rate = "" if speed is None else f", {speed:.0f} tokens/s"
    memory, dense = map(options.readable_bytes, (stats.kv_bytes, stats.dense_kv_bytes))
    beside = f", a dense cache: {dense}" if stats.evicted_pages else ""
    by_head = f", by head ({stats.allotment})" if stats.allotment else ""
    return (
        f"[{stats.generated_tokens} tokens after a prompt of {stats.prompt_tokens}{rate}; "
        f"{ends.get(str(output.finish_reason), output.finish_reason)}]\n"
        f"[{stats.kept_pages} pages kept{by_head}, {stats.evicted_pages or 'none'} forgotten; "
        f"keys and values: {memory}{beside}]"
    )
