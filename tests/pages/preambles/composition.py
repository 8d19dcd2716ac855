import torch
from tiny import byte_tokenizer, llama, save

save("path/of/anchor", byte_tokenizer(), 32, 4)
save("path/of/augmenter", byte_tokenizer(), 24, 4)
save("path/of/gemma", byte_tokenizer(), 32, 4)
save("path/of/smollm", byte_tokenizer("<empty>"), 24, 4)
gemma_tokenizer, smollm_tokenizer = byte_tokenizer(), byte_tokenizer("<empty>")
anchor, augmenter = llama(), llama(24)
input_ids = prompts = torch.randint(2, 250, (2, 9))
labels = input_ids.masked_fill(torch.arange(9) < 4, -100)
mask = torch.ones_like(input_ids)
prompt_lengths = torch.tensor([3, 4])
