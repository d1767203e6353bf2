"""The only way out of a sandbox, and the ways into it: what passes the proxy, what does not, and ports."""

import asyncio
import io
import ipaddress
import shutil
import socket
import ssl
import subprocess
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import distribution
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Host, Sandbox, SandboxGoneError
from palestra.sandbox import egress as egress_of
from palestra.sandbox.agent import _DIAL_S
from palestra.sandbox.egress import Allowed, Asked, Egress, is_public

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

GET = """
import sys, urllib.request, urllib.error
try:
    with urllib.request.urlopen(sys.argv[1], timeout=30) as answer: print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error: print(error.code, error.read().decode())
except OSError as error: print("failed", error)
"""


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with Host() as host:
        yield host


class Web:
    """A server of this machine that keeps what it was asked, and answers `hello`."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(20):
            try:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
                await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()


@asynccontextmanager
async def web(serve: Callable | None = None, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    served = Web()
    server = await asyncio.start_server(serve or served.serve, "127.0.0.1", 0, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()


async def got(box: Sandbox, address: str) -> str:
    await box.write("get.py", GET)
    return (await box.exec(["python3", "get.py", address], timeout_s=60)).stdout.strip()


# --- through the proxy


async def test_an_allowed_host_is_reached_and_told_who_it_is(host: Host):
    async with web() as server, await host.create(egress=[f"127.0.0.1:{server.port}"]) as box:
        assert await got(box, f"http://127.0.0.1:{server.port}/a/b?c=d") == "200 hello"
        (head,) = server.heads
    lines = head.split(b"\r\n")
    assert lines[0] == b"GET /a/b?c=d HTTP/1.1"
    assert [line for line in lines if line.lower().startswith(b"host:")] == [f"Host: 127.0.0.1:{server.port}".encode()]
    assert b"Connection: close" in lines


async def test_what_is_not_allowed_is_refused_by_403_and_never_asked(host: Host):
    async with web() as server, await host.create(egress=["127.0.0.1:1"]) as box:
        assert (await got(box, f"http://127.0.0.1:{server.port}/")).startswith(f"403 127.0.0.1:{server.port} is not")
        assert server.heads == []


async def test_a_name_that_leads_to_this_machine_is_refused(host: Host):
    """`localhost` is such a name, and the one that every machine has."""
    async with web() as server, await host.create(egress=[f"localhost:{server.port}"]) as box:
        assert "private network" in (told := await got(box, f"http://localhost:{server.port}/"))
        assert told.startswith("403")
        assert server.heads == []
    async with web() as server:  # negative control: it is reached if its address is allowed too
        async with await host.create(egress=[f"localhost:{server.port}", f"127.0.0.1:{server.port}"]) as box:
            assert await got(box, f"http://localhost:{server.port}/") == "200 hello"


async def test_no_proxy_is_for_what_is_inside(host: Host):
    async with await host.create(egress=["example.org"]) as box:
        names = (await box.exec("env | grep -i _proxy | sort")).stdout.split()
    assert names == sorted(
        [f"{n}=http://127.0.0.1:3128" for n in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")]
        + [f"{n}=localhost,127.0.0.1,::1" for n in ("no_proxy", "NO_PROXY")]
    )


def _certificate(directory: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    subprocess.run([*command, str(certificate)], check=True, capture_output=True, timeout=30)
    return key, certificate


async def test_a_tunnel_is_encrypted_to_the_end(host: Host, tmp_path: Path):
    key, certificate = _certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    async with web(tls=tls) as server, await host.create(egress=[f"127.0.0.1:{server.port}"]) as box:
        await box.write("get.py", GET)
        await box.write("ca.pem", certificate.read_bytes())
        command = ["python3", "get.py", f"https://127.0.0.1:{server.port}/secret"]
        trusting = await box.exec(command, env={"SSL_CERT_FILE": "/home/user/ca.pem"})
        doubting = await box.exec(command)
        refused = await box.exec(["python3", "get.py", f"https://127.0.0.1:{server.port + 1}/"])
    assert trusting.stdout.strip() == "200 hello", trusting
    assert "CERTIFICATE_VERIFY_FAILED" in doubting.stdout  # it is the host's own certificate that arrives
    assert "403" in refused.stdout
    assert len(server.heads) == 1


RAW = """
import socket, sys
s = socket.create_connection(("127.0.0.1", 3128), timeout=30)
s.sendall(bytes.fromhex(sys.argv[1]))
data = b""
while piece := s.recv(65536): data += piece
print(data.decode())
"""


async def raw(box: Sandbox, text: str) -> str:
    await box.write("raw.py", RAW)
    return (await box.exec(["python3", "raw.py", text.encode().hex()], timeout_s=60)).stdout


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
        "GET ftp://127.0.0.1:{port}/ HTTP/1.1\r\n\r\n",
        "nonsense\r\n\r\n",
        "GET http://127.0.0.1:x/ HTTP/1.1\r\n\r\n",
        "GET http://127.0.0.1:{port}/ HTTP/1.1\r\nA: b\nHost: evil\r\n\r\n",
        "GET http://127.0.0.1:{port}/ HTTP/1.1\r\nA: b\r\n Host: evil\r\n\r\n",
        "G\x00T http://127.0.0.1:{port}/ HTTP/1.1\r\n\r\n",
        "GET http://127.0.0.1:{port}/ HTTP/1.1\r\nA: " + "b" * 70_000 + "\r\n\r\n",
    ],
    ids=["no-address", "ftp", "nonsense", "port", "bare-newline", "folded", "zero", "endless"],
)
async def test_what_is_no_request_is_answered_by_400(host: Host, request_text: str):
    async with web() as server, await host.create(egress=[f"127.0.0.1:{server.port}"]) as box:
        told = await raw(box, request_text.replace("{port}", str(server.port)))
        assert told.startswith("HTTP/1.1 400") or (len(request_text) > 65_536 and not told)
        assert server.heads == []
        ask = f"GET http://127.0.0.1:{server.port}/ HTTP/1.1\r\nHost: evil.org\r\nX: y\r\n\r\n"
        assert (await raw(box, ask)).endswith("hello\n")
        assert b"evil.org" not in server.heads[0]
        assert b"X: y" in server.heads[0]


async def test_a_host_that_does_not_answer_is_told_by_502(host: Host):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with await host.create(egress=[f"127.0.0.1:{port}"]) as box:
            assert (await got(box, f"http://127.0.0.1:{port}/")).startswith(f"502 127.0.0.1:{port} is not reached")


async def test_a_name_that_nobody_knows_is_told_by_502(host: Host, monkeypatch: pytest.MonkeyPatch):
    async def unknown(name: str, port: int, **_: object) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)  # some networks take long to say so
    async with await host.create(egress=["*.invalid"]) as box:
        assert (await got(box, "http://a.invalid/")).startswith("502 a.invalid:80 is not reached")


async def test_a_sandbox_that_opens_connections_without_end_holds_a_bounded_number(host: Host):
    code = """
