"""What will fit before anything is trained: every way to train a model, its peak memory and its step time."""

from localgrad.measure.sizes import read_memory, size
from localgrad.measure.work import Rates, Work, measure_rates
from localgrad.planning.planner import Planner, Predicted
from localgrad.planning.report import EXACT, LOCAL, MICRO, Option, Plan
from localgrad.planning.ways import fit, plan

__all__ = [
    "EXACT", "LOCAL", "MICRO", "Option", "Plan", "Planner", "Predicted", "Rates", "Work", "fit", "measure_rates",
    "plan", "read_memory", "size",
]  # fmt: skip
