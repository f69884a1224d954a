"""`raas-jax generate`: answers on standard output, what they took on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import raas_jax
from raas_jax.cli import options
from raas_jax.cli.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from tqdm import tqdm

INTERRUPTED = 130


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
        prompts = self._prompts()
        wanted: dict[str, Any] = {
            "policy": self.policy.create(),
            "sampling": self.sampling.create(),
            "seed": self.sampling.seed,
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
        }
        params = raas_jax.load(self.model, dtype=self.dtype)
        answer = self._print_json if self.json else self._stream
        return INTERRUPTED if answer(params, prompts, wanted) else 0

    def _prompts(self) -> list[Prompt]:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError(
                'give a prompt, as in `raas-jax generate "..."`, or --prompt-file FILE, and not '
                "both (--prompt-file - reads standard input)."
            )
        prompts = [self.prompt] if self.prompt_file is None else read_prompts(self.prompt_file)
        return [self._prepare(prompt) for prompt in prompts if prompt is not None]

    def _prepare(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str) and self.chat:
            return [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) and self.model == "demo":
            from raas_jax.lab.tasks.lemma import normalise

            return normalise(prompt)  # Says clearly what is wrong with a typed problem.
        return prompt

    def _stream(
        self, params: raas_jax.Params, prompts: list[Prompt], wanted: dict[str, Any]
    ) -> bool:
        """Prints each answer as it comes; gives whether it was interrupted."""
        from tqdm import tqdm

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
            if output.finish_reason == "interrupted":
                return True
        return False

    def _print_json(
        self, params: raas_jax.Params, prompts: list[Prompt], wanted: dict[str, Any]
    ) -> bool:
        """Prints one object per prompt, in their order; gives whether it was interrupted."""
        began, tokens = time.perf_counter(), 0
        for start in range(0, len(prompts), self.rows):
            outputs = raas_jax.generate(params, prompts[start : start + self.rows], **wanted)
            for output in outputs:
                print(json.dumps(as_json(output), ensure_ascii=False), flush=True)
                tokens += len(output.tokens)
            if any(output.finish_reason == "interrupted" for output in outputs):
                return True
        seconds = time.perf_counter() - began
        many = f"{len(prompts)} prompts, {tokens} tokens in {seconds:.1f} s"
        print(f"{many} ({tokens / seconds:.0f} tokens/s)", file=sys.stderr)
        return False


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
    print(piece.text, end="", flush=True)
    return piece.output


def as_json(output: raas_jax.Output) -> dict[str, Any]:
    """The object that `--json` prints."""
    assert output.stats is not None
    sizes = ("prompt_tokens", "generated_tokens", "kept_pages", "evicted_pages")
    return {
        "text": output.text,
        "token_ids": list(output.tokens),
        "finish_reason": output.finish_reason,
        **{name: getattr(output.stats, name) for name in (*sizes, "kv_bytes", "dense_kv_bytes")},
    }


def summary(output: raas_jax.Output, speed: float | None = None) -> str:
    """Two lines on what an answer took, beside what a dense cache would have taken."""
    stats = output.stats
    assert stats is not None
    ends = {
        "stop": "finished",
        "length": "cut off at --max-new-tokens or the model's context",
        "interrupted": "interrupted",
    }
    rate = "" if speed is None else f", {speed:.0f} tokens/s"
    memory, dense = map(options.readable_bytes, (stats.kv_bytes, stats.dense_kv_bytes))
    return (
        f"[{stats.generated_tokens} tokens after a prompt of {stats.prompt_tokens}{rate}; "
        f"{ends.get(str(output.finish_reason), output.finish_reason)}]\n"
        f"[{stats.kept_pages} pages kept, {stats.evicted_pages} forgotten; "
        f"keys and values: {memory}, a dense cache: {dense}]"
    )
