"""What ticks, births, saves and resumes cost on a cluster: formulas of bytes, messages and bandwidths.

    costs(Job(parameters=124e6, step_s=0.25), Cluster(machines=8))

Figures of a machine that is not at hand are assumptions, and each is a field; `launch/simulate.py cost` takes them as
arguments. docs/scale.md says where they come from, and what was measured.
"""

from dataclasses import dataclass, field

from esper.drill.ring import Link, grid_seconds, ring_seconds, tree_seconds

GIB = 1 << 30
STATE = 12  # bytes of a parameter in a checkpoint: float32 weight and two moments
GLOO_GROUPS = 2  # default and control; a world of CPUs has its data group there too
TCP = Link(latency_s=20e-6, cpu_s=20e-6, bytes_per_s=2.5e9, spread=0.3)


def observe_bytes(slots: int) -> int:
    """Bytes of the sums of a tick."""
    return 8 * (48 + 34 * slots)


def commit_bytes(slots: int, ranks: int) -> int:
    """Bytes of the commands, digests and words of a tick."""
    return 8 * (9 * slots + 2 * (7 + 4 * slots) + ranks + 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines and what connects them.

    Fields:
        machines: number of machines.
        per_machine: GPUs, and so ranks, on each.
        tcp: between two ranks, as gloo sees it.
        inside_bytes_per_s: bus bandwidth of an all-reduce within a machine.
        between_bytes_per_s: of one GPU's share of the network between machines.
        to_host_bytes_per_s: from a GPU to its machine's memory.
        disk_bytes_per_s: of the shared file system, for all machines together.
        writer_bytes_per_s: of one process that writes or hashes a file.
    """

    machines: int
    per_machine: int = 8
    tcp: Link = field(default=TCP)
    inside_bytes_per_s: float = 300e9
    between_bytes_per_s: float = 40e9
    to_host_bytes_per_s: float = 20e9
    disk_bytes_per_s: float = 20e9
    writer_bytes_per_s: float = 1e9

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.machines * self.per_machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run.

    Fields:
        parameters: of the host.
        step_s: seconds of one of its steps.
        slots: number of slots.
        every: steps between ticks.
        seed_parameters: of a seed.
        tick_s: seconds of the processor for a tick by itself, on few ranks.
        tick_rank_s: and for each rank of the job, whose word it reads.
        build_s: seconds to build a seed, for each of its parameters.
        wrap_s: seconds to wrap the model anew, for each of its parameters.
    """

    parameters: float
    step_s: float
    slots: int = 12
    every: int = 50
    seed_parameters: float = 1e6
    tick_s: float = 10.5e-3
    tick_rank_s: float = 4.1e-6
    build_s: float = 80e-3 / 8.4e6
    wrap_s: float = 0.008 * 0.23 / 50e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a job pays; seconds, but for the last three.

    Fields:
        observe_s: the first collective of a tick.
        commit_s: the second.
        tick_s: a tick: both and the processor's part.
        share: of the time of training that ticks take.
        grid_s: both collectives, were they summed over the rows and then the columns of a square of ranks.
        tree_s: both, were they done by recursive doubling.
        birth_s: what a birth without the seed library adds to its tick: the seed built, the model wrapped anew.
        seed_step_s: what a seed's gradient adds to a step, were nothing of it hidden behind the backward.
        save_stall_s: for which training waits at a save: the state's copy into the machine's memory.
        save_s: after which it is on the disk.
        resume_s: until every machine has read the state and every rank has hashed it.
        state_bytes: of a checkpoint.
        open_files: connections of a process.
        mesh: connections that come up at the start, in all.
    """

    observe_s: float
    commit_s: float
    tick_s: float
    share: float
    grid_s: float
    tree_s: float
    birth_s: float
    seed_step_s: float
    save_stall_s: float
    save_s: float
    resume_s: float
    state_bytes: float
    open_files: int
    mesh: int


def costs(job: Job, cluster: Cluster) -> Costs:
    """The costs of a job on a cluster."""
    ranks = cluster.ranks
    sizes = (observe_bytes(job.slots), commit_bytes(job.slots, ranks))
    observe, commit = (ring_seconds(ranks, size, cluster.tcp) for size in sizes)
    tick = observe + commit + job.tick_s + job.tick_rank_s * ranks
    state = STATE * job.parameters
    bus = cluster.inside_bytes_per_s if cluster.machines == 1 else cluster.between_bytes_per_s
    return Costs(
        observe_s=observe,
        commit_s=commit,
        tick_s=tick,
        share=tick / (tick + job.every * job.step_s),
        grid_s=sum(grid_seconds(ranks, size, cluster.tcp) for size in sizes),
        tree_s=sum(tree_seconds(ranks, size, cluster.tcp) for size in sizes),
        birth_s=job.build_s * job.seed_parameters + job.wrap_s * job.parameters,
        seed_step_s=2 * (ranks - 1) / ranks * 4 * job.seed_parameters / bus,
        save_stall_s=state / cluster.to_host_bytes_per_s,
        save_s=state / min(cluster.writer_bytes_per_s, cluster.disk_bytes_per_s),
        resume_s=state * cluster.machines / cluster.disk_bytes_per_s + state / cluster.writer_bytes_per_s,
        state_bytes=state,
        open_files=GLOO_GROUPS * (ranks - 1),
        mesh=GLOO_GROUPS * ranks * (ranks - 1) // 2,
    )
