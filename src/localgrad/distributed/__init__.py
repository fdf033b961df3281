"""More than one process: replicas of a network, and blocks on different ranks."""

from localgrad.distributed.data_parallel import Replicas, data_parallel

__all__ = ["Replicas", "data_parallel"]
