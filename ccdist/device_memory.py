"""How much fits: sub-problems of a batch, open images and their frontiers, from the memory that is free.

On a processor the best batch is the one whose layers stay in the caches, which is far less than would fit.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ccdist.branching import OpenImage
from ccdist.neurons import Images

# Tensors as large as all layers' weights that a bound and its gradient hold at once.
TENSORS_OF_A_BOUND = 10
CACHE_BYTES = 64 * 2**20
MOST_SUB_PROBLEMS = 8192
# Share of the free memory for one batch, for what open images keep (twice: stacked too), and for all frontiers.
BATCH_SHARE, IMAGES_SHARE, FRONTIER_SHARE = 0.4, 0.2, 0.3


@dataclass
class Budget:
    """Free memory in bytes when the search began, and what has been learned since.

    scale: of a batch, halved by each out-of-memory error. image: bytes of the largest image seen.
    """

    device: torch.device
    free: int
    host_free: int
    scale: float = 1.0
    image: int = 0

    @classmethod
    def of(cls, device: torch.device) -> "Budget":
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(device, _free_on_gpu(device) if device.type == "cuda" else host, host)

    def sub_problems(self, images: Images) -> int:
        """Sub-problems bounded at once."""
        units = sum(step.box.lower[0].numel() for step in images.steps)
        memory = BATCH_SHARE * self.free if self.device.type == "cuda" else min(CACHE_BYTES, BATCH_SHARE * self.free)
        return max(1, min(MOST_SUB_PROBLEMS, int(self.scale * memory / (4 * units * TENSORS_OF_A_BOUND))))

    def halve(self) -> None:
        """After an out-of-memory error."""
        self.scale /= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def see(self, opened: Sequence[OpenImage]) -> None:
        """Remember how large an image is."""
        self.image = max([self.image, *(image.num_bytes for image in opened)])

    def images(self) -> int:
        """Images open at once, at least one."""
        return max(1, int(IMAGES_SHARE * self.free / (2 * self.image))) if self.image else 2**31

    def shed(self, opened: Sequence[OpenImage]) -> None:
        """Give up the images with the largest frontiers while all of them together take too much memory."""
        sizes = {id(image): image.frontier.num_bytes for image in opened}
        for image in sorted(opened, key=lambda image: -sizes[id(image)]):
            if sum(sizes.values()) <= FRONTIER_SHARE * self.host_free:
                return
            image.give_up()
            sizes[id(image)] = 0


def _free_on_gpu(device: torch.device) -> int:
    """What this process may still take: of a GPU that it shares, no more than the share it was given."""
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    # What the allocator keeps without using it counts as reserved, though this process has it at hand.
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return max(0, min(free + reserved, share) - used)


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of PyTorch's own allocator on the CPU, or of Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error)
    return any(words in told for words in ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED"))
