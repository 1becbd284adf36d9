"""Addresses of tracking servers and databases, and the logins in them, which are never stored or shown.

What a search keeps is an address without its login. Whoever opens it later finds the login where MLflow itself looks:
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or ~/.netrc; for a database in PGPASSWORD
or ~/.pgpass; or in MLFLOW_TRACKING_URI, where that is the same address with a login.
"""

import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

URI = "MLFLOW_TRACKING_URI"
USERNAME, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
HOW_TO_LOG_IN = f"set {USERNAME} and {PASSWORD}, or {TOKEN}, or an entry in ~/.netrc"
_SQLITE = "sqlite:"
_PASSWORD_IN_URL = re.compile(r"(\w://[^\s/:@]*):[^\s'\"]*@")
# The options of a database's URL that are no secret. Of others nobody knows.
_OPEN_OPTIONS = re.compile(
    r"ssl(?!\w*pass)\w*|connect_timeout|application_name|options|charset|host|port|dbname|user|driver"
)


class AddressError(ValueError):
    """An address cannot be used; the text says of it, behind its name, what is wrong, and holds no secret."""


@dataclass(frozen=True)
class Address:
    """A place as it may be stored and shown, and its login.

    Args:
        full: what was given.
        open: the same without a secret. A database's user is none, a server's goes with the password.
    """

    full: str = field(repr=False)
    open: str

    @classmethod
    def of(cls, uri: str) -> "Address":
        """Read an address.

        Raises:
            AddressError: it is a server's and says more than scheme, login, host, port and path.
        """
        if uri.startswith(_SQLITE):
            return cls(uri, uri)
        try:
            parts = urlsplit(uri)
            valid = bool(parts.hostname or not is_server(uri)) and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is none: a password with an unescaped slash leaves one behind
            valid = False
        if not valid:
            # Nothing of it is shown: who knows which part of it is a password.
            raise AddressError("has no valid host and port; expected an address such as http://host:5000")
        if not is_server(uri):
            return cls(uri, _without_password(uri))
        if parts.query or parts.fragment:
            raise AddressError(
                f"is {shown(uri)}; MLflow does not send what stands behind ? or #, so leave it out"
                f" (for a login {HOW_TO_LOG_IN})"
            )
        return cls(uri, urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))

    @property
    def has_secret(self) -> bool:
        return self.full != self.open

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password in a server's address, None where there is none."""
        user, at, _ = urlsplit(self.full).netloc.rpartition("@")
        if not at or not is_server(self.full):
            return None
        name, _, password = user.partition(":")
        return unquote(name), unquote(password)


def is_server(uri: str) -> bool:
    """Whether it is a server's address, not a database's."""
    return uri.startswith(("http://", "https://"))


def shown(uri: str) -> str:
    """An address for a message, whatever is wrong with it: all that may be a login or a token is hidden."""
    text = re.sub(r"^(\w[\w+.-]*://)?.*@", r"\1***@", uri, flags=re.DOTALL)
    return re.sub(r"[?#].*", "?***", text, flags=re.DOTALL)


def to_open(uri: str) -> str:
    """What to connect to for a stored address; the login of a server goes where MLflow reads it for each request.

    Raises:
        AddressError: it is none.
    """
    address = Address.of(uri)
    if not address.has_secret and (own := os.environ.get(URI)):
        try:
            same = Address.of(own)
        except AddressError:  # somebody else's, and not asked for
            same = address
        if same.open.rstrip("/") == address.open.rstrip("/"):
            address = same
    if not is_server(address.full):
        return address.full
    if address.login is not None:
        # Not in the address: MLflow puts that into its messages.
        os.environ[USERNAME], os.environ[PASSWORD] = address.login
    return address.open


def without_secrets(text: str) -> str:
    """A text in which neither the values of this process's login occur nor a password in a URL."""
    for name in (PASSWORD, TOKEN):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return _PASSWORD_IN_URL.sub(r"\1:***@", text)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    # Not by urlunsplit, which makes postgresql:/name of postgresql:///name.
    text = uri.replace(parts.netloc, f"{user.partition(':')[0]}{at}{host}", 1) if at else uri
    options = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in options if _OPEN_OPTIONS.fullmatch(name)]
    if kept == options:
        return text
    return "?".join(part for part in (text.partition("?")[0], urlencode(kept)) if part)
