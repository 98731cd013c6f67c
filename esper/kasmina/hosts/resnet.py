"""ResNet-20 in its CIFAR form (He et al. 2016, "Deep residual learning for image recognition", section 4.2).

conv3x3, then three stages of three basic blocks at full, half and quarter resolution, twice as wide from stage to
stage, global average pooling, a linear head: 20 layers with weights. Shortcuts have no parameters: where a stage begins
they skip every other pixel and pad the new channels with zeros (option A of the paper). At width 16, for three channels
and ten classes, 269,722 parameters; width 4 is the quarter-width network.

BatchNorm, as in the paper: each rank normalises with its own share of a batch, so that N ranks are close to one process
but not equal to it; running statistics are averaged over ranks at every tick and differ again until the next one. No
operation works in place, so that a slot's feature is what the module returned.
"""

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from esper.kasmina.hosts.configs import ResNet20Config
from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.hosts.resume import Chain
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

STAGES = 3
BLOCKS = 3  # of each stage
SMALLEST = 5  # pixels a side; 2x2 remain in the last stage, so that BatchNorm can take a batch of one sample


class BasicBlock(nn.Module):
    """Computes relu(shortcut(x) + BN conv3x3 relu BN conv3x3 x); the first convolution has the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]."""
        residue = self.norm2(self.conv2(relu(self.norm1(self.conv1(x_BCHW)))))
        if self.stride > 1:
            x_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        if self.added:
            x_BCHW = pad(x_BCHW, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return relu(x_BCHW + residue)


class ResNet20(Chain):
    """The residual host; takes images of at least 5x5 pixels.

    Slot map (row = stage, one column), for width W on H x H images:

        slot       feature                                         module
        r0c0       output of stage 0, (W, H, H)                    stages.0
        r1c0       output of stage 1, (2W, H/2, H/2)               stages.1
        r2c0       output of stage 2, (4W, H/4, H/4)               stages.2

    Args:
        config: see `ResNet20Config`.
        channels: channels of the images.
        classes: width of the logits.
    """

    def __init__(self, config: ResNet20Config, *, channels: int, classes: int) -> None:
        super().__init__()
        widths = [config.width * 2**stage for stage in range(STAGES)]
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList()
        before = widths[0]
        for stage, width in enumerate(widths):
            first = BasicBlock(before, width, stride=1 if stage == 0 else 2)
            self.stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(BLOCKS - 1))))
            before = width
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to logits [B, classes]."""
        x_BCHW = self._stem(x_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        return self._tail(x_BCHW)

    def _stem(self, x: Tensor) -> Tensor:
        return relu(self.norm(self.conv(x)))

    def _tail(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=(2, 3)))

    def _links(self) -> tuple[str, ...]:
        return tuple(f"stages.{row}" for row in range(STAGES))

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major; see the slot map above."""
        return tuple(
            InjectionPoint(slot=f"r{row}c0", module=f"stages.{row}", topology=Topology.FEATURE_MAP)
            for row in range(STAGES)
        )


def build_resnet20(config: ResNet20Config, *, input_shape: tuple[int, ...], classes: int) -> ResNet20:
    """Builds the host for images.

    Raises:
        ConfigError: ``input_shape`` is not (C, H, W), or smaller than 5x5.
    """
    if len(input_shape) != 3:
        raise ConfigError(f"host.kind = 'resnet20': needs images of shape (C, H, W), the data has {input_shape}")
    if min(input_shape[1:]) < SMALLEST:
        height, width = input_shape[1:]
        raise ConfigError(
            f"host.kind = 'resnet20': needs images of at least {SMALLEST} pixels a side, the data has {height}x{width}"
        )
    return ResNet20(config, channels=input_shape[0], classes=classes)
