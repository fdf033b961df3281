"""Auxiliary networks. A head builder is a value; called with a `localgrad.method.Site` it measures the features there
and returns a module. Every head reads maps (B, C, H, W), channel-last maps (B, H, W, C), tokens (B, T, C) and vectors.
"""

from localgrad.heads.conv import Conv
from localgrad.heads.decoder import Decoder
from localgrad.heads.linear import Linear, PooledLinear
from localgrad.heads.mlp import MLP
from localgrad.heads.projection import Projection

__all__ = ["MLP", "Conv", "Decoder", "Linear", "PooledLinear", "Projection"]
