import json
from pathlib import Path

import torch
from tiny import byte_tokenizer, llama
from transformers import BertConfig, BertModel

import calm_fast  # noqa: F401  for the page
from calm_fast.consistency import SelfConsistency  # noqa: F401  for the page

model, tokenizer = llama(16, 2), byte_tokenizer()
rows = [{"answer": "0.5", "generated_answer": ["The answer is 1/2", "The answer is 0.5", "The answer is 3"]}]
prompts, completions = ["2 + 2 ="], [[" 4", " 5"]]
questions, references = ["2 + 2 = ?", "1 + 2 = ?"], ["4", "3"]
rationales = [["The answer is 4", "The answer is 5"], ["The answer is 3", "The answer is 9"]]
labels = [[True, False], [True, False]]
new_questions, new_rationales, new_labels = questions, rationales, labels
samples = [
    {"question": q, "answer": a, "generated_answer": r}
    for q, a, r in zip(questions, references, rationales, strict=True)
]
Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
torch.manual_seed(0)
config = BertConfig(
    vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
BertModel(config).save_pretrained("path/to/encoder")
tokenizer.save_pretrained("path/to/encoder")
