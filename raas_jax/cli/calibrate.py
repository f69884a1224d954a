"""`raas-jax calibrate`: the file that the policy triattention needs, from a model's own text."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from raas_jax.checks import MOST_TOKENS
from raas_jax.cli.options import Dtype, File, Model, Within, check_out
from raas_jax.cli.prompts import Prompt, demo_prompts, read_prompts


@dataclasses.dataclass
class Calibrate:
    """Learn where a model's queries lie, for triattention."""

    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write, as safetensors."""
    model: Model = "demo"
    prompts: File = None
    """File with one prompt per line, as for generate --prompt-file; the demo has its own."""
    max_new_tokens: Annotated[int, Within(0, MOST_TOKENS), tyro.conf.arg(aliases=["-n"])] = 256
    """Most tokens of the greedy answer that is read after each prompt; 0 reads prompts alone."""
    dtype: Dtype = None

    def run(self) -> int:
        """Writes the file and says what it was made of."""
        import raas_jax
        from raas_jax import tokenizer
        from raas_jax.calibrate import calibrate
        from raas_jax.lab.runs.planning import with_answers

        check_out("--out", self.out)
        prompts = self._prompts()
        params = raas_jax.load(self.model, dtype=self.dtype)
        sequences, _ = tokenizer.encode(params, prompts)
        sequences = with_answers(params, sequences, self.max_new_tokens)
        calibrate(params, sequences).write(self.out)
        print(f"{self.out}: {sum(map(len, sequences))} tokens of {len(sequences)} texts")
        return 0

    def _prompts(self) -> list[Prompt]:
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if self.model != "demo":
            raise ValueError("--prompts is not given; only the demo has prompts of its own.")
        return demo_prompts(16)
