"""How much fits: sub-problems of a batch and open images, from the memory that is free.

On a processor the best batch is the one whose layers stay in the caches, which is far less than would fit.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ccdist.networks import Network
from ccdist.subproblems import Images

# Tensors as large as all layers' weights that a bound and its gradient hold at once, measured.
TENSORS_OF_A_BOUND = 10
CACHE_BYTES = 64 * 2**20
MOST_SUB_PROBLEMS = 8192
# Share of the free memory for one batch, and for what open images keep.
BATCH_SHARE, IMAGES_SHARE = 0.4, 0.2


@dataclass
class Budget:
    """Free memory in bytes, halved for a batch by each out-of-memory error."""

    device: torch.device
    free: int
    scale: float = 1.0

    @classmethod
    def of(cls, device: torch.device) -> "Budget":
        if device.type == "cuda":
            return cls(device, torch.cuda.mem_get_info(device)[0])
        return cls(device, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def sub_problems(self, images: Images) -> int:
        """Sub-problems bounded at once."""
        units = sum(step.box.lower[0].numel() for step in images.steps)
        memory = BATCH_SHARE * self.free if self.device.type == "cuda" else min(CACHE_BYTES, BATCH_SHARE * self.free)
        return max(1, min(MOST_SUB_PROBLEMS, int(self.scale * memory / (4 * units * TENSORS_OF_A_BOUND))))

    def images(self, network: Network, images: Tensor) -> int:
        """Images open at once."""
        return 256
