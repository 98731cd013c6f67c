"""Kernels ahead of the birth: a process beside the ranks of each machine compiles what may be born next."""
