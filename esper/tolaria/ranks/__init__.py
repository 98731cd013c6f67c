"""The ranks of a run: process groups, the start handshake, digests, and the naming of a missing rank."""
