"""Speed and memory measurements against strong baselines; installed as ``calm_fast.benchmarks``."""
