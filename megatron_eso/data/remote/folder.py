"""Files of a folder at a URL: fsspec reads them, with retries, and their hashes are compared."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from megatron_eso.data.shards.format import MANIFEST_FILE
from megatron_eso.data.shards.manifest import HashedFile, Manifest, decode_manifest
from megatron_eso.errors import ConfigError, DataError, OutageError
from megatron_eso.retries import retry

FIRST_WAIT_SECONDS = 1.0
"""Wait before the second attempt; it doubles with each attempt."""
NETWORK_ATTEMPTS = 7
HASH_ATTEMPTS = 3

_BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
_CHUNK_BYTES = 8 * 2**20
_STALL_SECONDS = 60
_PASSING_STATUSES = (408, 425, 429)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def is_remote(location: str | Path) -> bool:
    """Return whether a dataset's location is a URL.

    Raises:
        ConfigError: The scheme of the URL is not supported, or the URL holds credentials.
    """
    if "://" not in str(location):
        return False
    parts = urlsplit(str(location))
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a URL of data must hold no user, "
            "password or query: credentials go into the environment, as fsspec reads them"
        )
    if parts.scheme not in _BACKENDS:
        raise ConfigError(f"{location}: give a folder, or a URL of {'://, '.join(_BACKENDS)}://")
    return True


class RemoteFolder:
    """A folder at a URL; failed reads are retried after growing pauses."""

    def __init__(self, url: str, network_attempts: int = NETWORK_ATTEMPTS) -> None:
        """Find the library that reads `url`.

        Args:
            url: URL of the folder.
            network_attempts: Attempts of each read while the server cannot be reached.

        Raises:
            ConfigError: The library is not installed.
        """
        self.url = url.rstrip("/")
        self._network_attempts = network_attempts
        self._scheme = urlsplit(url).scheme
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.url)
        except ImportError as error:
            raise ConfigError(
                f"{url} needs {_BACKENDS[self._scheme]}: pip install 'megatron-eso[remote]'"
            ) from error

    def name(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    def has(self, name: str) -> bool:
        """Return whether the file exists."""
        return self._retrying(name, lambda: bool(self._files.exists(self._path(name))))

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if the server does not report them."""
        size: int | None = self._retrying(name, lambda: self._files.info(self._path(name)))["size"]
        return size

    def read_manifest(self) -> tuple[Manifest, bytes]:
        """Read and check the manifest on the server; return it and its bytes.

        Raises:
            DataError: The manifest is missing, which has FileNotFoundError as its cause, or every
                attempt reads a damaged one.
        """

        def read() -> tuple[Manifest, bytes]:
            encoded: bytes = self._files.cat_file(self._path(MANIFEST_FILE))
            return decode_manifest(encoded, self.name(MANIFEST_FILE)), encoded

        return self._retrying(MANIFEST_FILE, read)

    def download(
        self,
        name: str,
        file: HashedFile,
        stream: BinaryIO,
        advance: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Write the content of a file to the start of a stream; check its size and sha256.

        Args:
            name: Name of the file in this folder.
            file: Size and hash in the manifest.
            stream: A local file, seekable.
            advance: Called with the number of bytes that arrived; a negative number means bytes
                that are downloaded again.

        Raises:
            DataError: Every attempt fails, or reads another content.
        """

        def attempt() -> None:
            stream.seek(0)
            sha256, size = hashlib.sha256(), 0
            try:
                for chunk in self._read_chunks(name, file):
                    size += len(chunk)
                    if size > file.bytes:
                        raise _DamagedError(f"it has more than the manifest's {file.bytes} bytes")
                    sha256.update(chunk)
                    _write_locally(stream, chunk)
                    advance(len(chunk))
                if size != file.bytes:
                    raise _DamagedError(f"it has {size} bytes, not the manifest's {file.bytes}")
                if sha256.hexdigest() != file.sha256:
                    raise _DamagedError(
                        f"its sha256 is {sha256.hexdigest()}, not the manifest's {file.sha256}"
                    )
            except BaseException:
                advance(-size)
                raise

        self._retrying(name, attempt)

    def _read_chunks(self, name: str, file: HashedFile) -> Iterator[bytes]:
        if self._scheme in ("http", "https"):
            import aiohttp

            # One request for the whole file, because not every server supports ranges. By default
            # aiohttp ends a request after five minutes.
            options: dict[str, Any] = {
                "block_size": 0,
                "size": file.bytes,
                "timeout": aiohttp.ClientTimeout(total=None, sock_read=_STALL_SECONDS),
                "read_bufsize": 2**20,
            }
        else:
            options = {"cache_type": "none"}
        with self._files.open(self._path(name), "rb", **options) as remote:
            while chunk := remote.read(_CHUNK_BYTES):
                yield chunk

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _retrying(self, name: str, read: Callable[[], _T]) -> _T:
        """Call `read` until it succeeds, or too often for the kind of its failure.

        Raises:
            OutageError: The server cannot be reached, or cannot answer now.
            DataError: The server refuses the file, or its content is damaged.
        """
        # A damaged file is read HASH_ATTEMPTS times, everything else `network_attempts` times.
        num_attempts = num_damaged = 0

        def attempt() -> _T:
            nonlocal num_attempts
            num_attempts += 1
            return read()

        def log_or_give_up(error: Exception, seconds: float) -> None:
            nonlocal num_damaged
            num_damaged += _is_damage(error)
            if _is_final(error) or num_damaged == HASH_ATTEMPTS:
                raise error
            logger.warning("%s: %s; retry in %.2g s", self.name(name), _explain(error), seconds)

        pauses = [FIRST_WAIT_SECONDS * 2**number for number in range(self._network_attempts - 1)]
        try:
            # The errors of fsspec's backends have no common base class.
            return retry(attempt, errors=Exception, pauses=pauses, on_error=log_or_give_up)
        except _LocalError as error:
            raise error.error from error
        except DataError:
            raise
        except Exception as error:
            times = f" ({num_attempts} attempts)" if num_attempts > 1 else ""
            problem = f"cannot read {self.name(name)}: {_explain(error)}{times}"
            if _is_damage(error):
                raise DataError(f"{problem}; put the dataset there again") from error
            kind = DataError if _is_final(error) else OutageError
            remedy = "check the URL, and the network and credentials of this machine"
            raise kind(f"{problem}; {remedy}") from error


class _DamagedError(Exception):
    """The server sent another content than the manifest records."""


class _LocalError(Exception):
    """A failure of the local disk, which is not retried."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _write_locally(stream: BinaryIO, chunk: bytes) -> None:
    try:
        stream.write(chunk)
    except OSError as error:
        raise _LocalError(error) from error


def _is_damage(error: Exception) -> bool:
    """Return whether the server answered, but not with the dataset's file."""
    return isinstance(error, (_DamagedError, DataError))


def _is_final(error: Exception) -> bool:
    """Return whether a retry cannot succeed: no such file, no permission, no credentials."""
    if isinstance(error, _LocalError):
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING_STATUSES
    return isinstance(error, (FileNotFoundError, PermissionError)) or type(error).__name__ in (
        "NoCredentialsError",
        "DefaultCredentialsError",
    )


def _explain(error: Exception) -> str:
    """Describe an error, without the signed addresses to which some servers redirect."""
    if _is_damage(error):
        return str(error)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers with HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return re.sub(r"\?[^\s'\"]*", "", f"{type(error).__name__} {error}").strip()
