"""Settings of data sets of text and of other tokens."""

import math
from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks, why_no_pattern
from esper.tolaria.data.registry import DataConfig


class TextCluster(StrEnum):
    """WINDOW: each is its own cluster, and is dealt by itself. DOCUMENT: those of one document belong together."""

    WINDOW = "window"
    DOCUMENT = "document"


@dataclass(kw_only=True, slots=True)
class PySourceConfig(DataConfig):
    """Source code of the running Python's own standard library; needs no download. Another Python is another corpus."""

    kind: str = "pysource"
    """Registered name of this kind: ``pysource``."""

    block: int = 64
    """Bytes that the model sees of a sample."""

    max_bytes: int = 1_000_000
    """Size of the corpus in bytes, at most."""

    validation: int = 512
    """Samples in the validation part; the rest is for training."""

    probe: int = 1024
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 1024
    """Samples in the test part."""

    cluster: TextCluster = TextCluster.WINDOW
    """Samples that may depend on each other: ``window``, each is its own cluster; ``document``, those of a source file,
    which is then dealt whole, so that parts may be larger than asked for.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("block", self.block >= 1, "bytes, must be >= 1")
            check("max_bytes", self.max_bytes >= 1, "must be >= 1")


@dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
    """A folder with train.txt and test.txt, or folders train/ and test/ of .txt files. ``root`` null: the folder
    wikitext2 below the one that ESPER_DATA names."""

    kind: str = "text"
    """Registered name of this kind: ``text``."""

    root: str | None = None
    """Folder with train.txt and test.txt, or with folders train and test of .txt files; null: wikitext2 below the
    folder that ESPER_DATA names. A single file of 16 MiB or more is mapped into memory that ranks share, unless its
    documents are clusters: it must stay as it is during the run.
    """

    block: int = 64
    """Bytes that the model sees of a sample."""

    max_bytes: int | None = None
    """Bytes read of train and of test at most; null: all."""

    validation: int = 512
    """Samples cut from train.txt for the validation part."""

    probe: int = 1024
    """Samples cut from train.txt for the probe part, from which evidence is drawn."""

    cluster: TextCluster = TextCluster.WINDOW
    """Samples that may depend on each other: ``window``, each is its own cluster; ``document``, those of one document,
    which is then dealt whole, so that parts may be larger than asked for. A file of the folder train is a document, or
    what ``document_start`` finds in train.txt.
    """

    document_start: str | None = None
    """Regular expression that matches where a document begins, ^ at each line: '^ = [^=]' for the articles of WikiText;
    null: a file is one document.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            documents = self.cluster is TextCluster.DOCUMENT
            check("document_start", self.document_start is None or documents, "needs data.cluster=document")
            problem = why_no_pattern(self.document_start)
            check("document_start", not problem, f"is no regular expression that finds a place in text: {problem}")
            check("block", self.block >= 1, "bytes, must be >= 1")
            check("root", self.root != "", "must name a folder, or null for the one below ESPER_DATA")
            check("max_bytes", self.max_bytes is None or self.max_bytes >= 1, "must be >= 1, or null for all")


@dataclass(kw_only=True, slots=True)
class TokensConfig(DataConfig):
    """A folder with shards of tokens: train/*.bin and, if there are any, test/*.bin; raw little-endian numbers."""

    kind: str = "tokens"
    """Registered name of this kind: ``tokens``."""

    root: str | None = None
    """Folder with a folder train of .bin files, and perhaps one test; null: tokens below the one that ESPER_DATA names.
    """

    bits: int = 16
    """Bits of a token in the files: 16 or 32."""

    vocabulary: int
    """Tokens there are; each is below."""

    block: int = 256
    """Tokens that the model sees of a sample."""

    document_end: int | None = None
    """Token that ends a document; null: each window is its own cluster."""

    validation: int = 512
    """Samples in the validation part."""

    probe: int = 1024
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 1024
    """Samples in the test part, without a folder test."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("bits", self.bits in (16, 32), "must be 16 or 32")
            check("vocabulary", 2 <= self.vocabulary <= 2**self.bits, "must be 2 to 2 ** data.bits")
            check("block", self.block >= 1, "tokens, must be >= 1")
            check("root", self.root != "", "must name a folder, or null for the one below ESPER_DATA")
            end = self.document_end
            check("document_end", end is None or 0 <= end < self.vocabulary, "must be a token, or null")


@dataclass(kw_only=True, slots=True)
class RecallConfig(DataConfig):
    """Look-ups that lead from key to key to a value; made by a formula, of any length and number."""

    kind: str = "recall"
    """Registered name of this kind: ``recall``."""

    hops: int = 2
    """Links of a chain: look-ups from its first key to its value."""

    chains: int = 3
    """Chains of links in a sample, each with a value of its own."""

    values: int = 4
    """Values that a chain may end in, each as likely as the others."""

    keys: int = 6
    """Keys there are; at least ``hops`` x ``chains``, which a sample uses, each once."""

    questions: int = 6
    """Questions at the end of a sample; each asks from a key drawn at random."""

    train: int = 4096
    """Samples in the training part."""

    validation: int = 256
    """Samples in the validation part."""

    probe: int = 512
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 512
    """Samples in the test part."""

    label_noise: float = 0.0
    """Share of the training answers that are wrong, 0 to 1."""

    @property
    def length(self) -> int:
        """Tokens of a sample: one for each link and each question."""
        return self.hops * self.chains + self.questions

    @property
    def vocabulary(self) -> int:
        """Tokens there are: the blank, the values, the keys, links from key to key, links from key to value."""
        return 1 + (self.values + self.keys) * (1 + self.keys)

    @property
    def chance(self) -> float:
        """Loss, in nats per sample, of whoever knows everything but does not read the links."""
        return self.questions / self.length * math.log(self.values)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            for name in ("hops", "chains", "questions"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("values", self.values >= 2, "must be >= 2")
            used = self.hops * self.chains
            check("keys", self.keys >= used, f"must be >= {used}, data.hops x data.chains")
            for name in ("train", "test"):
                check(name, getattr(self, name) >= 2, "samples, must be >= 2")
            check("label_noise", 0 <= self.label_noise <= 1, "share of the training answers, must be 0 to 1")
