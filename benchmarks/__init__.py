"""Speed and memory measurements against strong baselines; installed as ``calm_fast.benchmarks``.

A case file (`cases/<op>.py`) defines the measurements, `registry` lists them, `timing` times, `run` is the command line
and `report` writes the results. Importing this package imports nothing.
"""
