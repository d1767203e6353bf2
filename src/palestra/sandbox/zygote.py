"""The zygote of the backend `local`: a small Python process in a read-only root, which forks sandboxes.

Consumes: messages on a SOCK_SEQPACKET pair, `start` with the sandbox's descriptors, `kill`. Produces: `ended`. Waits
for: messages, and ends of its children. Ends when: that pair is closed, or whoever started it is gone; all sandboxes
end with it, since it is the first process of a namespace that they are in.

Each sandbox is one fork away, into fresh namespaces, of which it is the first process. It joins the cgroups, mounts
what is private, becomes a user of its own, gives up every right, and becomes the agent, or an interpreter that waits
for one program. Standard library only, started with `-I -S` and an empty environment: nothing of the host's is in the
memory that sandboxes share with it.
"""

import builtins
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys

from palestra.sandbox import agent as agent_of
from palestra.sandbox import kernel

HOME = "/home/user"
_UID = 1000  # in there
_FRESH = kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
_MOST_MESSAGE = 65_536
_CLOSE_ON_EXEC = 0x4000_0000  # MSG_CMSG_CLOEXEC
_FIRST_FREE, _MOST_FDS = 4, 1024
DEVICES = ("null", "zero", "full", "random", "urandom")
_KEPT = []
ETC = {
    "passwd": "root:x:0:0:root:/:/sbin/nologin\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
    "group": "root:x:0:\nuser:x:1000:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "resolv.conf": "",
}


def main(fd):
    """`plan`, the first message, says what the root is made of. See `local.Plan`."""
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    plan = json.loads(link.recv(_MOST_MESSAGE))
    try:
        if plan["has_own_python"]:
            bring_along()
        enter_own_root(plan, link)
        if not plan["has_own_python"]:
            sys.path += [place for place in plan["path"] if place not in sys.path]
            preload(plan["preload"])
    except ImportError as error:
        link.send(json.dumps({"missing": str(error)}).encode())
        raise SystemExit(1) from None
    except Exception as error:
        link.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        raise SystemExit(1) from None
    os.environ.update(plan["environment"])
    plan["ours"] = [name for name in sys.modules if name.partition(".")[0] == "palestra"]
    plan["path"] = [HOME, *plan["path"]]
    sys.argv[:] = ["main.py"]
    del sys.path[:1]
    sys.path_importer_cache.clear()
    link.send(b'{"ready":true}')
    Zygote(link, plan).serve()


# --- the root that all sandboxes share


def enter_own_root(plan, link):
    """Errors: OSError, where the kernel refuses; then this backend cannot work here."""
    is_root = plan["is_root"]
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(kernel.NEWNS | kernel.NEWPID | (0 if is_root else kernel.NEWUSER))
    if not is_root:
        proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        map_user(proc, 0, uid, gid)
        os.close(proc)
    kernel.mount("none", "/", flags=kernel.REC | kernel.PRIVATE)
    become_first(link)
    fill_root(plan)
    kernel.mount("proc", plan["directory"] + "/proc", "proc", kernel.NOSUID | kernel.NODEV | kernel.NOEXEC)
    kernel.enter_root(plan["directory"])
    if plan["read_only"]:
        kernel.mount("none", "/", flags=kernel.REMOUNT | kernel.BIND | kernel.RDONLY | kernel.NOSUID | kernel.NODEV)


def become_first(link):
    """The first process of a namespace that has all sandboxes: with it, the kernel ends them, whatever they did about
    the signal that tells of a parent's end. Whoever was started stays behind, and ends with it.
    """
    kernel.die_with_parent()
    pid = os.fork()
    if pid != 0:
        link.close()
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent()


