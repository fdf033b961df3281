"""What an auxiliary head looks through. A bridge builder is a value; called with a `localgrad.method.Site` it returns a
module from features to features, whose ``twins``, if it has any, `localgrad.exchange` moves.
"""

from localgrad.bridges.chain import chain
from localgrad.bridges.momentum import Momentum

__all__ = ["Momentum", "chain"]
