"""What the LLM reads and writes: prompts, completions, rationales and the tiny model's tokenizer."""
