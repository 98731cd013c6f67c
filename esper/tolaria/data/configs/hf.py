"""Settings of data sets of the library datasets."""

from dataclasses import dataclass, field

from esper.leyline.fields import Checks
from esper.tolaria.data.configs.own import Target
from esper.tolaria.data.registry import DataConfig


@dataclass(kw_only=True, slots=True)
class HFDataConfig(DataConfig):
    """A data set of the library datasets (extra ``datasets``): images, texts, or a table."""

    kind: str = "hf"
    """Registered name of this kind: ``hf``."""

    path: str
    """A folder (Parquet, JSON lines, CSV, Arrow, images, or what `save_to_disk` wrote), one such file, or with ``hub``
    a name on the hub. A split ``test`` is the test part; the others are dealt from the split ``train``.
    """

    hub: bool = False
    """Whether a ``path`` that is neither folder nor file is downloaded from the hub."""

    subset: str | None = None
    """Configuration of a data set on the hub; null: its only one."""

    image: str | None = None
    """Column of images; null: the samples are texts or rows of a table."""

    channels: int = 3
    """Channels of an image: 1 or 3."""

    side: int | None = None
    """Pixels of an image's height and width, to which each is scaled; null: as they are, all of one size."""

    text: str | None = None
    """Column of texts; null: the samples are images or rows of a table. With a ``target``, a text is a sample; without
    one, texts are joined in their order and cut into windows, of which each next token is learned.
    """

    tokenizer: str | None = None
    """File tokenizer.json of the library tokenizers, by which texts become tokens."""

    block: int = 64
    """Tokens that the model sees of a text; a longer one is cut, a shorter one is filled up."""

    filler: int = 0
    """Token that fills up a text that is shorter than ``block``."""

    target: list[str] = field(default_factory=list)
    """Columns of the target; empty: the next token of a text."""

    target_kind: Target = Target.CLASS
    """What the target is: ``class`` (one column), ``number`` (regression) or ``labels`` (columns of 0 and 1)."""

    columns: list[str] | None = None
    """Of a table, columns of the input; null: all others."""

    texts: list[str] = field(default_factory=list)
    """Of a table, columns that hold texts although they look like numbers, such as a code."""

    cluster_column: str | None = None
    """Column that names what a row belongs to, such as its patient; dealt whole. null: each row is its own."""

    validation: int = 512
    """Samples in the validation part."""

    probe: int = 1024
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 1024
    """Samples in the test part, where there is no split ``test``."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("path", self.path.strip() != "", "must name a folder, a file, or with data.hub a name on the hub")
            check("subset", self.subset is None or self.hub, "is for data.hub=true")
            check("channels", self.channels in (1, 3), "must be 1 or 3")
            check("side", self.side is None or self.side >= 1, "pixels, must be >= 1, or null")
            check("block", self.block >= 1, "tokens, must be >= 1")
            check("filler", self.filler >= 0, "must be a token")
            check("text", self.text is None or self.image is None, "either this or data.image")
            check("tokenizer", (self.tokenizer is None) == (self.text is None), "goes with data.text: a tokenizer.json")
            check("target", bool(self.target) or self.text is not None, "name one column or more")
            one = self.target_kind is not Target.CLASS or len(self.target) <= 1
            check("target", one, "of target_kind=class: name one column")
            whole = bool(self.target) or self.cluster_column is None
            check("cluster_column", whole, "is for samples that have a target; windows of joined texts have none")
