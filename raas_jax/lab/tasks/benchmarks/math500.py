"""MATH-500 (arXiv 2103.03874, the 500 problems of arXiv 2305.20050): competition mathematics."""

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Row
from raas_jax.lab.tasks.benchmarks.prompts import STEP_BY_STEP
from raas_jax.lab.tasks.benchmarks.rows import Hub


def read(row: Row) -> tuple[str, str, str]:
    """Answers are LaTeX."""
    prompt = f"{row['problem']}\n{STEP_BY_STEP}"
    return prompt, str(row["answer"]), str(row.get("solution", ""))


MATH500 = Benchmark(
    "math500", ("problem", "answer"), read, Hub("HuggingFaceH4/MATH-500", None, "test")
)
