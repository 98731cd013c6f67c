"""Compiled kernels on disk: where they are kept, who compiles them ahead, and what a compile found there."""
