"""The folder of compiled kernels, and who may write it.

What lies there is run as code, so it is read only if it belongs to the user and nobody else can write or replace it:
the folder has mode 0700, and each folder above it belongs to the user or to root, and others may write there only where
they cannot rename what is not theirs (the sticky bit, as /tmp has it).

CPU kernels are built for the machine at hand, and a graph of a dynamic batch is built for the first size that it met.
So there is one subfolder for each version of torch, compiler, CPU or GPU, and set of batch sizes. What torch itself
tells apart in there (the graph, threads, flags, its own sources) is in its keys:
https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_tutorial.html
"""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from esper.leyline.errors import ConfigError

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # read by torch whenever it looks for a kernel


def default_root() -> Path:
    """The user's own folder for what programs keep, as the XDG base directories say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esper" / "kernels"


def open_folder(root: Path) -> Path:
    """Makes the folder if it is missing; returns it, with links resolved.

    Raises:
        ConfigError: it cannot be made, or somebody else may write there; the text says what to do.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = root.resolve(strict=True)
        own = root.stat()
        above = [(folder, folder.stat()) for folder in root.parents]
    except OSError as error:
        raise ConfigError(f"compile.cache = {root}: {error.strerror or error}; name another folder") from error
    if own.st_uid != os.getuid():
        raise ConfigError(f"compile.cache = {root}: belongs to user {own.st_uid}, not to you; name a folder of yours")
    if stat.S_IMODE(own.st_mode) & 0o077:
        mode = stat.S_IMODE(own.st_mode)
        raise ConfigError(f"compile.cache = {root}: is open to others (mode {mode:04o}); chmod 0700, or name another")
    for folder, seen in above:
        others = stat.S_IMODE(seen.st_mode) & 0o022 and not seen.st_mode & stat.S_ISVTX
        if seen.st_uid not in (0, os.getuid()) or others:
            raise ConfigError(f"compile.cache = {root}: others may replace what lies in {folder}; name another folder")
    return root


def describe_compiler() -> str:
    """First line of what the C++ compiler says of itself, as torch would choose it; empty if there is none."""
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0]


def _describe_cpu() -> list[str]:
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer")
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(key.strip(), value.strip())
    return [f"{key} {value}" for key, value in sorted(found.items())]


def machine_folder(device: torch.device, sizes: Sequence[int]) -> str:
    """Name of the subfolder for this machine and these batch sizes, in the order in which they are rehearsed."""
    facts = [platform.python_version(), describe_compiler(), *_describe_cpu(), *map(str, sizes)]
    kind = platform.machine()
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
        facts += [str(torch.version.cuda), str(torch.cuda.get_device_capability(device))]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return f"torch-{torch.__version__}-{kind}-{digest}"


def private_folder(root: str | None, device: torch.device, sizes: Sequence[int]) -> tuple[Path, str]:
    """Returns the folder for this machine's kernels, and why it is not the one that was asked for; "" if it is.

    A folder that others may write is not read: then kernels go to a new one, which nobody will find again.

    Args:
        root: ``compile.cache``.
        device: of the model.
        sizes: batch sizes in the order in which they are rehearsed.
    """
    try:
        folder = open_folder(default_root() if root is None else Path(root).expanduser())
    except ConfigError as error:
        return Path(tempfile.mkdtemp(prefix="esper-kernels-")), f"kernels are not kept: {error}"
    folder = folder / machine_folder(device, sizes)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder, ""
