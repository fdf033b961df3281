"""Auxiliary networks. A head builder is a value; called with a `localgrad.site.Site` it measures the features there
and returns a module. Every head reads maps (B, C, H, W), channel-last maps (B, H, W, C), tokens (B, T, C), vectors,
signals (B, C, L) and volumes (B, C, D, H, W) or (B, D, H, W, C); a 3x3 convolution has a kernel of 3 on signals and
3x3x3 on volumes. Detection heads read positions in a plane only.
"""

from localgrad.heads.attention_map import AttentionMap
from localgrad.heads.conv import Conv
from localgrad.heads.critic import Critic
from localgrad.heads.decoder import Decoder
from localgrad.heads.detection import Detection
from localgrad.heads.fcn import FCN
from localgrad.heads.linear import Linear, PooledLinear
from localgrad.heads.mlp import MLP
from localgrad.heads.named import Spec, named
from localgrad.heads.patches import Patches
from localgrad.heads.projection import Projection
from localgrad.heads.remaining import Remaining
from localgrad.heads.token_read_out import TokenReadOut

__all__ = [
    "FCN",
    "MLP",
    "AttentionMap",
    "Conv",
    "Critic",
    "Decoder",
    "Detection",
    "Linear",
    "Patches",
    "PooledLinear",
    "Projection",
    "Remaining",
    "Spec",
    "TokenReadOut",
    "named",
]
