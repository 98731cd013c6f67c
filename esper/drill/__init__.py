"""The lockstep protocol without a network: as many ranks as one likes in one process, and every fault explored."""
