"""How much memory a batch may take, on GPUs that do not exist."""

import pytest
import torch

from ccdist.device_memory import Budget

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "share", "reserved", "used", "expected"),
    [
        (24, 1.0, 0, 0, 24),  # a GPU of its own
        (24, 0.25, 0, 0, 6),  # neighbours may come for the rest
        (4, 0.25, 0, 0, 4),  # they have come, and took more
        (20, 0.25, 4, 3, 3),  # a share of 6, of which 3 are in use
        (2, 0.25, 4, 1, 5),  # 2 left for all, and 3 kept by this process's own allocator
        (20, 0.25, 7, 7, 0),  # the share was lowered meanwhile
    ],
)
def test_a_process_counts_on_its_share_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, share: float, reserved: int, used: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: used * GIB)
    assert Budget.of(torch.device("cuda", 0)).free == expected * GIB
