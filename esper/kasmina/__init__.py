"""The growing model: a host network with slots, and the seeds that grow in them. No collectives, no telemetry.

    slots         what a slot computes: where it sits, how a seed's delta joins the host's features, compiled regions
    blueprints    what a seed may be: the registry of seed networks, and the built-in ones
    hosts         the networks that growth begins from: CNN, ResNet-20, GPT, or a model of your own
    births        how a seed is built, the same on every rank, and the library that keeps built seeds
    export        a grown model as a plain one without a class of esper, in memory and on disk
    kernels       compiled kernels on disk: where they lie, and what a compile found there
    attribution   what seeds are worth: leave-one-out, solo and Shapley values

Beside the folders: `attach` puts slots on a model, `compiler` compiles a grown model, `flops` counts its cost and
`streams` guards the random number streams.
"""
