"""Leases: at most one of many processes, on any nodes, does a thing, and a dead one is replaced.

The storage has no exclusive create and no lock, so a lease is made of files that are created once, listed and
deleted. In a resource's folder, `HOLDER.ID.claim` says that HOLDER asks for the lease or has it (ID is new for each
claim), and `HOLDER.ID.beat`, there once it has it, changes with every heartbeat.

Why at most one has it: a holder writes its claim *first*, lists the claims *after* that, and has the lease only if
the listing shows its own claim and no other. Suppose A and B both have it and neither claim was deleted. B's claim is
not in A's listing, so it was written after that listing began, so after A's claim; then B's listing, later still,
shows A's claim, and B does not have it. This needs a storage whose listing shows what was written before it: local
disks, S3, Google and Azure storage, and NFS, where writing into a folder refreshes what the writer sees of it (so
what the lease protects should be marked in the same folder).

Why one gets it: of several that ask at once the one with the smallest ID stays and the others withdraw.

Death: a claim is never written again, only deleted, so a deleted claim is dead for ever, whatever its owner still
does. A watcher deletes a claim whose beat it has seen unchanged for `expiry_s` of its own monotonic clock: no two
machines' clocks are compared. A holder that was only asleep finds its claim gone and knows that its lease is lost.
"""

import hashlib
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import quote, unquote

from pyarrow.fs import FileSystem

from search.artifacts import remote_files
from search.artifacts.periodic import repeated

EXPIRY_S = 120.0
# Beats in one expiry: so many have to fail before a living holder counts as dead.
BEATS = 6
# How long to wait for the claims of others that ask at the same moment; they take milliseconds.
SETTLE_S, POLL_S = 2.0, 0.02
# Of a holder in a file's name, which may have 255 bytes with all that follows.
LONGEST_NAME = 180


@dataclass(frozen=True)
class Held:
    """Another holder has the lease, or is about to."""

    holder: str


@dataclass(frozen=True)
class _Claim:
    holder: str  # as `_named`
    id: str

    @property
    def stem(self) -> str:
        return f"{quote(self.holder, safe='')}.{self.id}"


def _named(holder: str) -> str:
    """A holder as files are named by it: a long one by its hash and its end, for the whole of it is in the claim."""
    if len(quote(holder, safe="")) <= LONGEST_NAME:
        return holder
    end = holder[-40:].encode("ascii", "replace").decode()
    return f"{hashlib.sha256(holder.encode()).hexdigest()[:16]}...{end}"


class _Place:
    """The files of one resource's lease."""

    def __init__(self, filesystem: FileSystem, folder: str) -> None:
        self._filesystem = filesystem
        self._folder = folder

    def claims(self) -> list[_Claim]:
        names = remote_files.names(self._filesystem, self._folder)
        parts = [name.rsplit(".", 2) for name in names if name.endswith(".claim")]
        return [_Claim(unquote(holder), identifier) for holder, identifier, _ in parts]

    def is_claimed(self, claim: _Claim) -> bool:
        return remote_files.exists(self._filesystem, self._file(claim, "claim"))

    def claim(self, claim: _Claim, holder: str) -> None:
        remote_files.make_folder(self._filesystem, self._folder)
        remote_files.write(self._filesystem, self._file(claim, "claim"), holder.encode())

    def beat(self, claim: _Claim, count: int) -> None:
        remote_files.write(self._filesystem, self._file(claim, "beat"), f"{count}\n".encode())

    def beat_of(self, claim: _Claim) -> bytes | None:
        """What changes while the holder lives; None while it still asks."""
        return remote_files.read(self._filesystem, self._file(claim, "beat"))

    def delete(self, claim: _Claim) -> None:
        for kind in ("claim", "beat"):
            remote_files.remove(self._filesystem, self._file(claim, kind))

    def _file(self, claim: _Claim, kind: str) -> str:
        return f"{self._folder}/{claim.stem}.{kind}"


