"""Drive a decode page by page, look at the state, and force what the model writes next.

python examples/page_by_page.py
"""

import jax.numpy as jnp

import raas_jax
from raas_jax import tokenizer

params = raas_jax.load("demo")
prompt = tokenizer.encode(params, "a = 4 ; b = 9 ; c = a + b ; d = c - a ; ? d :")[0][0]
policy = raas_jax.RaaS(budget=32, page_size=4)
stops = tokenizer.stop_token_ids(params)

session = raas_jax.Session.create(params, policy, [len(prompt)], max_new_tokens=128)
state, progress = session.start([prompt], raas_jax.RowRequest.create([128], stops))
seen, answer = session.read(progress), []
while True:
    new = [int(token) for token in seen.tokens[:, 0] if token >= 0]
    answer += new
    kept = int(jnp.sum(state.cache.kept[0].fill[0, 0, 0] > 0))
    print(f"{kept} pages kept, {int(seen.evicted[0])} forgotten: {tokenizer.decode(params, new)}")
    if seen.done.all():
        break
    state, progress = session.advance(state, pages=1)
    seen = session.read(progress)

# The same page once more, but now the caller chooses the tokens: how likely were they?
state, progress = session.start([prompt], raas_jax.RowRequest.create([128], stops))
state, progress = session.advance(state, force=[[token] for token in answer[1:5]])
for token, logprob in zip(answer[1:5], session.read(progress).logprobs[:, 0], strict=True):
    print(f"{logprob:8.4f}  {tokenizer.decode(params, [token])}")
