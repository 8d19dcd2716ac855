"""docs/assumptions.md: what it names of other packages exists, and no place that should be in it is missing."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.hooks
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils as fsdp
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, PreTrainedModel, Trainer
from transformers.cache_utils import LinearAttentionLayer
from transformers.integrations import neftune

import calm_fast
from calm_fast.core.wrapped_names import SEGMENTS
from calm_fast.hf.cache import is_empty
from calm_fast.hf.wrappers import has_peft_layers

ROOT = Path(calm_fast.__file__).parents[1]
PAGE = ROOT / "docs" / "assumptions.md"
if not PAGE.is_file():
    pytest.skip("the docs are not beside the tests", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
PLACES = set(re.findall(r"^\| `([\w/]+\.py): ([\w.]+)` \|", TEXT, re.MULTILINE))
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("calm_fast", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES |= {"tests/codegen/peers.py": ast.parse((ROOT / "tests/codegen/peers.py").read_text(encoding="utf-8"))}
OUR_OWN = re.compile(r"_replace|_asdict|_exit|_C|_functorch")  # of named tuples and os; namespaces of torch


def nodes(tree: ast.AST, place: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield (dotted name of the function around it, node) of every node."""
    for child in ast.iter_child_nodes(tree):
        named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        inside = f"{place}.{child.name}".lstrip(".") if named else place  # type: ignore[attr-defined]
        yield inside, child
        yield from nodes(child, inside)


def names_of_ours() -> set[str]:
    """Return every name that our own code defines."""
    found: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def broad(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    return node.type is None or bool(re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))


def test_no_handler_of_every_exception_is_missing() -> None:
    found = {(file, place) for file, tree in TREES.items() for place, node in nodes(tree) if broad(node)}
    assert len(found) > 10
    assert not found - PLACES


def test_no_private_name_of_another_package_is_missing() -> None:
    ours = names_of_ours() - {"_modules", "_parameters", "_buffers", "_version"}
    found = {
        (file, place, node.attr)
        for file, tree in TREES.items()
        for place, node in nodes(tree)
        if isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr) and node.attr not in ours
        if not OUR_OWN.fullmatch(node.attr) and "torch.ops." not in ast.unparse(node)
        if not ast.unparse(node.value).startswith("library")  # torch.ops.calm_fast
    }
    assert len(found) > 20
    assert not {one for one in found if one[:2] not in PLACES}


def test_every_row_names_a_function_and_a_test_that_exist() -> None:
    assert len(PLACES) > 60
    defined = {(file, place) for file, tree in TREES.items() for place, _ in nodes(tree)}
    assert not PLACES - defined
    tests = set(re.findall(r"`(tests/[\w/]+\.py)`", TEXT))
    assert not {name for name in tests if not (ROOT / name).is_file()}


class _Called(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# owner -> private names of it that the page mentions, or that its rows stand for
NAMES: list[tuple[Any, str]] = [
    (GenerationMixin, "_prepare_cache_for_generation _validate_model_kwargs _supports_default_dynamic_cache"),
    (PreTrainedModel, "_set_gradient_checkpointing _is_stateful _keys_to_ignore_on_save"),
    (GenerationConfig(), "assistant_early_exit"),
    (LinearAttentionLayer(), "has_previous_state"),
    (LlamaConfig(), "_attn_implementation _attn_implementation_internal"),
    (nn.Module(), "_modules _parameters _buffers _get_name _replicate_for_data_parallel"),
    (nn.Module(), "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks"),
    (nn.modules.dropout, "_DropoutNd"),
    (nn.Dropout(), "p"),
    (torch.ones(1, requires_grad=True), "_version"),
    (torch.ones(1, requires_grad=True).clone().grad_fn.next_functions[0][0], "variable"),  # type: ignore[union-attr]
    (torch, "_assert_async"),
    (torch._C, "_is_tracing _are_functorch_transforms_active _len_torch_dispatch_stack _dispatch_get_all_op_names"),
    (torch._C, "_dispatch_has_kernel_for_dispatch_key"),
    (torch._C._functorch, "get_interpreter_stack"),
    (forward_ad, "_current_level"),
    (BaseTunerLayer, "get_base_layer"),
    (AuxiliaryTrainingWrapper, "forward"),
]


@pytest.mark.parametrize(
    ("owner", "names"),
    NAMES,
    ids=lambda value: value[:40] if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_names_exist(owner: Any, names: str) -> None:
    assert [name for name in names.split() if not hasattr(owner, name)] == []


def test_names_that_other_packages_write_are_still_written() -> None:
    written = {
        "_hf_hook": accelerate.hooks.add_hook_to_module,
        "neftune_noise_alpha": neftune,
        "_get_name()": Trainer.compute_loss,
        "hf_quantizer": PreTrainedModel.from_pretrained,
        "_gradient_checkpointing_func": PreTrainedModel._set_gradient_checkpointing,
        "_fsdp_flattened": fsdp,
    }
    missing = [name for name, where in written.items() if name not in inspect.getsource(where)]
    assert missing == []
    compiled = next(iter(dict(torch.compile(_Called()).named_children())))  # type: ignore[attr-defined]  # a module
    segments = {compiled, fsdp.FSDP_WRAPPED_MODULE, checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE}
    assert segments == SEGMENTS


def test_the_attention_of_one_config_is_set_without_its_parts() -> None:
    config = LlamaConfig()
    config._attn_implementation_internal = "flex_attention"
    assert config._attn_implementation == "flex_attention"


class _Stateless(LinearAttentionLayer):
    """A recurrent cache layer of a release that calls its flag otherwise."""

    @property
    def has_previous_state(self) -> Any:
        raise AttributeError("has_previous_state")

    @has_previous_state.setter
    def has_previous_state(self, value: Any) -> None: ...


def test_a_recurrent_cache_without_the_known_flag_is_not_taken_for_empty() -> None:
    with pytest.raises(AttributeError, match="has_previous_state"):
        is_empty(SimpleNamespace(layers=[_Stateless()]))  # type: ignore[arg-type]


def test_adapters_are_known_by_pefts_class_and_not_by_its_name() -> None:
    namesake = type("BaseTunerLayer", (nn.Linear,), {})
    assert not has_peft_layers(nn.Sequential(namesake(2, 2)))
