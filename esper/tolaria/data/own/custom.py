"""Data of your own: map-style data sets, a collate function, clusters and augmentation, as your function builds them.

    data=custom data.path=my_lab.data:build 'data.options={folder: /data/cells}'

    def build(folder: str) -> esper.Data:
        return esper.Data(train=Cells(folder), classes=3)          # one data set, dealt by data.validation, probe, test

A map-style data set has ``__len__`` and ``__getitem__``. Before each sample torch's, numpy's and `random`'s streams are
set from (seed, epoch, sample id), so a data set may draw as it likes and the run stays exact (`streams`). With streams
of another kind (a generator that the data set keeps) no run is exact at resume: where two samples that are read twice
show such, they are refused.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset, default_collate

from esper.leyline.errors import ConfigError, DataError, one_line
from esper.leyline.imports import import_object
from esper.tolaria.data.batches import split_batch
from esper.tolaria.data.clusters import deal_whole, number_labels
from esper.tolaria.data.configs import CustomDataConfig
from esper.tolaria.data.hashing import hashed_order, split_order
from esper.tolaria.data.own.ahead import Ahead, Request
from esper.tolaria.data.own.streams import Augment, SampleReader, check_alike
from esper.tolaria.data.parts import PART_NAMES, Bundle, Part, make_bundle

Split = Callable[[Any], tuple[Any, Any]]
LOOKED_AT = 16  # samples of each part that the digest reads


@dataclass(kw_only=True)
class Data:
    """What a function of the user's own returns.

    Fields:
        train: map-style data set of training samples; of all samples where the other parts are None.
        validation: that of the validation part.
        probe: that of the probe part, from which evidence is drawn.
        test: that of the test part.
        collate: makes a batch of a list of samples: (inputs, target), (input, input, ..., target) or a mapping with
            ``labels``; torch's own by default. It must not draw random numbers.
        cluster: what each sample of ``train`` belongs to, such as its patient: dealt whole, counted as one in evidence.
        probe_cluster: the same for ``probe``, where that is given.
        augment: (sample, generator) -> sample, for training samples alone.
        classes: classes, labels or tokens there are; what a host's builder gets as ``classes``.
        input_shape: shape of one sample's input; None: that of the first tensor of the first sample.
        version: anything that changes when the data do; runs compare it besides some samples.
    """

    train: Any
    validation: Any = None
    probe: Any = None
    test: Any = None
    collate: Callable[[list[Any]], Any] = default_collate
    cluster: Sequence[Hashable] | None = None
    probe_cluster: Sequence[Hashable] | None = None
    augment: Augment | None = None
    classes: int = 1
    input_shape: tuple[int, ...] | None = None
    version: str = ""


class BatchReader:
    """Reads and collates in a worker.

    Args:
        dataset: map-style.
        data: has collate function and augmentation.
        seed: the run's.
    """

    def __init__(self, dataset: Any, data: Data, seed: int) -> None:
        self._reader, self._collate = SampleReader(dataset, data.augment, seed), data.collate

    def __call__(self, epoch: int, ids: Tensor) -> Any:
        """A batch of an epoch; ``ids`` is int64 [N]."""
        return self._collate([self._reader[epoch, index] for index in ids.tolist()])


class DatasetPart(Part):
    """Samples of a map-style data set.

    Args:
        data: has collate function and augmentation.
        dataset: map-style.
        rows: which of its samples, int64 [N].
        name: of the part, for errors.
        split: says what of a batch is input and what target.
        why_wrong: says why a target is none; empty if it is one.
    """

    def __init__(
        self,
        data: Data,
        dataset: Any,
        rows: Tensor,
        name: str,
        split: Split | None = None,
        why_wrong: Callable[[Any], str] = lambda target: "",
    ) -> None:
        self._data, self._dataset, self._rows, self._name = data, dataset, rows, name
        self._ahead: Ahead | None = None
        self._why_wrong = why_wrong
        self._split = split or (lambda batch: split_batch(batch, f"data: part {name}"))

    def __len__(self) -> int:
        return len(self._rows)

    def split_by(self, split: Split, why_wrong: Callable[[Any], str]) -> Part:
        """See `Part.split_by`."""
        return DatasetPart(self._data, self._dataset, self._rows, self._name, split, why_wrong)

    def _read(self, seed: int, epoch: int | str, ids: Tensor) -> Any:
        reader = SampleReader(self._dataset, self._data.augment, seed)
        try:
            return self._data.collate(reader.read(epoch, ids.tolist()))
        except (ConfigError, DataError):
            raise
        except Exception as error:
            raise DataError(
                f"data: the collate function, given {len(ids)} samples of the part {self._name}: "
                f"{one_line(error)}; correct it"
            ) from error

    def check_alike(self) -> None:
        """Checks that samples are the same when they are read again; see `check_alike`."""
        ids, epoch = self._rows[:2], 0 if self._name == "train" else "evaluation"
        check_alike(lambda: self._read(0, epoch, ids), f"samples {ids.tolist()} of the part {self._name}")

    def _checked(self, batch: Any, ids: Tensor) -> tuple[Any, Any]:
        x, y = self._split(batch)
        leaf = next((leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)), None)
        if leaf is None or leaf.shape[:1] != (len(ids),):
            got = "no tensor of inputs" if leaf is None else f"inputs {list(leaf.shape)}"
            raise DataError(
                f"data: the collate function made {got} of {len(ids)} samples of the part {self._name}, need one row "
                "for each sample; correct it"
            )
        if wrong := self._why_wrong(y):
            raise DataError(f"data: {self._name_wrong(ids)} of the part {self._name}: {wrong}")
        return x, y

    def _name_wrong(self, ids: Tensor) -> str:
        """The first sample whose target is none, if it is none by itself, too."""
        for one in ids.split(1):
            if self._why_wrong(self._split(self._read(0, "evaluation", one))[1]):
                return f"sample {int(one)}"
        return f"samples {ids[:8].tolist()}..."

    def fetch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `Part.fetch`."""
        ids = self._rows[indices]
        return self._checked(self._read(0, "evaluation", ids), ids)

    def fetch_train(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """See `Part.fetch_train`."""
        ids = self._rows[indices]
        batch = None if self._ahead is None else self._ahead.take(ids, epoch)
        return self._checked(self._read(seed, epoch, ids) if batch is None else batch, ids)

    def read_ahead(self, seed: int, workers: int, *, pinned: bool = False) -> Ahead | None:
        """See `Part.read_ahead`."""
        self._ahead = Ahead(BatchReader(self._dataset, self._data, seed), workers, pinned=pinned)
        return self._ahead

    def requests(self, indices: Tensor, epoch: int) -> Iterator[Request]:
        """See `Part.requests`."""
        yield self._rows[indices], epoch

    def content(self) -> tuple[Tensor, ...]:
        """Some samples, and where all of them lie."""
        count = min(LOOKED_AT, len(self))
        x, y = self.fetch(hashed_order(len(self), "digest")[:count].sort().values)
        return (self._rows, *(leaf for leaf in tree_leaves((x, y)) if isinstance(leaf, Tensor)))


def digest_some(parts: Mapping[str, Part], version: str) -> int:
    """62-bit digest of sizes and some samples of all parts."""
    hasher = xxhash.xxh3_64(version.encode())
    for name in PART_NAMES:
        for tensor in parts[name].content():
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            hasher.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return hasher.intdigest() >> 2


def _length(dataset: Any, name: str, path: str, length: int | None) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"data.path = {path!r}: {name} is {type(dataset).__name__}, a stream; need a map-style data set with "
            "__getitem__ (and __len__, or data.length), which can be read from any place at resume"
        )
    try:
        return len(dataset)
    except TypeError:
        if length is not None:
            return length
        what = f"{name} ({type(dataset).__name__}) has no length"
        raise ConfigError(f"data.path = {path!r}: {what}; set data.length to the samples of a pass over it") from None


