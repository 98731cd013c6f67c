"""The agreed state of a run and the rules by which it changes: pure Python, without tensors, ranks or files."""
