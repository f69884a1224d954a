"""GSM8K (arXiv 2110.14168): grade-school word problems, 1,319 in the test split."""

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Row
from raas_jax.lab.tasks.benchmarks.prompts import STANDALONE
from raas_jax.lab.tasks.benchmarks.rows import Hub


def read(row: Row) -> tuple[str, str, str]:
    """The reference solution ends in `#### 1,234`."""
    solution = str(row["answer"])
    answer = solution.rpartition("####")[2].strip().replace(",", "")
    return f"{row['question']}\n{STANDALONE}", answer, solution


GSM8K = Benchmark("gsm8k", ("question", "answer"), read, Hub("openai/gsm8k", "main", "test"))
