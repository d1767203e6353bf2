"""Calls that reach into the kernel: refused, or answered by a kernel of the sandbox's own."""

from palestra.sandbox.check import Bench, case, require
from palestra.sandbox.records import Isolation

_HEAD = """
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
arm = platform.machine() == "aarch64"
def call(x86, aarch64, *arguments):
    result = libc.syscall(aarch64 if arm else x86, *arguments)
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


async def _refused(bench: Bench, calls: dict[str, str]) -> str:
    """`calls`: expressions by name. Refused is any error."""
    lines = [f"print({name!r}, {expression}, flush=True)" for name, expression in calls.items()]
    done = await bench.python("\n".join([_HEAD, *lines]))
    seen = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    is_own = bench.isolation == Isolation.KERNEL
    came_through = [name for name in calls if seen.get(name, "none") in ("done", "none")]
    require(done.exit_code == 0 and (is_own or not came_through), f"{came_through} of {seen}; {done.stderr[-200:]}")
    return ", ".join(f"{name} {said}" for name, said in seen.items()) + (" (its own kernel)" if is_own else "")


@case(Isolation.PROCESS)
async def namespaces(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "unshare_user": "call(272, 97, 0x10000000)",
            "unshare_mount": "call(272, 97, 0x00020000)",
            "setns": "call(308, 268, os.open('/proc/self/ns/net', os.O_RDONLY), 0)",
            "clone_user": "call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)",
            "clone3": "call(435, 435, 0, 0)",
        },
    )


@case(Isolation.PROCESS)
async def mounts(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "mount_tmpfs": "call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None)",
            "mount_proc": "call(165, 40, b'proc', b'/tmp', b'proc', 0, None)",
            "bind": "call(165, 40, b'/', b'/tmp', None, 4096, None)",
            "umount": "call(166, 39, b'/tmp', 2)",
            "chroot": "call(161, 51, b'/tmp')",
            "pivot_root": "call(155, 41, b'/tmp', b'/tmp')",
            "fsopen": "call(430, 430, b'tmpfs', 0)",
            "open_tree": "call(428, 428, -100, b'/', 1)",
            "mknod": "call(133, 33, b'/tmp/disk', 0o60666, 0x0800)"
            " if not arm else call(0, 33, -100, b'/tmp/disk', 0o60666, 0x0800)",
        },
    )


@case(Isolation.PROCESS)
async def bpf(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "bpf": "call(321, 280, 0, (ctypes.c_char * 72)(1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1), 72)",
            "perf_event_open": "call(298, 241, 0, 0, -1, -1, 0)",
        },
    )


@case(Isolation.PROCESS)
async def io_uring(bench: Bench) -> str:
    return await _refused(bench, {"io_uring_setup": "call(425, 425, 8, (ctypes.c_char * 120)())"})


@case(Isolation.PROCESS)
async def keyrings(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "keyctl": "call(250, 219, 0, -3, 1)",
            "add_key": "call(248, 217, b'user', b'palestra', b'x', 1, -4)",
            "request_key": "call(249, 218, b'user', b'palestra', None, 0)",
        },
    )


@case(Isolation.PROCESS)
async def userfaultfd(bench: Bench) -> str:
    return await _refused(bench, {"userfaultfd": "call(323, 282, 1)"})


@case(Isolation.PROCESS)
async def tracing(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "ptrace_child": "(lambda pid: call(101, 117, 16, pid, 0, 0))(os.fork() or __import__('time').sleep(3))",
            "process_vm_readv": "call(310, 270, os.getpid(), 0, 0, 0, 0, 1)",
            "kcmp": "call(312, 272, os.getpid(), 1, 0, 0, 0)",
        },
    )


@case(Isolation.PROCESS)
async def rights(bench: Bench) -> str:
    """It has none, is nobody of this machine, and no program gives it more."""
    code = """
import os
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
found = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status.get(name, "0"), 16)]
if status.get("NoNewPrivs", "1").strip() != "1": found.append("NoNewPrivs")
for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try: act(); found.append("set")
    except OSError: pass
print(found, os.getuid())
"""
    done = await bench.python(code)
    require(done.stdout.startswith("[] ") and not done.stdout.startswith("[] 0"), done)
    forked = await bench.host.run_code(code)
    require(forked.stdout.startswith("[] ") and not forked.stdout.startswith("[] 0"), forked)
    setuid = await bench.box.exec("command -v su >/dev/null && echo | su -c id root; id -u", timeout_s=10)
    require("uid=0" not in setuid.stdout, setuid)
    return f"no capabilities, user {done.stdout.split()[-1]}"


@case(Isolation.PROCESS)
async def clocks_and_names(bench: Bench) -> str:
    return await _refused(
        bench,
        {
            "settimeofday": "call(164, 170, (ctypes.c_long * 2)(1, 0), None)",
            "sethostname": "call(170, 161, b'mine', 4)",
            "reboot": "call(169, 142, 0xfee1dead, 672274793, 0x89ABCDEF, 0)",
            "syslog": "call(103, 116, 3, ctypes.create_string_buffer(64), 64)",
            "swapon": "call(167, 224, b'/tmp/x', 0)",
            "init_module": "call(175, 105, b'x', 1, b'')",
            "kexec_load": "call(246, 104, 0, 0, None, 0)",
        },
    )