def fill_root(plan):
    top = plan["directory"]
    kernel.mount("tmpfs", top, "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=0755,size=4m")
    os.umask(0o022)
    for name in ("proc", "tmp", "dev/shm", "etc", "box", "root", "run", "var/tmp", HOME.lstrip("/")):
        os.makedirs(os.path.join(top, name))
    for source, target in plan["binds"]:
        _bind_into(top, source, target)
    for target, link in plan["links"]:
        place = top + target
        if not os.path.lexists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(link, place)
    for name in DEVICES:
        _bind_into(top, "/dev/" + name, "/dev/" + name, flags=kernel.NOSUID)
    for name, text in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(text, top + "/dev/" + name)
    for name, text in {**ETC, **plan["etc"]}.items():
        place = top + "/etc/" + name
        if not os.path.lexists(place) and os.access(top + "/etc", os.W_OK):  # an image's own is read-only
            with open(place, "w", encoding="utf-8") as file:
                file.write(text)
    for place in plan["hidden"]:
        if os.path.isdir(top + place):
            kernel.mount("tmpfs", top + place, "tmpfs", kernel.RDONLY | kernel.NOSUID | kernel.NODEV, "size=4k")


def _bind_into(top, source, target, flags=kernel.RDONLY | kernel.NOSUID | kernel.NODEV):
    place = top + target
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not os.path.lexists(place):
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.bind(source, place, flags=flags)


def map_user(proc, inside, outside_uid, outside_gid):
    """`proc` is /proc as it was, which can be written."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {outside_uid} 1"),
        ("gid_map", f"{inside} {outside_gid} 1"),
    ):
        fd = os.open("self/" + name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def bring_along():
    """What is imported later, before an image's files are around us: no module comes from those."""
    import select  # noqa: F401
    import shutil  # noqa: F401
    import traceback  # noqa: F401

    sys.path.clear()
    for name in ("encodings", "importlib", "json", "palestra", "palestra.sandbox"):
        sys.modules[name].__path__ = []


def preload(modules):
    """What every interpreter in here has imported already. Errors: ImportError."""
    import linecache
    import site
    import threading
    import traceback  # noqa: F401

    threading.main_thread()
    linecache.checkcache()
    site.setquit()
    site.setcopyright()
    site.sethelper()
    for name in modules:
        importlib.import_module(name)


# --- the loop


class Zygote:
    def __init__(self, link, plan):
        self._link, self._plan = link, plan
        self._numbers, self._pids = {}, {}  # of sandboxes by their first processes, and the other way round
        self._watched, self._killed = {}, set()
        self._selector = selectors.DefaultSelector()
        self._seccomp = {
            (counted, is_program): kernel.Seccomp(
                kernel.seccomp_program(uncounted_memory=counted, is_first_ours=not is_program)
            )
            for counted in (True, False)
            for is_program in (True, False)
        }
        self._namespaces = _FRESH & ~(0 if plan["own_network"] else kernel.NEWNET)
        self._namespaces |= 0 if plan["is_root"] else kernel.NEWUSER

    def serve(self):
        woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, self._on_child)
        self._selector.register(self._link, selectors.EVENT_READ, self._on_message)
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            for key, _ in self._selector.select(agent_of.WATCH_S if self._watched else None):
                key.data(key.fileobj)
            if self._watched:
                self._watch()

    def _on_message(self, link):
        data, fds, _, _ = socket.recv_fds(link, _MOST_MESSAGE, 16, _CLOSE_ON_EXEC)
        if not data:
            raise SystemExit(0)
        message = json.loads(data)
        if "start" in message:
            self._start(message, fds)
        elif message["kill"] in self._pids:
            os.kill(self._pids[message["kill"]], signal.SIGKILL)  # not reaped yet: the number is still its own
        for fd in fds:
            os.close(fd)

    def _start(self, message, fds):
        number, is_program = message["start"], message["program"]
        streams = 3 if is_program else 1
        try:
            pid = kernel.fork_into(self._namespaces)
        except OSError as error:
            _complain(fds[0], error)
            self._say({"ended": number})
            return
        if pid == 0:
            try:
                become_sandbox(self._plan, message, fds[:streams], fds[streams:], self._seccomp)
            except BaseException as error:
                _complain(fds[0], error)
                _complain(_FIRST_FREE - 1, error)  # where it is moved to
            finally:
                os._exit(1)
        self._numbers[pid], self._pids[number] = number, pid
        if is_program and message["watched_bytes"]:
            self._watched[pid] = message["watched_bytes"]

    def _on_child(self, woken):
        try:
            os.read(woken, 4096)
        except BlockingIOError:
            pass
        try:
            while True:
                pid, status, used = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                number = self._numbers.pop(pid)
                del self._pids[number]
                self._watched.pop(pid, None)
                cpu_s = used.ru_utime + used.ru_stime
                end = {"ended": number, "status": status, "cpu_s": cpu_s, "max_rss": used.ru_maxrss * 1024}
                self._say(dict(end, oom=pid in self._killed))
                self._killed.discard(pid)
        except ChildProcessError:
            return

    def _watch(self):
        """Programs that are their sandbox's first process, where no cgroup counts their memory."""
        for pid, most in list(self._watched.items()):
            if agent_of.held_by(agent_of.children_of(pid) | {pid}, most, [f"/proc/{pid}/root/box"]) > most:
                self._killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    def _say(self, message):
        try:
            self._link.send(json.dumps(message).encode())
        except OSError:
            raise SystemExit(0) from None


