"""A test instrument: explores the shipped lockstep protocol without a network, with any number of ranks in one process.

It is part of the package so that users can run it on the version they have, by ``launch/simulate.py``. It holds no
protocol of its own: cycle, lockstep, wire format, reducer and error path are the shipped ones.

    bus                     ranks as threads, and the collectives between them
    replica, given          one rank: the shipped cycle over a model that is never trained, and stand-ins
    crowd                   many ranks in a random run, with at most one fault at the end
    guarded                 a crowd that falls ill: the shipped governor, rollback and saver
    explore                 every state of a small world, breadth first
    situations, invariants  what may happen in a tick of that world, and what must hold after it
"""
