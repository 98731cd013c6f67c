"""Many tiny hosts in training, stepped together on one device: `esper.leyline.protocols.Trials`.

What a net computes is its own: nets share operators and no number. Hosts of one shape and one optimizer form a band
(`esper.simic.batched.band`), which is fast from some 16 nets on. Topologies within a band differ after births: weights
lie in blocks by slot and blueprint, and a forward selects the rows that take part (`esper.simic.batched.lanes`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from esper.leyline.commands import Command
from esper.leyline.errors import EsperError
from esper.leyline.protocols import Report
from esper.simic.batched.band import Band, shape_of
from esper.simic.batched.net import Net
from esper.simic.batched.recipe import Recipe

Task = TypeVar("Task", contravariant=True)


class BatchedTrials(Generic[Task]):
    """N hosts in training.

    Args:
        places: N.
        build: makes a trial's recipe of a task and a seed.

    Fields:
        nets: by place; None where none has begun.
        bands: by place, the band of its net.
    """

    def __init__(self, places: int, build: Callable[[Task, int], Recipe]) -> None:
        self.build = build
        self.nets: list[Net | None] = [None] * places
        self.bands: list[Band | None] = [None] * places
        self._by_shape: dict[Hashable, Band] = {}

    def __len__(self) -> int:
        return len(self.nets)

    def begin(self, index: int, task: Task, seed: int) -> Report:
        """Starts a trial; see `esper.leyline.protocols.Trials`.

        Raises:
            ConfigError: such a host cannot be stepped with others.
        """
        return self.begin_many([(index, task, seed)])[0]

    def begin_many(self, trials: Sequence[tuple[int, Task, int]]) -> list[Report]:
        """`begin` for several places at once: their first ticks are trained together too."""
        recipes = [(index, self.build(task, seed)) for index, task, seed in trials]
        for index, recipe in recipes:
            shape, before = shape_of(recipe), self.bands[index]
            if before is not None:
                before.leave(index)
                self.nets[index] = self.bands[index] = None
            if shape not in self._by_shape:
                self._by_shape[shape] = Band(len(self), recipe)
            self.bands[index] = band = self._by_shape[shape]
            self.nets[index] = band.place(index, recipe)
        self._train([index for index, _ in recipes])
        return [self._report(index) for index, _ in recipes]

    def advance(self, commands: Sequence[Sequence[Command]]) -> tuple[Report, ...]:
        """Takes every trial to its next tick; see `esper.leyline.protocols.Trials`.

        Raises:
            EsperError: a place has no trial, or there are more or fewer lists of commands than places.
            ConfigError: a command names an unknown slot or blueprint, or a field has a value that it cannot have.
        """
        self.commit(commands)
        return self.train()

    def commit(self, commands: Sequence[Sequence[Command]]) -> None:
        """The first half of `advance`: commits the commands, and changes the nets as their records then say."""
        if len(commands) != len(self):
            raise EsperError(f"commands for {len(commands)} of {len(self)} trials; give a list, maybe empty, for each")
        for index, net in enumerate(self.nets):
            if net is None:
                raise EsperError(f"trial {index} has not begun; call begin({index}, task, seed) first")
            net.births = net.prunes = 0
        for band, nets in self._running(range(len(self))):
            band.commit(nets, [commands[net.place] for net in nets])

    def train(self) -> tuple[Report, ...]:
        """The second half of `advance`: trains each net to its next tick, and reports."""
        self._train(range(len(self)))
        return tuple(self._report(index) for index in range(len(self)))

    def _train(self, places: Sequence[int]) -> None:
        for band, nets in self._running(places):
            band.train(nets)

    def _running(self, places: Sequence[int]) -> list[tuple[Band, list[Net]]]:
        """The nets of these places that are not over, by band."""
        found: dict[Band, list[Net]] = {}
        for index in places:
            net, band = self.nets[index], self.bands[index]
            assert net is not None
            assert band is not None
            if not net.over:
                found.setdefault(band, []).append(net)
        return list(found.items())

    def _report(self, index: int) -> Report:
        """The latest report of a place; a trial that is over has no births or prunes any more."""
        net = self.nets[index]
        assert net is not None
        assert net.report is not None
        return replace(net.report, births=net.births, prunes=net.prunes)
