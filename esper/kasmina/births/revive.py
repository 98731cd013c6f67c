"""Turns a seed into tensors, and tensors back into the same seed.

The weights of a seed found in a library are not drawn again: it is built on the meta device and given the verified
tensors. If named tensors are not its whole state (a buffer that is not saved, a tensor in an attribute, tied or
permuted weights), it is built in full from its key, and the tensors are copied into it.
"""

import torch
from torch import Tensor, nn

from esper.kasmina.births.build import construct
from esper.kasmina.births.key import Birth
from esper.leyline.topology import Topology


def build_birth(birth: Birth, backend: str | None, device: str = "cpu") -> nn.Module:
    """Builds the seed of a birth by its own constructor, and casts it; raises what `construct` raises.

    Args:
        birth: the birth of the seed.
        backend: implementation that the seed will use.
        device: "cpu", or "meta" for its shapes alone.
    """
    return construct(
        birth.blueprint,
        dim=birth.dim,
        topology=Topology(birth.topology),
        key=birth.key,
        dtype=birth.torch_dtype,
        backend=backend,
        device=device,
    )


def state_tensors(seed: nn.Module) -> dict[str, Tensor]:
    """Copies the tensors of a seed's state dict: contiguous, sharing no memory, on CPU.

    Raises:
        ValueError: the state dict holds something that is not a tensor.
    """
    state = seed.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"a library keeps tensors alone; the state dict holds {', '.join(odd)}")
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _is_all_in_state(seed: nn.Module) -> bool:
    named = [*seed.named_parameters(remove_duplicate=False), *seed.named_buffers(remove_duplicate=False)]
    if {name for name, _ in named} != set(seed.state_dict()) or len({id(tensor) for _, tensor in named}) < len(named):
        return False
    loose = any(isinstance(value, Tensor) for module in seed.modules() for value in vars(module).values())
    return not loose and all(tensor.is_contiguous() for _, tensor in named)


def revive(birth: Birth, tensors: dict[str, Tensor], backend: str | None) -> nn.Module:
    """Builds the seed of a birth with copies of the given tensors, on CPU.

    Raises:
        ValueError: a dtype does not fit.
        RuntimeError: a name or a shape does not fit.
    """
    seed = build_birth(birth, backend, "meta")
    for name, value in seed.state_dict().items():
        if name in tensors and tensors[name].dtype != value.dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, need {value.dtype}")
    if _is_all_in_state(seed):
        seed.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
        return seed
    seed = build_birth(birth, backend)
    seed.load_state_dict(tensors)
    return seed
