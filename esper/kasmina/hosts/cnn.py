"""A small convolutional host: stages of conv3x3, GroupNorm, ReLU, halved in resolution between stages.

Small on purpose: the default leaves accuracy on the table, so that growth has something to win. It uses GroupNorm, so
that no statistic depends on the batch or differs between ranks. No operation works in place, so that a slot's feature
is what the module returned.
"""

from torch import Tensor, nn
from torch.nn.functional import relu

from esper.kasmina.blueprints.parts import GroupNorm
from esper.kasmina.hosts.configs import CNNConfig
from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.hosts.resume import Chain
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology


class ConvStage(nn.Module):
    """conv3x3, GroupNorm, ReLU at one resolution."""

    def __init__(self, channels: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = GroupNorm(norm_groups, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, width, H, W]."""
        return relu(self.norm(self.conv(x_BCHW)))


class CNN(Chain):
    """Stages with pooling between, global average pooling, a linear head. Takes any resolution that survives pooling.

    Slot map, for S stages (row = stage; column 0 before, 1 after the pooling that follows it):

        slot       feature                                         module
        r{s}c0     output of stage s, full resolution of the row   stages.{s}
        r{s}c1     the same after 2x2 max pooling, s < S - 1       pools.{s}

    A row is a depth tier, so that rows mean the same in every host, and row-major order is the order of execution too.
    The columns are the two resolutions of a stage. The last stage is pooled globally and has no c1. Widths [4, 8] on
    8x8 images give r0c0 (4, 8, 8), r0c1 (4, 4, 4) and r1c0 (8, 4, 4).

    Args:
        config: see `CNNConfig`.
        channels: channels of the input.
        classes: width of the logits.
    """

    def __init__(self, config: CNNConfig, *, channels: int, classes: int) -> None:
        super().__init__()
        inputs = [channels, *config.widths[:-1]]
        self.stages = nn.ModuleList(
            ConvStage(before, width, config.norm_groups) for before, width in zip(inputs, config.widths)
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(2) for _ in config.widths[1:])
        self.head = nn.Linear(config.widths[-1], classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to logits [B, classes]."""
        for stage, pool in zip(self.stages, self.pools):
            x_BCHW = pool(stage(x_BCHW))
        return self._tail(self.stages[-1](x_BCHW))

    def _stem(self, x: Tensor) -> Tensor:
        return x

    def _tail(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=(2, 3)))

    def _links(self) -> tuple[str, ...]:
        pairs = [(f"stages.{row}", f"pools.{row}") for row in range(len(self.pools))]
        return (*(link for pair in pairs for link in pair), f"stages.{len(self.pools)}")

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major; see the slot map above."""
        points = []
        for row in range(len(self.stages)):
            points.append(InjectionPoint(slot=f"r{row}c0", module=f"stages.{row}", topology=Topology.FEATURE_MAP))
            if row < len(self.pools):
                points.append(InjectionPoint(slot=f"r{row}c1", module=f"pools.{row}", topology=Topology.FEATURE_MAP))
        return tuple(points)


def build_cnn(config: CNNConfig, *, input_shape: tuple[int, ...], classes: int) -> CNN:
    """Builds the host for images.

    Raises:
        ConfigError: ``input_shape`` is not (C, H, W), or too small to be halved between all stages.
    """
    if len(input_shape) != 3:
        raise ConfigError(f"host.kind = 'cnn': needs images of shape (C, H, W), the data has {input_shape}")
    halvings = len(config.widths) - 1
    if min(input_shape[1:]) < 2**halvings:
        raise ConfigError(
            f"host.widths = {config.widths!r}: {halvings} halvings need images of at least {2**halvings} pixels "
            f"a side, the data has {input_shape[1]}x{input_shape[2]}; use fewer stages"
        )
    return CNN(config, channels=input_shape[0], classes=classes)
