"""What gloo and NCCL need of a host, and what their failures look like."""

import os
import re
import socket
from collections.abc import Sequence

import torch.distributed as dist

from esper.leyline.errors import ConfigError

# The beginnings of what gloo and NCCL throw through torch as a plain RuntimeError: the place in their own sources
# (``[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer``), or a fixed sentence.
_TRANSPORT = re.compile(
    r"\[(enforce fail at )?[^\]\s]*\bgloo/[^\]\s]+:\d+\]|Application timeout caused pair closure|"
    r"Gloo connect\w+ failed|NCCL (error|comm)"
)


def check_interfaces() -> None:
    """Refuses a GLOO_SOCKET_IFNAME that this host lacks; gloo's own error is cut off before the name."""
    known = [name for _, name in socket.if_nameindex()]
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if unknown := [name for name in named.split(",") if name and name not in known]:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME = {named!r}: this host has no network interface {', '.join(unknown)}; it has "
            f"{', '.join(known)}; name one of these, or unset the variable"
        )


def is_transport(error: BaseException) -> bool:
    """Whether an error came out of a collective's transport rather than out of our or the user's code.

    The words of a text say nothing: a user's own error may speak of connections, stores and timeouts.
    """
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _TRANSPORT.match(str(error).strip()) is not None


def describe_absent(store: dist.Store | None, arrivals: Sequence[str]) -> str:
    """Names the ranks that have not come to the rendezvous, before there are heartbeats.

    Args:
        store: of the rendezvous; None if it could not be reached.
        arrivals: the key that each rank sets when it arrives.
    """
    if store is None:
        return "the rendezvous store cannot be reached; is the first host up, and its port open?"
    try:
        missing = [rank for rank, key in enumerate(arrivals) if not store.check([key])]
    except (RuntimeError, dist.DistError):
        return "the rendezvous store does not answer"
    parts = [f"rank {rank} never arrived" for rank in missing]
    return "; ".join(parts) or "every rank has arrived: the network between them may be cut"
