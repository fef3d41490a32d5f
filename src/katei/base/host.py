"""Where numbers come from the device to the host: all such places of the engine go through here.

While only shapes run (`katei.plan`) there are no numbers; then the caller says what a healthy run would have read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def shapes_only(x: Tensor) -> bool:
    """`x` has a shape and no numbers."""
    return x.device.type == "meta"


def values(x: Tensor, *, healthy: float) -> NDArray[Any]:
    """The numbers of `x`, or all `healthy` where there are none."""
    if shapes_only(x):
        return np.full(tuple(x.shape), healthy)
    return x.cpu().numpy()
