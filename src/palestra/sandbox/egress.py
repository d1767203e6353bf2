"""The only way out of a sandbox: a proxy outside of it, which connects to the hosts that are allowed and to no others.

The agent listens on a port inside and passes that socket out; programs find it by `http_proxy` and `https_proxy`.
There is no route, no name service and no other socket. A host is a name (`pypi.org`), all names below one
(`*.python.org`), or an address, each with a port or not (`example.org:8080`; without: 80 and 443). Addresses of this
machine and of private networks are refused, whatever name leads there, unless that very address is allowed too.

What is inside a tunnel is not looked at: who may reach one host of a shared address can reach what else is served
there.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, UserError
from palestra.sandbox.link import Link
from palestra.sandbox.ports import Served, passed, relay, relay_answer

PORT = 3128
_HEAD_S, _CONNECT_S = 30.0, 15.0
_MOST_HEAD, _MOST_CONNECTIONS = 65_536, 64
_WEB = (80, 443)
_OWN = ("localhost", "127.0.0.1", "::1")


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_METHOD, _HTTP = re.compile(r"[A-Z]+"), re.compile(r"HTTP/1\.[01]")
_OF_PROXY = (b"host", b"connection", b"keep-alive", b"upgrade", b"proxy-connection", b"proxy-authorization")


@dataclass(frozen=True)
class Allowed:
    """One entry of an allow-list. Errors of `parse`: UserError."""

    name: str
    is_below: bool
    ports: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Allowed":
        name, port = _parted(text.strip().lower())
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
            raise UserError(f"egress={text!r}: {port!r} is no port")
        ports, address = (int(port),) if port else _WEB, _as_address(name)
        if address is not None:
            return cls(name=str(address), is_below=False, ports=ports)
        bare = name.removeprefix("*.").rstrip(".")
        if not _NAME.fullmatch(bare) or (name.startswith("*.") and _as_address(bare) is not None):
            raise UserError(
                f"egress={text!r} is no host; write pypi.org, *.pythonhosted.org, example.org:8080 or [::1]:80"
                " (names beyond ASCII in their xn-- form)"
            )
        return cls(name=bare, is_below=name.startswith("*."), ports=ports)

    def fits(self, host: str, port: int) -> bool:
        is_named = host.endswith("." + self.name) if self.is_below else host == self.name
        return is_named and port in self.ports


def _parted(text: str) -> tuple[str, str]:
    """Host and port; the brackets of an address are taken away."""
    if text.startswith("["):
        name, _, rest = text[1:].partition("]")
        return name, rest.removeprefix(":")
    if text.count(":") > 1:
        return text, ""
    name, _, port = text.partition(":")
    return name, port


@dataclass(frozen=True)
class Asked:
    """What a program asks of the proxy. `head` is what the host is told; empty for a tunnel."""

    host: str
    port: int
    head: bytes

    @classmethod
    def parse(cls, text: bytes) -> "Asked":
        """Of a whole head. Errors: ValueError."""
        line, *headers = text.removesuffix(b"\r\n\r\n").split(b"\r\n")
        if any(set(part) & set(b"\r\n\0") or part[:1] in (b" ", b"\t") for part in (line, *headers)):
            raise ValueError("a line that ends, or goes on, as none should")
        method, target, version = line.decode("ascii").split(" ")
        if not (_METHOD.fullmatch(method) and _HTTP.fullmatch(version)):
            raise ValueError(f"{method[:20]!r} and {version[:20]!r} are not known")
        is_tunnel = method == "CONNECT"
        url = urlsplit(f"//{target}" if is_tunnel else target)
        if not url.hostname or (not is_tunnel and url.scheme != "http"):
            raise ValueError("this is a proxy: give it a whole http:// address, or CONNECT")
        host, port = url.hostname.rstrip("."), url.port or (443 if is_tunnel else 80)
        address = _as_address(host)
        host = host if address is None else str(address)
        if is_tunnel:
            return cls(host=host, port=port, head=b"")
        where = (f"[{host}]" if ":" in host else host) + ("" if port == 80 else f":{port}")
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        kept = [header for header in headers if header.partition(b":")[0].strip().lower() not in _OF_PROXY]
        told = [f"{method} {path} {version}".encode(), f"Host: {where}".encode(), *kept, b"Connection: close"]
        return cls(host=host, port=port, head=b"\r\n".join([*told, b"", b""]))


class Egress:
    """Of one sandbox. `refused` are the hosts that were asked for in vain, the last hundred."""

    _server: asyncio.Server

    def __init__(self, allowed: Sequence[Allowed]):
        self._allowed = tuple(allowed)
        self._served = Served(self._serve, most=_MOST_CONNECTIONS)
        self.refused: list[str] = []

    @classmethod
    async def open(cls, link: Link, hosts: Sequence[str], *, backend: str) -> "Egress":
        """Errors: UserError, for a host that is none; UnsupportedError; OSError."""
        egress = cls([Allowed.parse(host) for host in hosts])
        listening = await passed(link, {"do": "listen", "port": PORT}, backend=backend)
        opening = asyncio.start_server(egress._served.accept, sock=listening, limit=_MOST_HEAD)
        egress._server = await within(_CONNECT_S, opening, waiting_for="the proxy of a sandbox")
        setting = link.call({"do": "environment", "env": egress._environment()})
        try:
            await within(_CONNECT_S, setting, waiting_for="a sandbox's agent")
        except BaseException:
            egress.close()
            raise
        return egress

    def _environment(self) -> dict[str, str]:
        """Programs talk to each other without the proxy."""
        allowed = {entry.name for entry in self._allowed}
        own = ",".join(name for name in _OWN if name not in allowed)
        where = f"http://127.0.0.1:{PORT}"
        names = {"http_proxy": where, "https_proxy": where, "no_proxy": own}
        return {**names, **{name.upper(): value for name, value in names.items()}}

    def close(self) -> None:
        self._server.close()
        self._served.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; over plain HTTP the connection ends with its answer."""
        try:
            head = await within(_HEAD_S, reader.readuntil(b"\r\n\r\n"), waiting_for="a request of a sandbox")
            asked = Asked.parse(head)
        except (ValueError, asyncio.LimitOverrunError) as error:
            _say(writer, 400, f"no request for a proxy: {error}")
            return
        where = f"{asked.host}:{asked.port}"
        if not self._allows(asked.host, asked.port):
            self._refuse(writer, where, "is not among the hosts that this sandbox may reach")
            return
        try:
            addresses = await self._addresses(asked.host, asked.port)
            if not addresses:
                self._refuse(writer, where, "is of this machine or a private network, which a sandbox may not reach")
                return
            far_reader, far_writer = await _connected(addresses, asked.port)
        except (OSError, DeadlineError) as error:
            _say(writer, 502, f"{where} is not reached: {error}")
            return
        try:
            if asked.head:
                far_writer.write(asked.head)
                await relay_answer(reader, writer, far_reader, far_writer)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await relay(reader, writer, far_reader, far_writer)
        finally:
            far_writer.close()

    def _refuse(self, writer: asyncio.StreamWriter, where: str, why: str) -> None:
        self.refused = [*self.refused[-99:], where]
        _say(writer, 403, f"{where} {why}")

    def _allows(self, host: str, port: int) -> bool:
        return any(entry.fits(host, port) for entry in self._allowed)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """Where to connect: what was looked at is what is used. Errors: OSError, DeadlineError."""
        if _as_address(host) is not None:
            return [host]
        resolving = asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = await within(_CONNECT_S, resolving, waiting_for=f"the address of {host}")
        addresses = [address for *_, where in found if (address := _as_address(str(where[0]))) is not None]
        return [str(address) for address in addresses if is_public(address) or self._allows(str(address), port)]


async def _connected(addresses: Sequence[str], port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first that answers. Errors: OSError, DeadlineError."""
    *others, last = addresses
    for address in others:
        try:
            opening = asyncio.open_connection(address, port)
            return await within(_CONNECT_S / len(addresses), opening, waiting_for=f"a connection to {address}")
        except (OSError, DeadlineError):
            pass  # the next
    return await within(_CONNECT_S, asyncio.open_connection(last, port), waiting_for=f"a connection to {last}")


def is_public(address: Address) -> bool:
    """Whether it is of neither this machine nor a network that is not everybody's, nor stands for one that may be."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address.is_site_local
    ):
        return False
    return not _is_of_this_machine(address)


def _is_of_this_machine(address: Address) -> bool:
    """Whoever connects to an address of his own has it himself. Nothing is sent."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
            return _as_address(probe.getsockname()[0]) == address
        except OSError:
            return False  # no way leads there


def _as_address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _say(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    body = text.encode("utf-8", "replace") + b"\n"
    writer.write(f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
