"""What an auxiliary head looks through. A bridge builder is a value; called with a `localgrad.site.Site` it returns a
module from features to features, whose ``twins``, if it has any, `localgrad.exchange` moves, or None for nothing.
"""

from localgrad.bridges.chain import chain
from localgrad.bridges.drawn import drawn
from localgrad.bridges.leap import Leap
from localgrad.bridges.momentum import Momentum
from localgrad.bridges.pool import Pool

__all__ = ["Leap", "Momentum", "Pool", "chain", "drawn"]
