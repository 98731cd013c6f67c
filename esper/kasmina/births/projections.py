"""The last projections of a block: the modules whose output is added to the stream that passes the block."""

import re
from collections.abc import Sequence

from torch import nn

# Whole names of modules within a block whose output is added to the stream; of names that differ in a number marked
# `last`, only the one with the largest.
LAST_PROJECTIONS = (
    r"attn\.c_proj|mlp\.c_proj",  # GPT-2
    r"self_attn\.(o_proj|out_proj|dense)|mlp\.down_proj|linear2|fc2|mlp\.dense_4h_to_h",  # Llama, torch, OPT, NeoX
    r"attention\.output\.dense|output\.dense|attention\.o_proj",  # ViT
    r"attn\.proj|mlp\.fc2",  # timm
    r"project|down",  # esper's GPT
    r"layer\.(?P<last>\d+)\.normalization|(\d+\.)?(bn|norm)(?P<last2>\d+)",  # ResNet: of transformers, torch, esper
)


def last_projections(block: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules of a block that are zero under ``identity``.

    Args:
        block: the site's module, or a copy of it.
        patterns: regular expressions for whole names; empty for `LAST_PROJECTIONS`.
    """
    names = [name for name, module in block.named_modules() if name and any(True for _ in module.parameters(False))]
    if patterns:
        return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    chosen: dict[str, tuple[int, str]] = {}
    for name in names:
        for pattern in LAST_PROJECTIONS:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            number = next((text for text in match.groupdict().values() if text is not None), None)
            where = name if number is None else re.sub(rf"{number}(?=\D*$)", "#", name)
            rank = -1 if number is None else int(number)
            if where not in chosen or chosen[where][0] < rank:
                chosen[where] = rank, name
    return sorted(name for _, name in chosen.values())
