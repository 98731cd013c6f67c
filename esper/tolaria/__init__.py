"""Distributed training, as one stack of rooms; each imports only what stands to its right.

training -> checkpoint -> lockstep -> growth -> ranks, data

training     the loop: steps, losses, evaluation, the governor, the result of a run
checkpoint   saves, snapshots in memory, and the files on disk
lockstep     one tick: the two collectives, and what happens around them
growth       makes the model follow the agreed state: births, optimizer, wrapper
ranks        process groups, the start handshake, heartbeats, digests
data         data sets in four parts, and which sample is seen when and where
"""
