"""Run a contestant as a CUDA graph, as a decoding loop would."""

from __future__ import annotations

import torch

from calm_fast.benchmarks.registry import CannotRunError, Thunk, Values


def graphed(thunk: Thunk, warmup: int = 3) -> Thunk:
    """Capture `thunk` once and return a thunk that replays it. The results are the graph's own tensors.

    Raises:
        CannotRunError: there is no GPU, or part of the work cannot be captured.
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

    def replay() -> Values:
        graph.replay()
        return values

    return replay
