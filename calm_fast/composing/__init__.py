"""Training, evaluating and asking compositions from files: what `calm-fast compose`, `eval` and `generate` do."""

from calm_fast.core.compatibility import importing

with importing("transformers"):
    from calm_fast.composing.data import Example, Row, encode, read_texts
    from calm_fast.composing.evaluate import evaluate_folder
    from calm_fast.composing.generation import generate_text
    from calm_fast.composing.pipeline import run
    from calm_fast.composing.settings import Settings

__all__ = ["Example", "Row", "Settings", "encode", "evaluate_folder", "read_texts", "run", "generate_text"]
