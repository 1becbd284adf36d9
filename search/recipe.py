"""Where the seeds of a trial come from; what it computes from is `ccdist.recipe.Recipe`."""

import hashlib

from ccdist.recipe import Recipe as Recipe


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) that depends on all parts and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
