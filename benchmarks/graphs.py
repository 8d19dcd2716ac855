"""CUDA graphs around a contestant, as a decoding loop would use them."""

from __future__ import annotations

import torch

from calm_fast.benchmarks.registry import CannotRunError, Thunk


def graphed(thunk: Thunk, warmup: int = 3) -> Thunk:
    """The same work captured once and replayed; results are the graph's own tensors.

    Raises:
        CannotRunError: no GPU, or something in the work cannot be captured.
    """
    if not torch.cuda.is_available():
        raise CannotRunError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation, autotuning and lazy initialisation must not be captured
        for _ in range(warmup):
            thunk()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            values = thunk()
    except RuntimeError as failure:
        raise CannotRunError(f"cannot be captured as a CUDA graph: {failure}") from failure

    def replay():
        graph.replay()
        return values

    return replay
