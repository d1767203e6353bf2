"""The only way out of a sandbox: a proxy outside of it, which connects to the hosts that are allowed and to no others.

The agent listens on a port inside and passes that socket out; programs find it by `http_proxy` and `https_proxy`.
There is no route, no name service and no other socket. A host is a name (`pypi.org`), all names below one
(`*.python.org`), or either with a port (`example.org:8080`; without: 80 and 443). Addresses of this machine and its
networks are refused, whatever name leads there, unless the host is allowed as that very address.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from palestra.core.deadline import within
from palestra.core.errors import UserError
from palestra.sandbox.link import Link
from palestra.sandbox.ports import Served, passed, relay

PORT = 3128
_HEAD_S, _CONNECT_S = 30.0, 15.0
_MOST_HEAD = 65_536
_WEB = (80, 443)


@dataclass(frozen=True)
class Allowed:
    """One entry of an allow-list. Errors of `parse`: UserError."""

    name: str
    is_below: bool
    ports: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Allowed":
        name, colon, port = text.strip().lower().rpartition(":")
        if not colon or "]" in port:
            name, port = text.strip().lower(), ""
        if port and not (port.isdigit() and 0 < int(port) < 65_536):
            raise UserError(f"egress={text!r}: {port!r} is no port")
        bare = name.removeprefix("*.").strip("[]")
        if not bare or "*" in bare or "/" in bare:
            raise UserError(f"egress={text!r} is no host; write pypi.org, *.pythonhosted.org or example.org:8080")
        return cls(name=bare, is_below=name.startswith("*."), ports=(int(port),) if port else _WEB)

    def fits(self, host: str, port: int) -> bool:
        is_named = host.endswith("." + self.name) if self.is_below else host == self.name
        return is_named and port in self.ports


class Egress:
    """Of one sandbox. `refused` are the hosts that were asked for in vain, the last hundred."""

    _server: asyncio.Server

    def __init__(self, allowed: Sequence[Allowed]):
        self._allowed = tuple(allowed)
        self._served = Served(self._serve)
        self.refused: list[str] = []

    @classmethod
    async def open(cls, link: Link, hosts: Sequence[str], *, backend: str) -> "Egress":
        """Errors: UserError, for a host that is none; UnsupportedError; OSError."""
        egress = cls([Allowed.parse(host) for host in hosts])
        listening = await passed(link, {"do": "listen", "port": PORT}, backend=backend)
        egress._server = await asyncio.start_server(egress._served.accept, sock=listening, limit=_MOST_HEAD)
        where = f"http://127.0.0.1:{PORT}"
        names = {name: where for kind in ("http_proxy", "https_proxy") for name in (kind, kind.upper())}
        await within(_CONNECT_S, link.call({"do": "environment", "env": names}), waiting_for="a sandbox's agent")
        return egress

    def close(self) -> None:
        self._server.close()
        self._served.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; over plain HTTP the connection ends with its answer."""
        head = await within(_HEAD_S, reader.readuntil(b"\r\n\r\n"), waiting_for="a request of a sandbox")
        line, _, headers = head.partition(b"\r\n")
        method, target, version = line.decode("ascii", "replace").split(" ")
        is_tunnel = method == "CONNECT"
        url = urlsplit(f"//{target}" if is_tunnel else target)
        if (not is_tunnel and url.scheme != "http") or not url.hostname:
            _say(writer, 400, "this is a proxy: give it a whole address, or CONNECT")
            return
        host, port = url.hostname.lower().rstrip("."), url.port or (443 if is_tunnel else 80)
        address = await self._address(host, port)
        if address is None:
            self.refused = [*self.refused[-99:], f"{host}:{port}"]
            _say(writer, 403, f"{host}:{port} is not among the hosts that this sandbox may reach")
            return
        connecting = asyncio.open_connection(address, port)
        far_reader, far_writer = await within(_CONNECT_S, connecting, waiting_for=f"a connection to {host}:{port}")
        try:
            if is_tunnel:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = url._replace(scheme="", netloc="").geturl() or "/"
                kept = [h for h in headers.split(b"\r\n") if h and not _is_of_proxy(h)]
                request = [f"{method} {path} {version}".encode(), *kept, b"Connection: close", b"", b""]
                far_writer.write(b"\r\n".join(request))
            await relay(reader, writer, far_reader, far_writer)
        finally:
            far_writer.close()

    async def _address(self, host: str, port: int) -> str | None:
        """Where to connect; None if that is not allowed. The address that was looked at is the one that is used."""
        if not any(entry.fits(host, port) for entry in self._allowed):
            return None
        if _as_address(host) is not None:
            return host  # allowed as such
        resolving = asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = await within(_CONNECT_S, resolving, waiting_for=f"the address of {host}")
        for *_, where in found:
            address = _as_address(str(where[0]))
            if address is not None and address.is_global:
                return str(where[0])
        return None


def _as_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_of_proxy(header: bytes) -> bool:
    return header.partition(b":")[0].strip().lower() in (b"proxy-connection", b"connection", b"proxy-authorization")


def _say(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    body = text.encode() + b"\n"
    writer.write(f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
