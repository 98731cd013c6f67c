"""FLOPs of the operators that torch's counter misses or overcounts, and the names of those without any formula.

The counter, `torch.utils.flop_counter`, knows matrix products, convolutions and fused attention. A product of [m, k]
and [k, n] is 2 m k n: a multiplication and an addition for each of its terms. By the same rule:

    recurrent kernels    2 x tokens x (elements of the weight matrices): each meets every token once. Equations in the
                         docs of `torch.nn.LSTM`, `GRU` and `RNN`; Hochreiter and Schmidhuber 1997. Their backward
                         kernels take the forward once for input and state, and once more for the weights
    mv, addmv, dot       2 m n, 2 m n, 2 n. An outer product, which gives a matrix its gradient there, is a product of
                         [m, 1] and [1, n]: 2 m n
    _trilinear           `nn.Bilinear` and its gradients: the first factor times the second, summed over the axes that
                         the third lacks, then times the third: the order of `at::native::_trilinear`
    grouped convolution  each of its two gradients takes the products of the forward, those of every group apart
                         (Dumoulin and Visin 2016, "A guide to convolution arithmetic", chapter 4)
    grouped products     of the rows of each group with its own matrix (mixtures of experts): those of all rows together
    attention on CPU     where a host insists on the fused kernel: its two products, and four in the backward

So a backward to weights and input costs twice the forward (Griewank and Walther 2008, section 3.4). Operators that take
a few operations an element (sums, normalisation, activations, pooling, lookups) are free. Any other is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Shape = Sequence[int]


def _product(a: Shape, b: Shape, **_: Any) -> int:
    """FLOPs of [..., m, k] times [..., k, n]."""
    return 2 * math.prod(a) * b[-1]


def _added_product(_added: Shape, a: Shape, b: Shape, **_: Any) -> int:
    return _product(a, b)


def _vector_product(a: Shape, _vector: Shape, **_: Any) -> int:
    """FLOPs of [m, n] times [n], or of [n] times [n]."""
    return 2 * math.prod(a)


def _added_vector_product(_added: Shape, a: Shape, _vector: Shape, **_: Any) -> int:
    return 2 * math.prod(a)


def _outer(a: Any, b: Any, out_shape: Shape = (), **_: Any) -> int:
    """FLOPs of [m, 1] times [n] or [1, n], an outer product; a product of elements with elements is free."""
    if not isinstance(a, torch.Size) or not isinstance(b, torch.Size) or len(out_shape) != 2:
        return 0
    rows, columns = out_shape
    return 2 * rows * columns if a == (rows, 1) and b in ((columns,), (1, columns)) and min(rows, columns) > 1 else 0


def _grouped(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of rows [m, k] times [g, k, n], [g, m, k] times [k, n] by groups of columns, [m, k] times [k, n] by groups
    of the summed axis, or [g, m, k] times [g, k, n]: each element of the first meets one row of the second."""
    return 2 * math.prod(a) * b[-1] // (a[0] if len(a) == 3 and len(b) == 2 else 1)


def _convolution_backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """FLOPs of the gradients of input and weight, each if it is asked for; ``weight`` [out, in / groups, *kernel]."""
    positions = math.prod(x[2:] if transposed else grad[2:])
    return 2 * x[0] * positions * math.prod(weight) * (bool(output_mask[0]) + bool(output_mask[1]))


def _convolution_tbc(x: Shape, weight: Shape, *_: Any, out_shape: Shape = (), **__: Any) -> int:
    """FLOPs of a convolution over time; ``x`` [time, batch, in], ``weight`` [kernel, in, out]."""
    return 2 * out_shape[0] * out_shape[1] * math.prod(weight)


def _trilinear(
    i1: Shape,
    i2: Shape,
    i3: Shape,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    _unroll_dim: int = 1,
    **_: Any,
) -> int:
    """FLOPs of the sum over ``sumdim`` of the product of three factors that are spread over the axes ``expand``."""
    rank = len(i1) + len(expand1)
    factors = []
    for shape, spread in ((i1, expand1), (i2, expand2), (i3, expand3)):
        sizes = iter(shape)
        factors.append([1 if axis in spread else next(sizes) for axis in range(rank)])
    pair = [max(factors[0][axis], factors[1][axis]) for axis in range(rank)]
    left = [1 if axis in sumdim and axis in expand3 else size for axis, size in enumerate(pair)]
    return 2 * math.prod(pair) + 2 * math.prod(max(a, b) for a, b in zip(left, factors[2], strict=True))


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of [batch, heads, queries, dim] with keys and values of the same heads: scores, then weighted values."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return 2 * _attention(q, k, v)


def _tokens(x: Shape, batch_sizes: Sequence[int]) -> int:
    """Tokens of a batch [time, batch, features], or [tokens, features] of packed sequences."""
    return x[0] if batch_sizes else math.prod(x[:-1])


