"""Evaluate an anchor, an augmenter and their composition with lm-evaluation-harness, on a task of one's own.

Two tiny random Llamas, their composition, a tokenizer and a task are written to a folder. Then the harness' own command
line runs on each of the three, and its numbers are compared with `score_sequences`. Needs: pip install 'lm-eval[hf]'.
Takes about a minute on one CPU core.

    python examples/lm_eval_tiny.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import compose, score_sequences

WORDS = [f"n{i}" for i in range(40)]
TASK = """\
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path) -> list[dict]:
    """Write the task (a yaml file) and its rows: count on, with one right and two wrong choices. Return the rows."""
    rows = []
    for start in range(12):
        right, others = WORDS[start + 3 : start + 5], (WORDS[start * 7 % 39 :][:2], WORDS[start : start + 2])
        choices = [" ".join(pair) for pair in others]
        choices.insert(start % 3, " ".join(right))
        rows.append({"text": " ".join(WORDS[start : start + 3]), "choices": choices, "answer": start % 3})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "counting.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return rows


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word."""
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {w: 3 + i for i, w in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_models(folder: Path) -> None:
    """Write anchor, augmenter and composition, each with the tokenizer."""
    for name, width, length in (("anchor", 32, 48), ("augmenter", 16, 64)):
        config = LlamaConfig(
            vocab_size=43, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=length, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
    composed = compose(folder / "anchor", folder / "augmenter", [(-1, -1), (1, 0)])
    for parameter in composed.parameters():
        if parameter.requires_grad:  # an untrained composition would equal its anchor
            torch.nn.init.normal_(parameter, std=0.3)
    composed.save_pretrained(folder / "composition")
    for name in ("anchor", "augmenter", "composition"):
        tokenizer().save_pretrained(folder / name)


def evaluate(folder: Path, model: str, batch_size: int = 4, **model_args: str) -> tuple[float, list[list[float]]]:
    """Run the harness' command line on folder/model. Return (accuracy, log-probabilities of each row's choices)."""
    from calm_fast.lm_eval import cli_evaluate

    out = folder / f"results_{model}_{batch_size}"
    given = {"pretrained": str(folder / model), "dtype": "float32"} | model_args
    command = ["lm_eval", "run", "--model", "calm_fast", "--model_args", ",".join(f"{k}={v}" for k, v in given.items())]
    command += ["--tasks", "counting", "--include_path", str(folder), "--device", "cpu"]
    command += ["--batch_size", str(batch_size), "--log_samples", "--output_path", str(out)]
    with patch.object(sys, "argv", command):  # in a shell: python -m calm_fast.lm_eval run ...
        cli_evaluate()
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    scores = [[float(answer[0][0]) for answer in row["resps"]] for row in rows]
    return json.loads(results.read_text())["results"]["counting"]["acc,none"], scores


def main() -> None:
    torch.manual_seed(0)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    rows = write_task(folder)
    write_models(folder)
    for name in ("anchor", "augmenter", "composition"):
        accuracy, scores = evaluate(folder, name)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        texts = [[f" {choice}" for choice in row["choices"]] for row in rows]
        own = score_sequences(model, [row["text"] for row in rows], texts, tokenizer=tokenizer())
        gap = max(
            abs(a - b) for row, score in zip(scores, own, strict=True) for a, b in zip(row, score.sum, strict=True)
        )
        print(f"{name}: accuracy {accuracy:.3f}; largest difference from score_sequences {gap:.1e} nats")


if __name__ == "__main__":
    main()
