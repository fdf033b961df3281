"""Training methods. A base takes a task, a plug-in takes a method; both return a `localgrad.method.Method`.

A new method is one file here and one line below.
"""

from localgrad.methods.accumulation import accumulation
from localgrad.methods.auglocal import auglocal
from localgrad.methods.checkpointing import checkpointing
from localgrad.methods.deep_supervision import deep_supervision
from localgrad.methods.dgl import dgl
from localgrad.methods.e2e import e2e
from localgrad.methods.feature_distillation import feature_distillation
from localgrad.methods.hpff import hpff
from localgrad.methods.infopro import infopro
from localgrad.methods.kaiming import kaiming
from localgrad.methods.last_head_distillation import last_head_distillation
from localgrad.methods.lean import lean
from localgrad.methods.local_critic import local_critic
from localgrad.methods.logit_consistency import logit_consistency
from localgrad.methods.man import man
from localgrad.methods.man_pp import man_pp
from localgrad.methods.mlaan import mlaan
from localgrad.methods.pgl import pgl
from localgrad.methods.pooled import pooled
from localgrad.methods.predsim import predsim
from localgrad.methods.sgr import sgr
from localgrad.methods.tail import tail
from localgrad.methods.trgl import trgl
from localgrad.methods.windows import windows

__all__ = [
    "accumulation",
    "auglocal",
    "checkpointing",
    "deep_supervision",
    "dgl",
    "e2e",
    "feature_distillation",
    "hpff",
    "infopro",
    "last_head_distillation",
    "kaiming",
    "lean",
    "local_critic",
    "logit_consistency",
    "man",
    "man_pp",
    "mlaan",
    "pgl",
    "pooled",
    "predsim",
    "sgr",
    "tail",
    "trgl",
    "windows",
]
