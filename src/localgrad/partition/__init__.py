"""Cutting any model into blocks."""

from localgrad.partition.blocks import Block, RecomputedBlock
from localgrad.partition.choose import AuxiliaryBytes, by_bytes, by_count
from localgrad.partition.cut import Cut
from localgrad.partition.moments import Partition
from localgrad.partition.separate import Chain, SeparateBlocks, separate_blocks
from localgrad.partition.trace import INPUTS, OUTPUT
from localgrad.partition.units import Unit

__all__ = [
    "INPUTS", "OUTPUT", "AuxiliaryBytes", "Block", "Chain", "Cut", "Partition", "RecomputedBlock", "SeparateBlocks",
    "Unit", "by_bytes", "by_count", "separate_blocks",
]  # fmt: skip
