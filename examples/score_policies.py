"""How likely is a right derivation when the cache forgets? Log-probabilities under three policies.

python examples/score_policies.py
"""

import raas_jax
from raas_jax.lab.tasks.lemma import Knobs, draw
from raas_jax.policies import Dense, RaaS, Recent

params = raas_jax.load("demo")
problem = draw("test", 0, 0, Knobs(24, 24))
for policy in (Dense(page_size=4), RaaS(64, page_size=4), Recent(64, page_size=4)):
    found = raas_jax.score(params, problem.prompt, problem.derivation, policy=policy)
    print(
        f"{type(policy).__name__:8} {len(found.tokens)} tokens, {found.total:9.3f} in all, "
        f"least likely {found.logprobs.min():8.3f}, {found.greedy.mean():.1%} greedy"
    )
