"""One room per op; `calm_fast.ops` is their public face. Read reference.py first, then api.py.

`vocabulary` and `voting` are no ops: they hold what linear_nce and linear_logprob share, and vote and maj_at_k.
"""
