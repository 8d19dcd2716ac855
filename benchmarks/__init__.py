"""Speed and memory measurements against strong baselines; installed as ``calm_fast.benchmarks``.

A case file (`cases/<op>.py`) says what is measured, `registry` lists them, `timing` measures, `run` puts it together,
`report` writes it down. Importing this package imports nothing.
"""
