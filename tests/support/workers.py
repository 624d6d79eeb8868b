"""Workers whose sum is a given function: what several processes give, without starting them."""

from collections.abc import Callable

from torch import Tensor

from hf_camphive.core.runtime import Workers


class Summing(Workers):
    """One process that is told what the sum over all processes is."""

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.total = total

    def sum(self, tensor: Tensor) -> Tensor:
        return self.total(tensor)