def _matrices(weights: Sequence[Shape]) -> int:
    return sum(math.prod(weight) for weight in weights if len(weight) == 2)


def _onednn_rnn(x: Shape, w1: Shape, w2: Shape, *args: Any, **_: Any) -> int:
    return 2 * math.prod(x[:-1]) * _matrices((w1, w2))


def _onednn_rnn_backward(x: Shape, w1: Shape, w2: Shape, *args: Any, **_: Any) -> int:
    return 2 * _onednn_rnn(x, w1, w2)  # the kernel makes every gradient, asked for or not


def _cudnn_rnn(x: Shape, weights: Sequence[Shape], *args: Any, **_: Any) -> int:
    lists = [arg for arg in args if isinstance(arg, list | tuple) and not isinstance(arg, torch.Size)]
    batch_sizes = lists[-1]
    return 2 * _tokens(x, batch_sizes) * _matrices(weights)


def _cudnn_rnn_backward(x: Shape, weights: Sequence[Shape], *args: Any, **_: Any) -> int:
    *rest, output_mask = args
    once = _cudnn_rnn(x, weights, *rest)
    return once * (1 + bool(output_mask[3]))  # the gradient of the state goes through all tokens in any case


FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.addmm_: _added_product,
    aten.baddbmm_: _added_product,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten._addmm_activation: _added_product,
    aten._int_mm: _product,
    aten._grouped_mm: _grouped,
    aten._scaled_grouped_mm: _grouped,
    aten.mv: _vector_product,
    aten.addmv: _added_vector_product,
    aten.addmv_: _added_vector_product,
    aten.dot: _vector_product,
    aten.vdot: _vector_product,
    aten.mul: _outer,
    aten.convolution_backward: _convolution_backward,
    aten.conv_tbc: _convolution_tbc,
    aten._trilinear: _trilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _onednn_rnn,
    aten.mkldnn_rnn_layer_backward: _onednn_rnn_backward,
    aten._cudnn_rnn: _cudnn_rnn,
    aten._cudnn_rnn_backward: _cudnn_rnn_backward,
    aten.miopen_rnn: _cudnn_rnn,
    aten.miopen_rnn_backward: _cudnn_rnn_backward,
}
"""Formulas by operator, for `FlopCounterMode(custom_mapping=...)`: shapes of the arguments to FLOPs."""

_FREE_WORDS = """
norm batchnorm softmax logsumexp dropout embedding pool pool1d pool2d pool3d pad pad1d pad2d pad3d upsample sampler
loss entropy cat stack copy clone resize fill zero zeros empty ones full like new arange range linspace eye rand randn
randint randperm random uniform normal bernoulli multinomial exponential cauchy poisson geometric index gather scatter
select slice sort topk kthvalue median cummax cummin cumsum cumprod logcumsumexp mask masked roll flip repeat
interleave unique unique2 nonzero tril triu one bincount histc histogram searchsorted bucketize scalar tensor glu
prelu rrelu elu gelu hardswish mish sigmoid threshold im2col col2im shuffle sum mean var std prod max min argmax
argmin aminmax any all equal lift view reshape squeeze unsqueeze expand permute transpose t split chunk unfold fold
set assert sym thnn choice divide strided detach take put trace rot90 diag diagonal isin cross where complex polar
window grid contiguous to renorm nll padded is coalesced fake quantize segment
"""
_FREE = frozenset(_FREE_WORDS.split())
_PRODUCTS = frozenset({"mm", "attention", "conv", "convolution", "product"})
"""Words that make a name of operators that are free, and of such as are not whatever else their names say."""
_FREE_TAGS = [getattr(torch.Tag, name) for name in ("pointwise", "reduction", "view_copy") if hasattr(torch.Tag, name)]


def _is_free(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator of torch's own, or what it is the gradient of, takes a few operations an element at most."""
    if operator.namespace not in ("aten", "prim", "prims", "profiler"):
        return False
    words = operator._opname.split("_")
    if operator.is_view or not _FREE.isdisjoint(words):
        return _PRODUCTS.isdisjoint(words)
    forward = getattr(aten, operator._opname.removesuffix("_").removesuffix("_backward"), None)
    kinds = [operator, *(getattr(forward, name) for name in forward.overloads())] if forward else [operator]
    return any(tag in kind.tags for tag in _FREE_TAGS for kind in kinds)


class Uncounted(TorchDispatchMode):
    """Within the block, collects the names of the operators that have no formula and are not known to be free.

    Enter it before the counter, which hands on what it has taken apart.

    Args:
        known: operators with a formula.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Mapping[Any, Any]) -> None:
        super().__init__()
        self._known = known
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            if func._overloadpacket not in self._known and not _is_free(func):
                self.names.add(f"{func.namespace}::{func._opname}")
        elif func not in self._known:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