def _ignore(number, stack):
    """A signal that only wakes the loop."""


def _complain(fd, error):
    """To whoever asked for the sandbox, in a frame of the agent's."""
    try:
        os.write(fd, agent_of.frame({"failed": f"{type(error).__name__}: {error}"}))
    except OSError:
        pass


# --- one sandbox


def become_sandbox(plan, message, streams, groups, seccomp):
    """The first process in the namespaces: first what needs rights, then none of them, then the agent or a program."""
    for fd in groups:
        os.write(fd, b"0")
    link = keep_alone(streams)
    kernel.unshare(kernel.NEWCGROUP)
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    if plan["is_root"]:
        uid = message["uid"]
        make_private(message, plan, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        kernel.set_dumpable(True)  # else /proc/self would be root's
        kernel.unshare(kernel.NEWUSER)
        map_user(proc, _UID, uid, uid)
    else:
        map_user(proc, _UID, 0, 0)  # the zygote is root in a namespace of its own
        make_private(message, plan, _UID)
    os.close(proc)
    kernel.limit(files=1024, processes=message["processes"], file_bytes=message["disk_bytes"])
    if plan["no_capabilities"]:
        kernel.drop_capabilities()
    kernel.set_no_new_privileges()
    kernel.die_with_parent()
    if plan["landlock"]:
        kernel.landlock(readable=["/"], writable=[HOME, "/tmp", "/var/tmp", "/dev", "/box"])
    if plan["seccomp"]:
        seccomp[bool(groups), message["program"]].install()
    os.chdir(HOME)
    if message["program"]:
        become_program(plan, link)
    else:
        serve_as_agent(plan, message, link)


def keep_alone(streams):
    """Of all that is open: the first of `streams`, at the number that is returned, and the others as 1 and 2."""
    signal.set_wakeup_fd(-1)
    for number, fd in enumerate(streams[1:], 1):
        os.dup2(fd, number)
    link = os.dup2(streams[0], _FIRST_FREE - 1, inheritable=False) if streams[0] != _FIRST_FREE - 1 else streams[0]
    os.closerange(_FIRST_FREE, _MOST_FDS)
    return link


def serve_as_agent(plan, message, fd):
    kernel.set_dumpable(False)
    watched, environment = message["watched_bytes"], dict(plan["environment"])
    agent = agent_of.Agent(fd, fd, home=HOME, environment=environment, memory_bytes=watched, memory_places=["/box"])
    agent.serve()
    os._exit(0)


def make_private(message, plan, uid):
    """Everything writable is on one file system of bounded size, which ends with the sandbox."""
    options = "mode=0755,uid={0},gid={0},size={1},nr_inodes={2}".format(uid, message["disk_bytes"], message["inodes"])
    kernel.mount("tmpfs", "/box", "tmpfs", kernel.NOSUID | kernel.NODEV, options)
    for name, target, mode in (("home", HOME, 0o755), ("tmp", "/tmp", 0o1777), ("shm", "/dev/shm", 0o1777)):
        os.mkdir("/box/" + name)
        os.chown("/box/" + name, uid, uid)
        os.chmod("/box/" + name, mode)
        kernel.mount("/box/" + name, target, flags=kernel.BIND)
    kernel.mount("/box/tmp", "/var/tmp", flags=kernel.BIND)
    read_only = kernel.RDONLY if plan["read_only"] else 0
    kernel.mount("proc", "/proc", "proc", read_only | kernel.NOSUID | kernel.NODEV | kernel.NOEXEC)
    if plan["own_network"]:
        kernel.bring_up_loopback()
    kernel.set_hostname("sandbox")


# --- an interpreter that waits for its program


def become_program(plan, link):
    """The first process itself: waits for one frame, `code` bytes of a program after `files` and what it reads.

    That it waits, it says by a byte. Its end is its sandbox's.
    """
    for number, act in ((signal.SIGCHLD, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, act)
    forget_us(plan)
    if not agent_of.is_readable(link):
        rehearse()
    os.write(link, b"1")
    text = receive(link)
    os.closerange(3, _MOST_FDS)
    gc.enable()
    run_program(text)


def rehearse():
    """What a program needs anyway, while nobody waits: the memory that it touches becomes this process's own."""
    for header, _ in agent_of.frames(bytearray(agent_of.frame({"files": [], "code": 0}, b"x"))):
        exec(compile("import sys\ndef f(x): return str(x)\nprint(f(1))", "rehearsal", "exec"), {"print": str, **header})
    sys.stdout.flush()


def receive(link):
    """The program's text, when its files are there, and its input is what it reads first."""
    incoming = bytearray()
    while True:
        for header, body in agent_of.frames(incoming):
            view = memoryview(body)
            for path, length in header["files"]:
                _write_file(os.path.join(HOME, path), view[:length])
                view = view[length:]
            text = bytes(view[: header["code"]])
            _write_file("main.py", text)
            _give_input(view[header["code"] :])
            return text
        piece = os.read(link, 262_144)
        if not piece:
            os._exit(0)
        incoming += piece


def _write_file(place, content):
    if "/" in place:
        os.makedirs(os.path.dirname(place), exist_ok=True)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    while content:
        content = content[os.write(fd, content) :]
    os.close(fd)


def _give_input(content):
    fd = os.open("/tmp/.input", os.O_RDWR | os.O_CREAT, 0o600) if content else os.open("/dev/null", os.O_RDONLY)
    if content:
        os.unlink("/tmp/.input")
        while content:
            content = content[os.write(fd, content) :]
        os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)


def forget_us(plan):
    """It is an interpreter as any other: nothing of ours among its modules, nor the host's paths.

    What is taken out is kept alive: to free it would copy every page that it lies on.
    """
    for name in plan["ours"]:
        _KEPT.append(sys.modules.pop(name))
    sys.path[:] = plan["path"]


def run_program(content):
    import linecache
    import traceback
    import types

    module = types.ModuleType("__main__")
    module.__dict__.update(__file__="main.py", __builtins__=builtins)
    sys.modules["__main__"] = module
    code = 0
    try:
        exec(compile(content, "main.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        text = content.decode("utf-8", "replace")
        linecache.cache["main.py"] = (len(text), None, text.splitlines(keepends=True), "main.py")
        here = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, here)
    _finish(code)


def _exit_code(end):
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _finish(code):
    """As an interpreter ends: other threads, what was registered for the end, what is not written yet."""
    import atexit
    import threading

    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = code or 120
    os._exit(code)
