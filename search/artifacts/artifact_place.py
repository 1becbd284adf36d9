"""Where artefacts are when they are in an object store: its address, checked, opened and tried.

An address is whatever `pyarrow.fs.FileSystem.from_uri` reads: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, a mounted
file:///FOLDER. Credentials are found where the store's own tools find them (AWS_ACCESS_KEY_ID, ~/.aws, a machine's
role; GOOGLE_APPLICATION_CREDENTIALS), never in the address, which is stored with the study and shown.
"""

import functools
import re
import uuid
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pyarrow import ArrowException
from pyarrow.fs import FileSystem, LocalFileSystem

from search.artifacts import remote_files
from search.errors import UserError
from tracking.address import shown

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
# What may follow the `?`; of others nobody knows whether they are secret.
_OPEN_OPTIONS = re.compile(
    r"region|scheme|endpoint_override|allow_delayed_open|allow_bucket_creation|allow_bucket_deletion|smart_defaults"
    r"|tls_ca_file_path|tls_ca_dir_path|tls_verify_certificates|retry_limit_seconds|project_id|enable_tls"
)


class PlaceError(UserError):
    """The artefacts cannot be kept there; the text is one line without a secret."""


@dataclass(frozen=True)
class ArtifactPlace:
    """An object store's folder, by its address."""

    uri: str

    @classmethod
    def of(cls, uri: str) -> "ArtifactPlace":
        """Check an address; asks no server.

        Raises:
            PlaceError: it holds a login, or says something that is not known.
        """
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise PlaceError(f"storage.artifacts is {shown(uri)}, which is no address; {_EXPECTED}") from None
        user, at, _ = parts.netloc.rpartition("@")
        allowed = user == "anonymous" if parts.scheme == "gs" else parts.scheme in ("abfs", "abfss") and ":" not in user
        if at and not allowed:
            known = _CREDENTIALS.get(parts.scheme, "the variables of the store's own tools")
            raise PlaceError(
                f"storage.artifacts {shown(uri)} holds a login, and space files are stored and shared; "
                f"leave it out and set {known}"
            )
        for name, _value in parse_qsl(parts.query, keep_blank_values=True):
            if not _OPEN_OPTIONS.fullmatch(name):
                raise PlaceError(
                    f"storage.artifacts {shown(uri)} has an option that is not known; "
                    "expected such as region, endpoint_override or scheme"
                )
        if parts.fragment or not parts.scheme or not (parts.netloc or parts.path.strip("/")):
            raise PlaceError(f"storage.artifacts is {shown(uri)}; {_EXPECTED}")
        return cls(urlunsplit(parts._replace(path=parts.path.rstrip("/"))))

    def __str__(self) -> str:
        return shown(self.uri)

    def below(self, name: str) -> str:
        """The address of a folder in it."""
        parts = urlsplit(self.uri)
        return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))

    def open(self) -> tuple[FileSystem, str]:
        """The file system, one for each process, and the folder in it.

        Raises:
            PlaceError: there is no such kind of store.
            UnreachableError: it stays away, or does not say where its bucket is.
        """
        try:
            return _opened(self.uri)
        except (ArrowException, OSError, ImportError, ValueError) as error:
            raise PlaceError(
                f"{self} is no storage that can be used ({remote_files.one_line(error)}); {_EXPECTED}"
            ) from None

    def check_there(self) -> None:
        """Whether there is such a bucket, or with a mounted file system such a folder; writes nothing.

        Raises:
            PlaceError: there is none.
            UnreachableError: the store does not answer, or refuses.
        """
        filesystem, root = self.open()
        top = root if root.startswith("/") else root.partition("/")[0]
        if not remote_files.is_there(filesystem, top):
            what = "folder" if top == root else "bucket or container"
            raise PlaceError(f"storage {self}: there is no {what} {top}; make it, or correct storage.artifacts")

    def check(self) -> None:
        """Write, list, read and delete a small file.

        Raises:
            PlaceError: one of them does not work.
        """
        try:
            with remote_files.impatient():
                filesystem, root = self.open()
                folder, name = f"{root}/.probe-{uuid.uuid4().hex}", "file"
                remote_files.publish(filesystem, f"{folder}/{name}", b"probe")
                if remote_files.names(filesystem, folder) != [name]:
                    raise PlaceError(f"storage {self} does not list a file that was written to it")
                if remote_files.read(filesystem, f"{folder}/{name}") != b"probe":
                    raise PlaceError(f"storage {self} does not give back what was written to it")
                remote_files.remove(filesystem, f"{folder}/{name}")
                remote_files.remove_folder(filesystem, folder)
        except (remote_files.UnreachableError, ArrowException, OSError, ValueError) as error:
            if isinstance(error, PlaceError):
                raise
            known = _CREDENTIALS.get(urlsplit(self.uri).scheme)
            advice = f"; credentials are taken from {known}" if known else ""
            raise PlaceError(
                f"storage {self} cannot be used ({remote_files.one_line(error)}): see that the bucket is there, that "
                f"it may be read, written and listed, and that this machine reaches it{advice}"
            ) from None


_EXPECTED = "expected a folder, or an address such as s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"


def probe(place: str) -> str | None:
    """Whether this machine can write, list, read and delete in a store: None, or why not, in one line.

    For any process of a cluster: takes and gives text, and raises nothing of the store's.
    """
    try:
        ArtifactPlace.of(place).check()
    except PlaceError as error:
        return str(error)
    return None


@functools.cache
def _opened(uri: str) -> tuple[FileSystem, str]:
    if uri.startswith("s3://") and "allow_delayed_open=" not in uri:
        # A small file is then one request and not three.
        uri += f"{'&' if '?' in uri else '?'}allow_delayed_open=true"
    filesystem, root = remote_files.connected(uri)
    if not isinstance(filesystem, LocalFileSystem) and not root.strip("/"):
        raise ValueError("no bucket is named")
    return filesystem, root.rstrip("/")
