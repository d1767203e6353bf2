"""Walls that the Linux kernel builds, called without any binary: namespaces, mounts, seccomp, landlock, capabilities.

Standard library only: the process that uses this shares its memory with sandboxes. Every function raises OSError where
the kernel refuses.
"""

import ctypes
import fcntl
import os
import platform
import resource
import socket
import struct

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000
NEWUSER, NEWPID, NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
_NEWTIME = 0x80

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2

_SET_PDEATHSIG, _SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _SET_CHILD_SUBREAPER = 1, 4, 24, 38, 36
_SET_SECCOMP, _SECCOMP_FILTER = 22, 2

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock
_SIGCHLD = 17
_ARM = platform.machine() == "aarch64"


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def fork_into(namespaces: int) -> int:
    """As `os.fork`, with the child in fresh namespaces; that of processes makes it their first.

    The C library is not asked, and does not know the child's number as that of its first thread; what the child forks
    in the usual way is as any other.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    result = _python.syscall(_NUMBERS["clone"], ctypes.c_ulong(namespaces | _SIGCHLD), None, None, None, None)
    error = ctypes.get_errno()
    if result == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if result < 0:
        raise OSError(error, f"clone: {os.strerror(error)}")
    return result


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount {source} on {target}")


def bind(source: str, target: str, *, flags: int = RDONLY | NOSUID | NODEV) -> None:
    """Show `source` at `target` as well. Flags that the source's own mount has are kept: the kernel asks for that."""
    mount(source, target, flags=BIND)
    has = os.statvfs(source).f_flag
    locked = has & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)  # the same bits as those of mount
    times = (has & os.ST_NOATIME) | (has & os.ST_NODIRATIME) | ((1 << 21) if has & os.ST_RELATIME else 0)
    mount("none", target, flags=REMOUNT | BIND | flags | locked | times)