import select, socket
held = [socket.create_connection(("127.0.0.1", 3128), timeout=30) for _ in range(300)]
while (over := select.select(held, [], [], 2.0)[0]) or len(held) > MOST:
    for s in over:
        try: assert s.recv(1) == b""
        except ConnectionResetError: pass
        held.remove(s)
print(len(held))
"""
    async with await host.create(egress=["example.org"]) as box, await host.create(egress=["127.0.0.1:1"]) as other:
        await box.write("many.py", f"MOST = {egress_of._MOST_CONNECTIONS}\n{code}")
        done = await box.exec(["python3", "many.py"], timeout_s=60)
        assert int(done.stdout) == egress_of._MOST_CONNECTIONS, done
        assert (await got(other, "http://127.0.0.1:2/")).startswith("403")  # others are served


# --- around the proxy


AROUND = """
import os, socket
def tried(name, act):
    try: print(name, act() or "passed")
    except OSError as error: print(name, "fails")
def tcp(where):
    with socket.create_connection(where, timeout=2): pass
def udp(where):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.sendto(b"x", where)
PORT = %d
tried("loopback", lambda: tcp(("127.0.0.1", PORT)))
tried("own", lambda: tcp((%r, PORT)))
tried("far", lambda: tcp(("1.1.1.1", 443)))
tried("dns", lambda: udp(("1.1.1.1", 53)))
tried("name", lambda: socket.getaddrinfo("example.org", 80))
tried("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
tried("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
tried("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0palestra-test-%d"))
"""


async def test_nothing_else_gets_out(host: Host):
    own = egress_of._as_address(_own_address())
    async with web() as server, await host.create(egress=[f"127.0.0.1:{server.port}"]) as box:
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(f"\0palestra-test-{server.port}")
            abstract.listen()
            await box.write("around.py", AROUND % (server.port, str(own), server.port))
            done = await box.exec(["python3", "around.py"], timeout_s=40)
        names = ("loopback", "own", "far", "dns", "name", "raw", "packet", "abstract")
        assert done.stdout.splitlines() == [f"{name} fails" for name in names], done
        assert server.heads == []


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


async def test_negative_control_without_the_wall_of_the_network_it_gets_out():
    from palestra.sandbox import Options

    async with web() as server, Host(Options(without=("network",))) as open_host, await open_host.create() as box:
        assert await got(box, f"http://127.0.0.1:{server.port}/") == "200 hello"


# --- pip through the proxy


def _tiny_wheel() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("tiny_net.py", "VALUE = 11\n")
        wheel.writestr("tiny_net-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-net\nVersion: 1.0\n")
        wheel.writestr("tiny_net-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_net-1.0.dist-info/RECORD", "")
    return made.getvalue()


async def _serve_index(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(20):
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        link = b'<a href="/tiny_net-1.0-py3-none-any.whl">tiny_net-1.0-py3-none-any.whl</a>'
        body, kind = (_tiny_wheel(), b"application/zip") if path.endswith(b".whl") else (link, b"text/html")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body)
        await writer.drain()
        writer.close()


async def test_pip_in_a_sandbox_installs_from_an_index_that_is_allowed(host: Host):
    """An index of this machine: that of the world is not everywhere."""
    async with web(_serve_index) as index, await host.create(egress=[f"127.0.0.1:{index.port}"]) as box:
        packed = io.BytesIO()
        source = Path(str(distribution("pip").locate_file("pip")))  # imported, it quarrels with setuptools
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(source.rglob("*")):
                if file.is_file() and file.suffix != ".pyc":
                    archive.write(file, Path("pip") / file.relative_to(source))
        await box.write("pip.zip", packed.getvalue())
        assert (await box.exec(["python3", "-m", "zipfile", "-e", "pip.zip", "tools"], timeout_s=60)).status == "ok"
        install = ["python3", "-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
        where = ["--index-url", f"http://127.0.0.1:{index.port}/simple", "--target", "site", "tiny-net"]
        done = await box.exec([*install, *where], env={"PYTHONPATH": "tools"}, timeout_s=90)
        assert done.status == "ok", done
        used = await box.exec(["python3", "-c", "import tiny_net; print(tiny_net.VALUE)"], env={"PYTHONPATH": "site"})
        assert used.stdout == "11\n"


# --- what is allowed, by name


@pytest.mark.parametrize(
    ("entry", "fitting", "others"),
    [
        ("pypi.org", ["pypi.org:443", "pypi.org:80"], ["pypi.org:22", "a.pypi.org:443", "xpypi.org:443", "org:443"]),
        ("*.python.org", ["a.python.org:443", "a.b.python.org:80"], ["python.org:443", "xpython.org:443"]),
        ("Example.ORG:8080", ["example.org:8080"], ["example.org:80"]),
        ("[::1]:80", ["::1:80"], ["::1:443"]),
        ("::1", ["::1:443"], ["::1:1"]),
        ("0:0::0001", ["::1:443"], ["::2:443"]),
    ],
)
def test_an_entry_fits_what_it_says(entry: str, fitting: list[str], others: list[str]):
    allowed = Allowed.parse(entry)
    assert all(allowed.fits(h, int(p)) for h, _, p in (one.rpartition(":") for one in fitting))
    assert not any(allowed.fits(h, int(p)) for h, _, p in (one.rpartition(":") for one in others))


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "a b", "http://x.org", "x.org/y", "x:0", "x:65536", "x:a", "*.1.2.3.4"]
)
def test_what_is_no_host_is_an_error_of_its_author(entry: str):
    with pytest.raises(UserError, match="egress="):
        Allowed.parse(entry)


@pytest.mark.parametrize("text", ["127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1"])
async def test_other_spellings_of_an_address_are_names_that_lead_there(text: str):
    asked = Asked.parse(f"CONNECT {text}:443 HTTP/1.1\r\n\r\n".encode())
    egress = Egress([Allowed.parse(text)])
    assert egress._allows(asked.host, asked.port)
    assert await egress._addresses(asked.host, asked.port) == []


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1:2::",
        "fe80::1",
        "fc00::1",
        "fec0::1",
        "::127.0.0.1",
        "ff02::1",
    ],
)
def test_addresses_of_this_machine_and_private_networks_are_not_public(text: str):
    assert not is_public(ipaddress.ip_address(text))


def test_public_addresses_are_public():
    assert is_public(ipaddress.ip_address("1.1.1.1"))
    assert is_public(ipaddress.ip_address("2606:4700:4700::1111"))


def test_an_address_of_this_machine_is_known_as_such_whatever_its_kind():
    assert egress_of._is_of_this_machine(ipaddress.ip_address(_own_address()))
    assert egress_of._is_of_this_machine(ipaddress.ip_address("127.0.0.1"))
    assert not egress_of._is_of_this_machine(ipaddress.ip_address("1.1.1.1"))


# --- ports


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (self.path * 1000).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
print("listening", flush=True)
server.serve_forever()
"""


async def serving(box: Sandbox) -> None:
    await box.write("server.py", SERVER)
    server = await box.background(["python3", "server.py"])
    assert await server.read() == (b"listening\n", b"")


async def asked(host: str, port: int, path: str) -> bytes:
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return (await reader.read()).partition(b"\r\n\r\n")[2]
        finally:
            writer.close()


async def test_a_server_inside_answers_many_at_once(host: Host):
    async with await host.create() as box:
        await serving(box)
        where = await box.expose_port(8000)
        assert where.host == "127.0.0.1"
        assert await box.expose_port(8000) == where
        answers = await asyncio.gather(*(asked(where.host, where.host_port, f"/{n}") for n in range(40)))
        assert answers == [f"/{n}".encode() * 1000 for n in range(40)]


async def test_two_who_expose_at_once_get_one_port(host: Host):
    async with await host.create() as box:
        await serving(box)
        first, second = await asyncio.gather(box.expose_port(8000), box.expose_port(8000))
        assert first == second


async def test_nobody_listens(host: Host):
    async with await host.create() as box:
        with pytest.raises(ConnectionRefusedError):
            await box.expose_port(8001)
        assert (await box.exec("echo alive")).stdout == "alive\n"


async def test_a_server_that_accepts_nobody_holds_up_nobody_else(host: Host):
    """Its queue is full after two: who comes then waits, and the agent does not."""
    code = """
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 8000)); s.listen(0); print("listening", flush=True); time.sleep(60)
"""
    async with await host.create() as box:
        await box.write("deaf.py", code)
        server = await box.background(["python3", "deaf.py"])
        assert await server.read() == (b"listening\n", b"")
        where = await box.expose_port(8000)
        async with asyncio.timeout(20):
            pairs = [await asyncio.open_connection(where.host, where.host_port) for _ in range(6)]
            await asyncio.sleep(0.2)  # until they have been dialled
            began = time.monotonic()
            done = await box.exec("echo alive", timeout_s=20)
            took_s = time.monotonic() - began
        for _, writer in pairs:
            writer.close()
        assert done.stdout == "alive\n"
        assert took_s < _DIAL_S  # an agent that waited for the first of them alone would take longer


@pytest.mark.parametrize("port", [0, 70_000, -1, 10**30])
async def test_a_number_that_is_no_port_harms_nobody(host: Host, port: int):
    async with await host.create() as box:
        with pytest.raises((OSError, ValueError)):
            await box.expose_port(port)
        assert (await box.exec("echo alive")).stdout == "alive\n"


async def test_the_port_closes_with_the_sandbox(host: Host):
    box = await host.create()
    await serving(box)
    where = await box.expose_port(8000)
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(where.host, where.host_port)
        await box.delete()
        try:
            assert await reader.read() == b""  # who is connected is told
        except ConnectionError:
            pass
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(where.host, where.host_port)
    with pytest.raises(SandboxGoneError):
        await box.expose_port(8000)


async def test_a_server_that_ends_closes_what_it_had_and_refuses_more(host: Host):
    async with await host.create() as box:
        await serving(box)
        where = await box.expose_port(8000)
        assert await asked(where.host, where.host_port, "/x") == b"/x" * 1000
        await (await box.processes())[0].kill()
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(where.host, where.host_port)
            assert await reader.read() == b""
            writer.close()
