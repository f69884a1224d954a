"""AIME 2024: both papers of the invitational, 30 problems with answers from 0 to 999."""

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Row
from raas_jax.lab.tasks.benchmarks.prompts import STANDALONE
from raas_jax.lab.tasks.benchmarks.rows import Hub


def read(row: Row) -> tuple[str, str, str]:
    """Answers are integers, some with leading zeros."""
    prompt = f"{row['problem']}\n{STANDALONE}"
    return prompt, str(row["answer"]), str(row.get("solution", ""))


AIME24 = Benchmark(
    "aime24", ("problem", "answer"), read, Hub("HuggingFaceH4/aime_2024", None, "train")
)
