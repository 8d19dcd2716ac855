"""The repository that tools/kernel_hub.py writes is one that the package `kernels` reads and loads, without the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("kernels._rust")  # without the package, `kernels` may be the folder of this checkout
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from kernels._rust import Build  # noqa: E402

import kernels  # noqa: E402
from calm_fast.ops import cross_attention, linear_logprob  # noqa: E402
from tools import kernel_hub  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("the interpreter's variant is tested where there is no GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    assert kernel_hub.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(repository: Path) -> ModuleType:
    return kernels.get_local_kernel(repository, backend="cpu")


@pytest.mark.integration(tool="Kernel Hub", what="build.toml and the torch-ext layout", verdict="works")
def test_the_layout_is_read_and_stands_alone(repository: Path) -> None:
    build = Build.open(repository)
    assert [str(backend).lower() for backend in build.general.backends] == ["cuda", "cpu"]
    source = repository / "torch-ext" / kernel_hub.PACKAGE
    assert (source / "__init__.py").is_file()
    for path in source.rglob("*.py"):
        assert "from calm_fast" not in path.read_text() and "import calm_fast" not in path.read_text(), path
    assert kernel_hub.main([str(repository)]) == 1  # not over other files


@pytest.mark.integration(
    tool="Kernel Hub", what="Triton kernels loaded from a local path (Triton's interpreter)", verdict="works"
)
def test_a_loaded_kernel_gives_the_same_bits(loaded: ModuleType) -> None:
    assert "calm_fast." not in loaded.__name__
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    hi = torch.tensor([[0, 1, 3, 7, 7], [2, 2, 0, 5, 6]], dtype=torch.int32)
    wanted = cross_attention(q, k, v, hi=hi, return_lse=True, impl="triton")
    for own, other in zip(loaded.cross_attention(q, k, v, hi=hi), wanted, strict=True):
        assert torch.equal(own, other)
    hidden, weight, targets = torch.randn(6, 16), torch.randn(40, 16), torch.tensor([0, 39, -100, 7, 3, 3])
    own = loaded.linear_logprob(hidden, weight, targets)
    assert torch.equal(own, linear_logprob(hidden, weight, targets, impl="triton"))


@pytest.mark.integration(tool="Kernel Hub", what="wrong arguments, and tensors that require grad", verdict="refused")
def test_wrong_arguments_are_refused(loaded: ModuleType) -> None:
    q, k = torch.randn(1, 3, 4, 16), torch.randn(1, 5, 2, 16)
    with pytest.raises(ValueError, match=r"cross_attention: `v` must be of shape \(1, 5, 2, 16\)"):
        loaded.cross_attention(q, k, k[:, :4])
    with pytest.raises(ValueError, match="`q` must not require grad, because there is no backward pass here"):
        loaded.cross_attention(q.clone().requires_grad_(), k, k)
    with pytest.raises(ValueError, match="`hi` must be None with causal=True"):
        loaded.cross_attention(q, k, k, hi=torch.zeros(1, 3, dtype=torch.int32), causal=True)
    with pytest.raises(TypeError, match="`targets` must be int64"):
        loaded.linear_logprob(torch.randn(2, 8), torch.randn(9, 8), torch.zeros(2, dtype=torch.int32))
