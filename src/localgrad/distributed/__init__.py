"""More than one process: replicas of a network, and its blocks on different ranks."""

from localgrad.distributed.block_parallel import block_parallel
from localgrad.distributed.checkpoint import Checkpoints
from localgrad.distributed.data_parallel import Replicas, data_parallel
from localgrad.distributed.mesh import device_mesh
from localgrad.distributed.stage import Stage

__all__ = ["Checkpoints", "Replicas", "Stage", "block_parallel", "data_parallel", "device_mesh"]
