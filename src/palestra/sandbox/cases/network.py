"""The way out: there is none."""

import asyncio
import secrets
import socket

from palestra.sandbox.check import Bench, case, require
from palestra.sandbox.records import Isolation


@case(Isolation.PROCESS)
async def tcp(bench: Bench) -> str:
    """Neither a server of this machine's loopback, nor one of its other addresses."""
    heard: list[object] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(reader)
        writer.close()

    server = await asyncio.start_server(accept, "0.0.0.0", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        addresses = ["127.0.0.1", _own_address(), "169.254.169.254"]
        code = f"""
import socket
for where in {addresses!r}:
    s = None
    try: s = socket.socket(); s.settimeout(1); s.connect((where, {port})); print("connected", where)
    except OSError as error: print(error.errno or error, where)
"""
        done = await bench.python(code)
    finally:
        server.close()
    require(not heard and "connected" not in done.stdout and done.exit_code == 0, f"{done}; heard {len(heard)}")
    return done.stdout.replace("\n", "; ").strip("; ")


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))  # sends nothing: the kernel only chooses an address
            return str(any_socket.getsockname()[0])
        except OSError:
            return "127.0.0.2"


@case(Isolation.PROCESS)
async def metadata_service(bench: Bench) -> str:
    code = """
import socket
try: s = socket.socket(); s.settimeout(1); s.connect(("169.254.169.254", 80)); print("connected")
except OSError as error: print(error.errno or error)
"""
    done = await bench.python(code)
    require("connected" not in done.stdout and done.exit_code == 0, done)
    return f"refused: {done.stdout.strip()}"


@case(Isolation.PROCESS)
async def udp(bench: Bench) -> str:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.setblocking(False)
    port = receiver.getsockname()[1]
    code = f"""
import socket
for where in (("127.0.0.1", {port}), ("8.8.8.8", 53)):
    try: s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"x", where); print("sent")
    except OSError as error: print(error.errno)
"""
    try:
        done = await bench.python(code)
        await asyncio.sleep(0.1)
        try:
            heard = receiver.recv(10)
        except BlockingIOError:
            heard = b""
    finally:
        receiver.close()
    require(not heard and done.exit_code == 0, f"heard {heard!r}; {done}")
    return "nothing arrives"


@case(Isolation.NAMESPACES)
async def names(bench: Bench) -> str:
    done = await bench.python(
        "import socket\ntry: print(socket.gethostbyname('example.org'))\nexcept OSError: print('none')"
    )
    require(done.stdout == "none\n", done)
    return "no name is resolved"


@case(Isolation.PROCESS)
async def abstract_socket(bench: Bench) -> str:
    name = f"\0palestra-check-{secrets.token_hex(6)}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen(1)
    server.setblocking(False)
    code = f"""
import socket
try: socket.socket(socket.AF_UNIX).connect({name!r}); print("connected")
except OSError as error: print(error.errno)
"""
    try:
        done = await bench.python(code)
    finally:
        server.close()
    require("connected" not in done.stdout and done.exit_code == 0, done)
    return f"refused: {done.stdout.strip()}"


@case(Isolation.PROCESS)
async def vsock(bench: Bench) -> str:
    code = """
import socket
for where in ((2, 1024), (1, 1024), (0, 1)):
    try: s = socket.socket(40, socket.SOCK_STREAM); s.settimeout(1); s.connect(where); print("connected")
    except OSError as error: print(error.errno)
    except Exception as error: print(type(error).__name__)
"""
    done = await bench.python(code)
    require("connected" not in done.stdout and done.exit_code == 0, done)
    return f"refused: {done.stdout.split()[0]}"


@case(Isolation.PROCESS)
async def netlink(bench: Bench) -> str:
    code = """
import socket
for kind in (0, 9, 12, 15, 16):
    try: socket.socket(16, socket.SOCK_RAW, kind); print("opened", kind)
    except OSError as error: print(error.errno)
try: socket.socket(17, socket.SOCK_RAW); print("packet")
except OSError as error: print(error.errno)
"""
    done = await bench.python(code)
    allowed = bench.isolation == Isolation.KERNEL
    require("packet" not in done.stdout and (allowed or "opened" not in done.stdout) and done.exit_code == 0, done)
    return done.stdout.replace("\n", " ").strip()


@case(Isolation.NAMESPACES)
async def loopback(bench: Bench) -> str:
    """Its own works: programs that talk to themselves do so."""
    code = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: server.accept()[0].sendall(b"hello")).start()
print(socket.create_connection(server.getsockname()).recv(5).decode())
"""
    done = await bench.python(code)
    require(done.stdout == "hello\n", done)
    return "works"
