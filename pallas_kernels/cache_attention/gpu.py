def cache_attention_gpu(*a, **k):
    raise NotImplementedError("later")