def enter_root(directory: str) -> None:
    """Make `directory`, a mount, the root of this mount namespace; what was the root is gone."""
    os.chdir(directory)
    _checked(_libc.syscall(_NUMBERS["pivot_root"], b".", b"."), f"pivot_root {directory}")
    _checked(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def _prctl(option: int, value: int, what: str) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def set_dumpable(is_dumpable: bool) -> None:
    """Whether processes of the same user may trace this one and read what /proc has about it."""
    _prctl(_SET_DUMPABLE, int(is_dumpable), "prctl(PR_SET_DUMPABLE)")


def die_with_parent(signal_number: int = 9) -> None:
    """Get that signal when the parent ends. It is gone again when the user changes."""
    _prctl(_SET_PDEATHSIG, signal_number, "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    _prctl(_SET_CHILD_SUBREAPER, 1, "prctl(PR_SET_CHILD_SUBREAPER)")


def set_no_new_privileges() -> None:
    _prctl(_SET_NO_NEW_PRIVS, 1, "prctl(PR_SET_NO_NEW_PRIVS)")


def drop_capabilities() -> None:
    """All of them, and for ever: none is left to gain back."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # above the last that this kernel knows; or already without the right, and with an empty set to gain
    header = struct.pack("=Ii", 0x2008_0522, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def set_hostname(name: str) -> None:
    _checked(_libc.sethostname(name.encode(), len(name)), "sethostname")


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up_and_running = 0x1 | 0x40
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", up_and_running))  # SIOCSIFFLAGS


def limit(*, files: int, processes: int | None, file_bytes: int) -> None:
    """Per process, and inherited. `processes` counts those of this user in this user namespace."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_MEMLOCK: 1 << 20,
        resource.RLIMIT_MSGQUEUE: 1 << 19,
        resource.RLIMIT_SIGPENDING: 1024,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    if processes is not None:
        wanted[resource.RLIMIT_NPROC] = processes
    for kind, value in wanted.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


# --- seccomp

_X86 = """
clone=56 socket=41 ioctl=16 clone3=435 ptrace=101 process_vm_readv=310 process_vm_writev=311 kcmp=312
pidfd_getfd=438 mount=165 umount2=166 pivot_root=155 chroot=161 open_tree=428 move_mount=429 fsopen=430 fsconfig=431
fsmount=432 fspick=433 mount_setattr=442 statmount=457 listmount=458 setns=308 unshare=272 bpf=321
perf_event_open=298 io_uring_setup=425 io_uring_enter=426 io_uring_register=427 userfaultfd=323 keyctl=250
add_key=248 request_key=249 init_module=175 finit_module=313 delete_module=176 kexec_load=246 kexec_file_load=320
reboot=169 swapon=167 swapoff=168 syslog=103 acct=163 quotactl=179 quotactl_fd=443 settimeofday=164
clock_settime=227 clock_adjtime=305 adjtimex=159 sethostname=170 setdomainname=171 iopl=172 ioperm=173
modify_ldt=154 lookup_dcookie=212 name_to_handle_at=303 open_by_handle_at=304 fanotify_init=300 vhangup=153
memfd_secret=447 migrate_pages=256 move_pages=279 process_madvise=440 memfd_create=319 shmget=29 msgget=68
landlock_create_ruleset=444 landlock_add_rule=445 landlock_restrict_self=446 open_tree_attr=467 listns=470
semget=64 socketpair=53 prlimit64=302 setpriority=141 sched_setparam=142 sched_setscheduler=144 sched_setaffinity=203
sched_setattr=314
"""
_AARCH64 = """
clone=220 socket=198 ioctl=29 clone3=435 ptrace=117 process_vm_readv=270 process_vm_writev=271 kcmp=272
pidfd_getfd=438 mount=40 umount2=39 pivot_root=41 chroot=51 open_tree=428 move_mount=429 fsopen=430 fsconfig=431
fsmount=432 fspick=433 mount_setattr=442 statmount=457 listmount=458 setns=268 unshare=97 bpf=280
perf_event_open=241 io_uring_setup=425 io_uring_enter=426 io_uring_register=427 userfaultfd=282 keyctl=219
add_key=217 request_key=218 init_module=105 finit_module=273 delete_module=106 kexec_load=104 kexec_file_load=294
reboot=142 swapon=224 swapoff=225 syslog=116 acct=89 quotactl=60 quotactl_fd=443 settimeofday=170 clock_settime=112
clock_adjtime=266 adjtimex=171 sethostname=161 setdomainname=162 lookup_dcookie=18 name_to_handle_at=264
open_by_handle_at=265 fanotify_init=262 vhangup=58 memfd_secret=447 migrate_pages=238 move_pages=239
process_madvise=440 memfd_create=279 shmget=194 msgget=186 landlock_create_ruleset=444 landlock_add_rule=445
landlock_restrict_self=446 open_tree_attr=467 listns=470 semget=190 socketpair=199 prlimit64=261 setpriority=140
sched_setparam=118 sched_setscheduler=119 sched_setaffinity=122 sched_setattr=274
"""
_NUMBERS = {name: int(n) for name, n in (w.split("=") for w in (_AARCH64 if _ARM else _X86).split())}
_ARCHITECTURE = 0xC000_00B7 if _ARM else 0xC000_003E
_X32 = 0x4000_0000

_NO_SUCH_CALL = ("clone3", "memfd_secret", "io_uring_setup", "io_uring_enter", "io_uring_register")
_UNCOUNTED = ("memfd_create", "shmget", "msgget", "semget")
OF_OTHERS = ("prlimit64", "sched_setparam", "sched_setscheduler", "sched_setaffinity", "sched_setattr")
"""What one process may set of another of its user; their first argument is that one."""
_LOOKED_AT = {"clone", "socket", "socketpair", "ioctl", "setpriority", *OF_OTHERS, *_UNCOUNTED}
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
NAMESPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | _NEWTIME
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into another's terminal

_LOAD, _EQUALS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_NR, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97


def refused_calls(*, uncounted_memory: bool = True) -> dict[str, int]:
    """Those that are refused whatever their arguments are, and the error that they answer."""
    refused = {name: _EPERM for name in _NUMBERS if not name.startswith("landlock_") and name not in _LOOKED_AT}
    refused.update(dict.fromkeys(_NO_SUCH_CALL, _ENOSYS))
    if not uncounted_memory:
        refused.update(dict.fromkeys(_UNCOUNTED, _ENOSYS))
    return refused


def seccomp_program(*, no_network: bool = False, uncounted_memory: bool = True, is_first_ours: bool = True) -> bytes:
    """A classic BPF program. Calls that reach into the kernel's rarely used parts, or out of the sandbox, are refused.

    `clone3` answers ENOSYS, so that libraries use `clone`, whose flags can be looked at.
    `no_network`: no sockets but pairs, where there is no network namespace; those with a path lead to services here.
    `uncounted_memory`: allow memory that belongs to no process (memfd, System V), which needs a cgroup to count it.
    `is_first_ours`: process 1 is the agent, whose limits and share of processors are not the programs' to set.
    """
    refused = refused_calls(uncounted_memory=uncounted_memory)
    families = () if no_network else FAMILIES
    code = [(_LOAD, 0, 0, _ARCH), (_EQUALS, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for name, error in refused.items():
        code += _where(name, [(_RETURN, 0, 0, _ERRNO | error)])
    new_namespace = [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, NAMESPACES)]
    code += _where("clone", [*new_namespace, (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)])
    known = [(_EQUALS, len(families) - i, 0, int(family)) for i, family in enumerate(families)]
    refusal = [(_RETURN, 0, 0, _ERRNO | _EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    code += _where("socket", [(_LOAD, 0, 0, _FIRST), *known, *refusal])
    code += _where("socketpair", [(_LOAD, 0, 0, _FIRST), (_EQUALS, 1, 0, int(socket.AF_UNIX)), *refusal])
    code += _first_is_left_alone() if is_first_ours else []
    types = [(_LOAD, 0, 0, _SECOND), (_EQUALS, 1, 0, TERMINAL_INPUT[0]), (_EQUALS, 0, 1, TERMINAL_INPUT[1])]
    code += _where("ioctl", [*types, (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)])
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in [*code, (_RETURN, 0, 0, _ALLOW)])


def _first_is_left_alone() -> list[tuple[int, int, int, int]]:
    """Process 1; a priority is set for single processes only, since it may belong to a group's or a user's."""
    if_first = [(_EQUALS, 0, 1, 1), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = [step for name in OF_OTHERS for step in _where(name, [(_LOAD, 0, 0, _FIRST), *if_first])]
    if_process = [(_LOAD, 0, 0, _FIRST), (_EQUALS, 0, 2, os.PRIO_PROCESS)]
    return code + _where("setpriority", [*if_process, (_LOAD, 0, 0, _SECOND), *if_first])


def _where(name: str, block: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`block`, which ends in a return, for this call alone."""
    return [(_EQUALS, 0, len(block), _NUMBERS[name]), *block]


class Seccomp:
    """A program where the kernel reads it; made before a fork, so that the child need not."""

    def __init__(self, program: bytes):
        self._text = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(self._text))
        self._header = ctypes.create_string_buffer(header, len(header))

    def install(self) -> None:
        """For this process and all that come from it. Needs `set_no_new_privileges` before."""
        _checked(_libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, self._header, 0, 0), "prctl(PR_SET_SECCOMP)")


# --- landlock

_READ_FILE, _READ_DIR, _EXECUTE, _IOCTL_DEV = 1 << 2, 1 << 3, 1 << 0, 1 << 15
_SCOPE_ABSTRACT, _SCOPE_SIGNAL = 1, 2


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(_libc.syscall(_NUMBERS["landlock_create_ruleset"], None, 0, 1), 0)


def landlock(*, readable: list[str], writable: list[str], no_network: bool = False) -> int:
    """Files beyond these trees are out of reach, for this process and all that come from it; returns the version used.

    Needs `set_no_new_privileges` before. `no_network`: no TCP either (version 4), and neither abstract sockets nor
    signals of processes outside (version 6).
    """
    version = landlock_version()
    if version == 0:
        return 0
    all_rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network = 3 if no_network and version >= 4 else 0
    scoped = _SCOPE_ABSTRACT | _SCOPE_SIGNAL if no_network and version >= 6 else 0
    rules = struct.pack("=QQQ", all_rights, network, scoped)
    length = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _checked(_libc.syscall(_NUMBERS["landlock_create_ruleset"], rules, length, 0), "landlock_create_ruleset")
    try:
        for paths, rights in ((readable, _READ_FILE | _READ_DIR | _EXECUTE), (writable, all_rights)):
            for path in paths:
                _allow_beneath(ruleset, path, rights & all_rights)
        _checked(_libc.syscall(_NUMBERS["landlock_restrict_self"], ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return version


def _allow_beneath(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # there is nothing to allow
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _EXECUTE | 2 | 1 << 14 | _IOCTL_DEV  # what a file can have: also write, truncate
        rule = struct.pack("=Qi", rights, place)
        _checked(_libc.syscall(_NUMBERS["landlock_add_rule"], ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(place)
