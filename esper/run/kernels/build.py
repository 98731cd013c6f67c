"""Builds the compiler of a run, and starts what compiles ahead."""

import operator

import torch

from esper.accord.state import Terms
from esper.config.tree import EsperConfig
from esper.kasmina.compiler import Compiler
from esper.kasmina.slots.grown import Grown
from esper.run.kernels.start import await_helper, keep_kernels, start_helper
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import eval_shards
from esper.tolaria.ranks.world import World
from esper.tolaria.training.length import forwards_of, plan_batches
from esper.tolaria.training.looks import look_sizes, plan_of
from esper.tolaria.training.precision import autocast, dtype_of


def batch_sizes(config: EsperConfig, bundle: Bundle, rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Batch sizes of a rank's forward passes, in training and in evaluation, with the short last batches; ascending."""
    plan = plan_batches(config.trainer, bundle, config.seed)
    steps = (0, plan.steps_per_epoch - 1)
    forwards = forwards_of(config.trainer, bundle, ranks)
    pieces = [piece for s in steps for piece in plan.pieces(s, rank, ranks, forwards)]
    most = config.trainer.eval_batch
    sizes = {len(shard) for shard in eval_shards(len(bundle.validation), rank, ranks, most)}
    for size in look_sizes(plan_of(config.gates, config.slots.incubation, bundle, plan), rank, ranks):
        sizes |= {len(shard) for shard in eval_shards(size, 0, 1, most)}
    return sorted({len(indices) for indices, _ in pieces}), sorted(sizes)


def build_compiler(config: EsperConfig, grown: Grown, bundle: Bundle, world: World, terms: Terms) -> Compiler:
    """Compiles the host's regions; seeds are compiled when they are staged, and beside training before that.

    Every rank rehearses rank 0's sizes first, so that all compile for the same hints of size, whoever comes first.
    """
    first, own = (batch_sizes(config, bundle, rank, world.size) for rank in (0, world.rank))
    train, evaluation = (list(dict.fromkeys(sizes)) for sizes in map(operator.add, first, own))
    example = bundle.example(world.device, dtype_of(config.trainer.precision))
    example = example.to(memory_format=torch.channels_last) if config.trainer.channels_last else example
    keep_kernels(config, world, [*first[0], *first[1]])
    ahead = start_helper(config, world, bundle, terms, example, (train, evaluation))
    compiler = Compiler(
        grown,
        config.trainer.compile_backend,
        train_sizes=train,
        eval_sizes=evaluation,
        incubation=config.slots.incubation,
        autocast=lambda: autocast(config.trainer.precision, world.device),
    )
    compiler.ahead = ahead
    try:
        compiler.host(example)
        await_helper(config, world, ahead)
    except BaseException:
        compiler.close()
        raise
    return compiler
