"""Cutting any model into blocks."""

from localgrad.partition.balance import by_bytes, by_count
from localgrad.partition.blocks import INPUTS, OUTPUT, Block
from localgrad.partition.cuts import Chain, Cut, Partition, Unit

__all__ = ["INPUTS", "OUTPUT", "Block", "Chain", "Cut", "Partition", "Unit", "by_bytes", "by_count"]
