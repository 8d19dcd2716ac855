"""One room per op; `calm_fast.ops` is their public face. Read reference.py first, then api.py."""
