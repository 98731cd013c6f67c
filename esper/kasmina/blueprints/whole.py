"""Whole blocks as seeds, x -> delta: offered only where a run asks for them (``slots.blocks=[block]``).

    SEQUENCE      a + m,  a = gamma1 attention(LN x),  m = gamma2 mlp(LN(x + a))      12 C^2 + 12 C parameters
    FEATURE_MAP   gamma K3 silu(GN(K3 silu(GN(x))))                                   18 C^2 + 6 C

With x added by the slot these are the pre-LN block of Radford et al. 2019 and the pre-activation residual block of He
et al. 2016 ("Identity mappings in deep residual networks"). ``slots.block_scale`` says how large gamma begins.
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from esper.kasmina.axes.positions import CAUSAL, Mixing, Positions
from esper.kasmina.blueprints.parts import LayerScale, group_norm, values_per_group
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.blueprints.sequence import MLP, SelfAttention
from esper.leyline.topology import Reach, Topology


@blueprint(
    "block",
    topology=Topology.SEQUENCE,
    parameters=lambda dim, heads, expansion: (4 + 2 * expansion) * dim * dim + (8 + expansion) * dim,
    flops=lambda dim, positions, heads, expansion: (
        (8 + 4 * expansion) * positions * dim * dim + 4 * positions * positions * dim
    ),
    min_dim=3,
    reach=Reach.ALL,
    on_request=True,
)
class SequenceBlock(Mixing):
    """Attention and an MLP, each with a norm before it and a layer scale behind it.

    Args:
        dim: channels.
        heads: as in `SelfAttention`.
        expansion: hidden width of the MLP as a multiple of ``dim``.
    """

    remembers = True

    def __init__(self, dim: int, *, heads: int = 4, expansion: int = 4) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads=heads)
        self.mlp = MLP(dim, expansion=expansion)

    def forward(self, x_BTC: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        mixed_BTC = self.attention(x_BTC, positions)
        return mixed_BTC + self.mlp(x_BTC + mixed_BTC)


@blueprint(
    "block",
    topology=Topology.FEATURE_MAP,
    parameters=lambda dim: 18 * dim * dim + 6 * dim,
    flops=lambda dim, positions: 36 * positions * dim * dim,
    normalises=values_per_group,
    reach=Reach.NEAR,
    on_request=True,
)
class MapBlock(nn.Module):
    """Two 3x3 convolutions, each with a norm and a SiLU before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = group_norm(dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm2 = group_norm(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.scale = LayerScale(dim, Topology.FEATURE_MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        inner = self.conv1(silu(self.norm1(x_BCHW)))
        return self.scale(self.conv2(silu(self.norm2(inner))))
