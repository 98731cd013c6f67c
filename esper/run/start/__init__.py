"""What a run starts with: another run or weights from elsewhere, and what its parts cost."""
