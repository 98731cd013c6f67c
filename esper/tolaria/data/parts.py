"""The bundle that a loader returns: four disjoint parts of one data set, their digest, and a record of their source.

train        for learning; the only part that is ever augmented
validation   for governor, controller and the choice of the best checkpoint
probe        for the samples of gates' evidence; no reported number uses it
test         read once, with the checkpoint that validation chose
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import xxhash
from torch import Tensor
from torch.utils._pytree import tree_map_only

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data.augment import Augment
from esper.tolaria.data.clusters import Clusters
from esper.tolaria.data.own.ahead import Ahead, Request, TrainReader
from esper.tolaria.data.registry import DataConfig, data_entry
from esper.tolaria.data.task import Task

PIECE = 2**16  # windows of text that are digested at a time
IN_CACHE = 2**18  # numbers that are normalised at a time: what stays in a core's caches
PART_NAMES = ("train", "validation", "probe", "test")


class Part(ABC):
    """Samples 0 .. len-1, fetched by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, indices: Tensor) -> tuple[Any, Any]:
        """Samples by index, never augmented.

        Args:
            indices: int64 [N], on the CPU.

        Returns:
            x and y on the CPU: float32 [N, C, H, W] and int64 [N], or int64 [N, T] and int64 [N, T]; of a user's own
            data a tensor, a tuple or a dict of inputs, and any target.
        """

    def fetch_train(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """Samples to learn from; a pure function of its arguments.

        Args:
            indices: int64 [N], on the CPU.
            seed: the run's seed; seed, epoch and index decide what is drawn for a sample.
            epoch: pass over the data.
        """
        return self.fetch(indices)

    def read_ahead(self, seed: int, workers: int, *, pinned: bool = False) -> Ahead | None:
        """Begins to fetch in workers what lies beneath this part; None: its batches are fetched whole (`Ahead`)."""
        return None

    def requests(self, indices: Tensor, epoch: int) -> Iterator[Request]:
        """What `fetch_train` will fetch of the data set for these samples, in order."""
        yield from ()

    def split_by(self, split: Callable[[Any], tuple[Any, Any]], why_wrong: Callable[[Any], str]) -> "Part":
        """The same part for a task that says what of a batch is input and what target, and why a target is none."""
        return self

    @abstractmethod
    def content(self) -> tuple[Tensor, ...]:
        """The tensors that hold every sample."""

    def pieces(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """The same for the digest: what each tensor is, and its values in order, a piece at a time."""
        for tensor in self.content():
            yield f"{tensor.dtype} {list(tensor.shape)}", iter((tensor,))


class ImagePart(Part):
    """Images as bytes, normalised when fetched.

    Args:
        images_NCHW: uint8.
        labels: int64 [N].
        mean, std: mean and standard deviation, one number per channel, in units of the bytes.
    """

    def __init__(self, images_NCHW: Tensor, labels: Tensor, mean: list[float], std: list[float]) -> None:
        self._images, self._labels = images_NCHW, labels
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self._labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`; x is float32 [N, C, H, W]."""
        x = torch.empty((len(indices), *self._images.shape[1:]))
        some = max(1, IN_CACHE // max(1, self._images[:1].numel()))
        for piece, rows in zip(x.split(some), indices.split(some), strict=True):
            piece.copy_(self._images[rows]).sub_(self._mean).div_(self._std)
        return x, self._labels[indices]

    def content(self) -> tuple[Tensor, ...]:
        """Images and labels."""
        return self._images, self._labels


class BytePart(Part):
    """Text as windows of bytes: x is a window without its last byte, y the same without its first.

    Args:
        windows: uint8 [M, T + 1], which other parts may share.
        rows: those of this part, int64 [N]; None: all of them.
        again: maps the windows of a mapped file anew in another process; None: they are sent.
    """

    def __init__(self, windows: Tensor, rows: Tensor | None = None, again: Callable[[], Tensor] | None = None) -> None:
        self._windows, self._rows = windows, torch.arange(len(windows)) if rows is None else rows
        self._again = again

    def __reduce__(self) -> tuple[Any, ...]:
        return _byte_part, (self._windows if self._again is None else None, self._rows, self._again)

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`; x and y are int64 [N, T]."""
        tokens = self._windows[self._rows[indices]].to(torch.int64)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def content(self) -> tuple[Tensor, ...]:
        """The windows, copied."""
        return (self._windows[self._rows],)

    def pieces(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """See `Part.pieces`; without a copy of all windows."""
        shape = [len(self._rows), *self._windows.shape[1:]]
        yield f"{self._windows.dtype} {shape}", (self._windows[rows] for rows in self._rows.split(PIECE))


def _byte_part(windows: Tensor | None, rows: Tensor, again: Callable[[], Tensor] | None) -> BytePart:
    return BytePart(again() if windows is None and again else cast(Tensor, windows), rows, again)


def digest_parts(parts: Mapping[str, Part]) -> int:
    """62-bit digest over names, shapes and bytes of all parts, in the order of `PART_NAMES`."""
    hasher = xxhash.xxh3_64()
    for name in PART_NAMES:
        for what, pieces in parts[name].pieces():
            hasher.update(f"{name} {what};".encode())
            for piece in pieces:
                hasher.update(piece.contiguous().numpy().data)
    return hasher.intdigest() >> 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A loaded data set.

    Fields:
        name: the registered kind.
        task: what it is made for; None where only a run's config says so.
        input_shape: shape of one x, without the batch axis.
        classes: number of classes, or of bytes in the vocabulary.
        train: the training part.
        validation: the validation part.
        probe: the probe part.
        probe_clusters: its clusters.
        train_clusters: the clusters of the training part.
        refills: whether training samples that have not been trained on may serve as evidence, as those of the probe do.
        test: the test part.
        digest: 62 bits over the bytes of all parts; ranks with different digests are refused, runs are not compared.
        record: plain data for the run's record: sizes, digest, files with their hash, normalisation.
        augment: what `train_batch` does to images.
        crop_pad: pixels by which a crop shifts at most.
        workers: processes of each rank that read training samples ahead.
        phased: whether a target is a pair, of which the second says whether the sample is of the new phase.
        learns: the run's task (`esper.tolaria.tasks.Task`), once `esper.tolaria.tasks.bind` has joined them; else None.
    """

    name: str
    task: Task | None
    input_shape: tuple[int, ...]
    classes: int
    train: Part
    validation: Part
    probe: Part
    probe_clusters: Clusters
    train_clusters: Clusters
    refills: bool
    test: Part
    digest: int
    record: dict[str, Any]
    augment: Augment
    crop_pad: int
    learns: Any = None
    workers: int = 0
    phased: bool = False

    def example(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """x of two training samples, with which a host is traced and measured; see `Part.fetch`.

        Args:
            device: its device; None for the CPU.
            dtype: its number format if it is floating-point; None for that of the data.
        """
        x = self.train.fetch(torch.arange(2))[0]
        return tree_map_only(Tensor, lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None), x)

    def train_batch(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """Training samples, augmented if the config says so; a pure function of its arguments.

        See `Part.fetch_train`; seed, epoch and index decide the augmentation.
        """
        return self.reader(seed)(epoch, indices)

    def reader(self, seed: int) -> TrainReader:
        """What fetches training batches for a run of this seed, here or in a worker."""
        return TrainReader(self.train, self.augment, self.crop_pad, seed)


def make_bundle(
    *,
    name: str,
    task: Task | None,
    input_shape: tuple[int, ...],
    classes: int,
    parts: Mapping[str, Part],
    record: dict[str, Any],
    augment: Augment = Augment.NONE,
    crop_pad: int = 0,
    probe_clusters: Tensor | None = None,
    train_clusters: Tensor | None = None,
    refills: bool = True,
    digest: int | None = None,
    phased: bool = False,
) -> Bundle:
    """Digests the parts and completes the record; see `Bundle` for the arguments.

    ``probe_clusters`` and ``train_clusters`` label the cluster of each sample of these parts, int64 [N]; None: each is
    its own. No cluster may have samples in two parts (see `esper.tolaria.data.clusters.deal_whole`). ``refills=False``
    where training samples are drawn or labelled in another way than those of the probe. ``digest`` for parts whose
    content is not at hand.

    Raises:
        DataError: a part has fewer than two samples, labels are too few or too many, or a cluster is in both parts.
    """
    sizes = {part: len(parts[part]) for part in PART_NAMES}
    if min(sizes.values()) < 2:
        raise DataError(f"data={name}: every part needs at least 2 samples, got {sizes}; change the sizes in data.*")
    digest = digest_parts(parts) if digest is None else digest
    for part, labels in (("probe", probe_clusters), ("train", train_clusters)):
        if labels is not None and labels.shape != (sizes[part],):
            shape = list(labels.shape)
            raise DataError(f"data={name}: {part}_clusters is {shape}, needs one for each of {sizes[part]}")
    if probe_clusters is not None and train_clusters is not None:
        both = int(torch.isin(probe_clusters.unique(), train_clusters).sum())
        if both:
            raise DataError(f"data={name}: {both} clusters are in the probe and in the training part; deal them whole")
    clusters = Clusters(sizes["probe"], probe_clusters)
    return Bundle(
        name=name,
        task=task,
        input_shape=input_shape,
        classes=classes,
        train=parts["train"],
        validation=parts["validation"],
        probe=parts["probe"],
        probe_clusters=clusters,
        train_clusters=Clusters(sizes["train"], train_clusters),
        refills=refills,
        test=parts["test"],
        digest=digest,
        record={"kind": name, "sizes": sizes, "probe_clusters": len(clusters), "digest": digest, **record},
        augment=augment,
        crop_pad=crop_pad,
        phased=phased,
    )


def load_data(config: DataConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Loads a data set. The same config and files give the same parts and digest in every process.

    Args:
        config: of the data set.
        learned: ``record["learned"]`` of other data of this kind, by which inputs and targets are made; None: its own.

    Raises:
        ConfigError: the kind is unknown, or the config's class belongs to another kind.
        DataError: the data is absent or malformed; the text says what is expected and what to do.
    """
    config_class, loader = data_entry(config.kind)
    if type(config) is not config_class:
        raise ConfigError(f"data.kind = {config.kind!r}: needs {config_class.__name__}, got {type(config).__name__}")
    bundle: Bundle = loader(config, learned) if learned else loader(config)
    return replace(bundle, workers=config.workers)
