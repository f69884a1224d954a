"""What the RaaS paper (arXiv 2502.11147) adds to a question, word for word."""

STEP_BY_STEP = "Let's think step by step and output in latex format."
STANDALONE = "Make sure the final answer is standalone and in latex format."
