from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import PageIds

def slots_of(page_ids: PageIds, page_size: int) -> npt.NDArray[np.int64]: ...
def pages_of(slots: npt.NDArray[Any], page_size: int, num_pages: int = -1) -> PageIds: ...
def tokens_of(tokens: Any) -> npt.NDArray[Any]: ...
