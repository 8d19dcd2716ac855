"""FSDP2 through `accelerate launch`, its config file and Trainer's fsdp_config, with two processes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer,CrossAttention
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""


def launch(folder: Path, *parts: str) -> None:
    """Run `parts` of fsdp_worker.py in two processes, which fail where their results differ from one process's."""
    (folder / "config.yaml").write_text(CONFIG)
    worker = str(Path(__file__).with_name("fsdp_worker.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, worker, str(folder), *parts],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    for part in parts:
        assert run.stdout.count(f"passed: {part}") == 2, run.stdout


@pytest.mark.integration(
    tool="FSDP2", what="composition: `accelerate launch` with a config file, train, save, load", verdict="works"
)
@pytest.mark.integration(
    tool="accelerate", what="composition: the loop of accelerate's examples, two processes", verdict="works"
)
def test_a_composition_under_the_config_of_accelerate(tmp_path: Path) -> None:
    launch(tmp_path, "accelerate")


@pytest.mark.integration(
    tool="FSDP2", what="composition: Trainer's `fsdp_config`, train, save, resume, load", verdict="works"
)
@pytest.mark.integration(
    tool="FSDP2", what="dual LoRA: Trainer's `fsdp_config`, `save_dual_lora`, `save_lora_adapter`", verdict="works"
)
@pytest.mark.heavy_integration
def test_trainer_shards_compositions_and_dual_lora(tmp_path: Path) -> None:
    launch(tmp_path, "Trainer", "dual LoRA")
