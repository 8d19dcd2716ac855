"""The baselines: what users would run instead, written as well as plain torch allows."""