def _deal(config: CustomDataConfig, data: Data, size: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Rows of each part out of one data set, and the cluster of each row."""
    held = {"validation": config.validation, "probe": config.probe, "test": config.test}
    what = f"data.path = {config.path!r}"
    if data.cluster is None:
        order = split_order(config, size, sum(held.values()), what)
        rest = size - sum(held.values())
        return dict(zip((*held, "train"), order.split([*held.values(), rest]), strict=True)), None
    labels = _labels(data.cluster, size, config.path, "cluster")
    return deal_whole(labels, held, config.split_seed, what), labels


def _labels(cluster: Sequence[Hashable], size: int, path: str, name: str) -> Tensor:
    if len(cluster) != size:
        raise ConfigError(f"data.path = {path!r}: {name} has {len(cluster)} values for {size} samples; give one each")
    return number_labels([str(one.item() if isinstance(one, Tensor) else one) for one in cluster])


def call_build(config: CustomDataConfig) -> Data:
    """Calls the user's function.

    Raises:
        ConfigError: it cannot be imported, does not take the options, or returns something else.
    """
    build, options = import_object(config.path, "data.path"), config.options or {}
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ConfigError(f"data.options = {config.options!r}: {config.path} does not take these; {error}") from None
    data = build(**options)
    if not isinstance(data, Data):
        raise ConfigError(f"data.path = {config.path!r}: returned {type(data).__name__}, need an esper.Data")
    return data


def load_custom(config: CustomDataConfig) -> Bundle:
    """Calls the user's function, and deals what it returns.

    Raises:
        ConfigError: what it returns is no data of this kind; it cannot be read by workers.
        DataError: samples cannot be read.
    """
    data = call_build(config)
    given = {name: getattr(data, name) for name in PART_NAMES[1:]}
    missing = [name for name, dataset in given.items() if dataset is None]
    size = _length(data.train, "train", config.path, config.length)
    if missing and len(missing) < len(given):
        raise ConfigError(
            f"data.path = {config.path!r}: {', '.join(missing)} is None and other parts are not; return all of "
            f"{', '.join(PART_NAMES)}, or train alone, which is then dealt"
        )
    clusters: dict[str, Tensor | None] = {"train": None, "probe": None}
    datasets = dict.fromkeys(PART_NAMES, data.train) if missing else {"train": data.train, **given}
    if missing:
        rows, labels = _deal(config, data, size)
        if labels is not None:
            clusters = {name: labels[rows[name]] for name in clusters}
    else:
        sizes = {name: _length(dataset, name, config.path, config.length) for name, dataset in datasets.items()}
        rows = {name: torch.arange(size) for name, size in sizes.items()}
        if data.probe_cluster is not None:
            clusters["probe"] = _labels(data.probe_cluster, len(rows["probe"]), config.path, "probe_cluster")
    own = {name: DatasetPart(data, datasets[name], rows[name], name) for name in PART_NAMES}
    for name in ("train",) if missing else PART_NAMES:
        own[name].check_alike()
    parts: dict[str, Part] = {**own}
    shape = data.input_shape
    if shape is None:
        x, _ = parts["train"].fetch(torch.arange(1))
        shape = tuple(next(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)).shape[1:])
    return make_bundle(
        name=config.kind,
        task=None,
        input_shape=shape,
        classes=data.classes,
        parts=parts,
        record={"path": config.path, "options": config.options, "version": data.version},
        probe_clusters=clusters["probe"],
        train_clusters=clusters["train"] if missing else None,
        refills=False,
        digest=digest_some(parts, data.version),
    )
