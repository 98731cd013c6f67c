"""What all ranks agree on, and how it may change: pure Python, no tensor, no rank, no file."""
