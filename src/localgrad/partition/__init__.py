"""Cutting any model into blocks."""

from localgrad.partition.balance import AuxiliaryBytes, by_bytes, by_count
from localgrad.partition.blocks import INPUTS, OUTPUT, Block, RecomputedBlock
from localgrad.partition.cuts import Chain, Cut, Partition, Unit

__all__ = [
    "INPUTS", "OUTPUT", "AuxiliaryBytes", "Block", "Chain", "Cut", "Partition", "RecomputedBlock", "Unit", "by_bytes",
    "by_count",
]  # fmt: skip
