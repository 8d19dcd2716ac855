import gzip
import json

from tiny import byte_tokenizer, llama, save

save("path/of/model", byte_tokenizer(), 16, 2)
tokenizer = byte_tokenizer()
rows = [
    {"question": f"{a} + 2 = ?", "answer": f"{a + 2}", "generated_answer": [f"The answer is {a + d}" for d in (1, 2)]}
    for a in range(6)
]
with gzip.open("rows.jsonl.gz", "wt") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
model, teacher = llama(16, 2), llama(16, 2)
input_ids = tokenizer(["some text"], return_tensors="pt")["input_ids"]
mask = input_ids.new_ones(input_ids.shape)
