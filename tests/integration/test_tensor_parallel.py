"""Tensor parallelism of the parts, by transformers' own plans, with two processes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration(
    tool="tensor parallel",
    what='parts with `tp_plan="auto"`: train, generate, save, load; 2 processes',
    verdict="works",
)
@pytest.mark.heavy_integration
def test_parts_are_sharded_by_their_plans(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("tensor_parallel_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("passed") == 2, run.stdout
