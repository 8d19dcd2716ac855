"""Arguments of a tokenizer's apply_chat_template that are no variables of the template."""

from __future__ import annotations

# given by whoever makes the prompt: as "variables" they would cut it, pad it or replace the template
ARGUMENTS = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
        "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
        "tokenize", "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
