"""Simulated accelerators: how trials share them, and what goes wrong with them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Accelerators, how trials share them, and what goes wrong with them."""

    gpus: int = 16
    share: float = 1.0  # of an accelerator that a trial holds
    gpus_per_node: int = 4
    crowding: float = 0.0  # k trials on an accelerator are 1 + crowding x (k - 1) times as slow as one
    node_hours: float = math.inf  # mean time until a node is lost, exponential
    repair_s: float = 600.0  # until a lost node is back
    stragglers: float = 0.0  # share of starts that are slow
    straggler_slowdown: float = 3.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1 or not 0 < self.share <= 1:
            raise ValueError(f"expected at least one GPU a node and a share in (0, 1], got {self}")

    @property
    def per_gpu(self) -> int:
        """Trials that an accelerator holds."""
        return int(1 / self.share + 1e-9)

    @property
    def slots(self) -> int:
        return self.gpus * self.per_gpu

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    def node(self, gpu: int) -> int:
        """The node of an accelerator."""
        return gpu // self.gpus_per_node

    def slowdown(self, trials: int) -> float:
        """Of each of so many trials on one accelerator."""
        return 1 + self.crowding * (trials - 1)
