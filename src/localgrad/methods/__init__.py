"""Training methods. A base takes a task, a plug-in takes a method; both return a `localgrad.method.Method`.

A new method is one file here and one line below.
"""

from localgrad.methods.accumulation import accumulation
from localgrad.methods.checkpointing import checkpointing
from localgrad.methods.deep_supervision import deep_supervision
from localgrad.methods.dgl import dgl
from localgrad.methods.e2e import e2e
from localgrad.methods.infopro import infopro
from localgrad.methods.man import man
from localgrad.methods.man_pp import man_pp
from localgrad.methods.pgl import pgl
from localgrad.methods.predsim import predsim
from localgrad.methods.windows import windows

__all__ = [
    "accumulation",
    "checkpointing",
    "deep_supervision",
    "dgl",
    "e2e",
    "infopro",
    "man",
    "man_pp",
    "pgl",
    "predsim",
    "windows",
]
