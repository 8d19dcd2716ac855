from tiny import byte_tokenizer, llama

from calm_fast import compose

anchor_tokenizer, augmenter_tokenizer = byte_tokenizer(), byte_tokenizer("<empty>")
model = compose(llama(), llama(24), tokenizers=[anchor_tokenizer, augmenter_tokenizer])
b_ids = anchor_tokenizer("a few words to read")["input_ids"]
b_id = b_ids[0]