class Lease:
    """The right to do it, kept by a heartbeat for the time of the context and given back at its end."""

    def __init__(self, place: _Place, claim: _Claim, resource: str, interval_s: float) -> None:
        self.resource = resource
        self.holder = claim.holder
        self._place = place
        self._claim = claim
        self._interval_s = interval_s
        self._beats = 0
        self._lost = False
        self._running = ExitStack()

    @property
    def lost(self) -> bool:
        """Whether a beat found the claim deleted: others took this holder for dead, and one of them may go on."""
        return self._lost

    def beat(self) -> None:
        """Show life, or find out that the lease is lost."""
        with remote_files.impatient():  # the next one is due soon
            self._beat()

    def _beat(self) -> None:
        self._lost = self._lost or not self._place.is_claimed(self._claim)
        if not self._lost:
            self._beats += 1
            self._place.beat(self._claim, self._beats)

    def __enter__(self) -> "Lease":
        self._running.enter_context(repeated(self.beat, self._interval_s))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()
        with suppress(remote_files.UnreachableError), remote_files.impatient():  # it ends by itself
            self._place.delete(self._claim)


class Leases:
    """The leases below one folder, as one process sees them; keep it, for it remembers when it saw which beat.

    Args:
        filesystem: where the leases are.
        root: the folder; a resource's lease is in `root/RESOURCE`.
        expiry_s: seconds without a heartbeat, as a watcher sees it, after which a holder is dead; equal for all, and
            longer than the storage may show an old content.
        clock: monotonic seconds.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        root: str,
        *,
        expiry_s: float = EXPIRY_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._filesystem = filesystem
        self._root = root
        self._expiry_s = expiry_s
        self._clock = clock
        self._sleep = sleep
        self._seen: dict[str, dict[_Claim, tuple[bytes | None, float]]] = {}  # by resource: beat, seen since

    def acquire(self, resource: str, holder: str) -> Lease | Held:
        """The lease, if nobody else has it; waits for no holder.

        A holder that asks again is the successor of its own dead process (the caller makes sure of that), so the
        predecessor's claim goes at once. An answer that it is held by the asking holder itself means that this
        process slept while it asked, and can ask again.
        """
        place = self._place(resource)
        self.forget(resource, holder)
        having = [claim for claim, beat in self._living(resource) if beat is not None]
        if having:
            return Held(having[0].holder)
        own = _Claim(_named(holder), uuid.uuid4().hex)
        try:
            place.claim(own, holder)
            rival = self._rival(resource, own)
            if rival is None:
                place.beat(own, 0)
                return Lease(place, own, resource, self._expiry_s / BEATS)
        except BaseException:
            place.delete(own)
            raise
        place.delete(own)
        return Held(rival.holder)

    def forget(self, resource: str, holder: str) -> None:
        """Delete the claims of a holder that is known to be dead, so that nobody waits for their expiry."""
        place = self._place(resource)
        for claim in place.claims():
            if claim.holder == _named(holder):
                place.delete(claim)

    def holder(self, resource: str) -> str | None:
        """Who has the lease, or else asks for it; deletes the claims of those who are dead."""
        living = self._living(resource)
        having = [claim for claim, beat in living if beat is not None]
        first = (having or [claim for claim, _ in living])[:1]
        return first[0].holder if first else None

    def _rival(self, resource: str, own: _Claim) -> _Claim | None:
        """The claim to yield to; None once a listing shows the own claim and no other."""
        patient_until = self._clock() + min(SETTLE_S, self._expiry_s / BEATS)
        while True:
            living = self._living(resource)
            impatient = self._clock() >= patient_until
            others = [(claim, beat) for claim, beat in living if claim != own]
            if len(others) == len(living):  # a listing that failed, or others took this process for dead
                if impatient or not self._place(resource).is_claimed(own):
                    return own
            elif not others:
                return None
            for claim, beat in others:
                if impatient or beat is not None or claim.id < own.id:
                    return claim
            self._sleep(POLL_S)  # those with greater IDs withdraw when they see this claim

    def _living(self, resource: str) -> list[tuple[_Claim, bytes | None]]:
        """The claims of living holders, with their beats; deletes the others."""
        place, now = self._place(resource), self._clock()
        before = self._seen.get(resource, {})
        living = {}
        for claim in place.claims():
            beat = place.beat_of(claim)
            last, since = before.get(claim, (beat, now))
            if beat != last:
                since = now
            if now - since >= self._expiry_s:
                place.delete(claim)
            else:
                living[claim] = (beat, since)
        self._seen[resource] = living
        return [(claim, beat) for claim, (beat, _) in living.items()]

    def _place(self, resource: str) -> _Place:
        return _Place(self._filesystem, f"{self._root}/{resource}")
