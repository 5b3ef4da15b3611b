"""Text to batches: sources, Gemma's tokenizer, packed rows, mixtures."""
