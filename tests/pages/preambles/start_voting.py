import json
from pathlib import Path

row = {"question": "1 / 2 = ?", "answer": "0.5", "generated_answer": ["The answer is 1/2", "The answer is 2"]}
Path("samples.jsonl").write_text(json.dumps(row) + "\n")
