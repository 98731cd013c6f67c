"""Evidence that adds up over the looks of a life, and the bounds by which it is judged: see docs/gates.md.

    sums     what is reduced: sums over clusters, which add up over ranks and looks
    bound    e-values of running sums, valid at any time
    levels   how sure a birth must be, so that the run as a whole is bounded
    plan     which share of the probe a look draws

Pure functions of agreed numbers: standard library only.
"""
