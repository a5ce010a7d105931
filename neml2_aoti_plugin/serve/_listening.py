"""Where the service listens: a TCP port or a Unix socket; and whether others than this machine reach it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

# Of a Unix socket: its user and group, such as that of a proxy.
MODE = 0o660


@dataclass(frozen=True)
class Bound:
    """A bound socket: its address as a URL, and of a Unix socket the path and what tells the file made there."""

    socket: socket.socket
    address: str
    path: Path | None = None
    identity: tuple[int, int] | None = None

    def release(self) -> None:
        """Close it, and remove a Unix socket if it is still the one that was made: another service may have its own."""
        self.socket.close()
        if self.path is not None and _identity(self.path) == self.identity:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Address:
    """Where to listen: host and port, 0 for any that is free; or else the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8080
    uds: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        if self.uds is not None:
            return True
        return all(ipaddress.ip_address(found[4][0]).is_loopback for found in self._resolved())

    def bind(self) -> Bound:
        """Bind a socket. It refuses connections until a process that has loaded its models listens."""
        try:
            if self.uds is None:
                family, kind, protocol, _, where = self._resolved()[0]
                bound = _bound(socket.socket(family, kind, protocol), where)
                host, port = bound.getsockname()[:2]
                return Bound(bound, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            if self.uds.exists() and stat.S_ISSOCK(self.uds.stat().st_mode):
                _remove_if_dead(self.uds)
            before = os.umask(0o777 & ~MODE)
            try:
                bound = _bound(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(self.uds))
            finally:
                os.umask(before)
            return Bound(bound, f"unix:{self.uds}", self.uds, _identity(self.uds))
        except OSError as error:
            raise InputError(
                f"cannot listen on {self.uds or f'{self.host}:{self.port}'}: {error.strerror or error}. Give another "
                "--host, --port or --uds, or stop what listens there."
            ) from None

    def _resolved(self) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        try:
            return socket.getaddrinfo(  # type: ignore[return-value]
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (socket.gaierror, UnicodeError, OverflowError) as error:
            raise InputError(f"--host {self.host!r} is no address of this machine ({error}).") from None


def _bound(found: socket.socket, where: tuple[str, int] | str) -> socket.socket:
    """A socket bound to an address; it is closed where that fails."""
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
    except BaseException:
        found.close()
        raise
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that was made in its place; None where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    # An inode's number may be given again; the time of change is also that of other rights.
    return found.st_ino, found.st_mtime_ns


def _remove_if_dead(path: Path) -> None:
    """Remove the socket of a service that is gone; one that is answered stays."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
