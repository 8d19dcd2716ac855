"""Ask vLLM: FOLDER has the composition `AB` and the prompts `asked.json`, and gets `answers.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def told(outputs: Any) -> list[dict[str, Any]]:
    """Return per prompt the log-probability of each of its tokens but the first, and the tokens that follow."""
    rows = []
    for output in outputs:
        own = output.outputs[0]
        pairs = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:], strict=False)
        rows.append(
            {
                "prompt": [found[token].logprob for token, found in pairs],
                "tokens": list(own.token_ids),
                "logprobs": [found[token].logprob for token, found in zip(own.token_ids, own.logprobs, strict=True)],
                "cached": output.num_cached_tokens,
            }
        )
    return rows


def main(folder: Path) -> None:
    """Ask twice: with the log-probabilities of the prompts, which are read in chunks, and out of the prefix cache."""
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in json.loads((folder / "asked.json").read_text())]
    llm = LLM(
        model=str(folder / "AB"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128,
        block_size=32, max_num_batched_tokens=16, max_num_seqs=4,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "temperature": 0, "max_tokens": 10, "ignore_eos": True, "detokenize": False, "logprobs": 0
    }  # fmt: skip
    answers = [told(llm.generate(prompts, SamplingParams(**settings, **more))) for more in ({"prompt_logprobs": 0}, {})]
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
