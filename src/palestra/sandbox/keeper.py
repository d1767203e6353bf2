"""The keeper of one sandbox: it starts an agent, outlives it, and leaves nothing behind.

Consumes: a plan, as its argument. Waits for: the end of its host's socket, a signal that its host is gone, the end of
what it started. Ends when: any of these; first it kills all that came from it, and removes the sandbox's directory.

It is the parent that the kernel gives to processes whose own is gone, so that daemons are found. As root it stays root,
while what it starts is another user, who cannot touch it. Standard library only, started with an empty environment.
"""

import json
import os
import selectors
import signal

from palestra.sandbox import agent as agent_of
from palestra.sandbox import kernel

_SIGNALS = (signal.SIGCHLD, signal.SIGTERM)
_CLEANUP_S = 30
_MOST_SAID = 65_536


def main(text):
    """`plan`: see `backends.kept.Kept.plan`."""
    plan = json.loads(text)
    for fd in (plan["link"], plan["control"], plan["lock"], *plan["groups"]):
        os.set_inheritable(fd, False)
    kernel.adopt_orphans()
    kernel.die_with_parent(signal.SIGTERM)
    woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in _SIGNALS:
        signal.signal(number, _ignore)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    pid = os.fork()
    if pid == 0:
        try:
            become(plan)
        except BaseException as error:
            complain(plan["link"], f"{type(error).__name__}: {error}")
        finally:
            os._exit(1)
    for fd in plan["groups"]:
        os.close(fd)
    if not plan["argv"]:
        os.close(plan["link"])
    wait_for_an_end(plan["control"], woken, None if plan["is_detached"] else pid)
    if plan["argv"] and (said := last_word(plan)):
        complain(plan["link"], said)
    end_all(plan)


def _ignore(number, stack):
    """A signal that only wakes the loop."""


def complain(fd, reason):
    """To whoever asked for the sandbox, in a frame of the agent's."""
    try:
        os.write(fd, agent_of.frame({"failed": reason}))
    except OSError:
        pass


def last_word(plan):
    """Of what starts the agent, the last lines that it wrote on its standard error."""
    try:
        with open(_said(plan), "rb") as file:
            lines = file.read(_MOST_SAID).decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return " ".join([line.strip() for line in lines if line.strip()][-3:])


def _said(plan):
    return plan["directory"] + "/said"


# --- the end


def wait_for_an_end(control, woken, pid):
    """Of the host's socket, or of `pid`; without `pid`, of all that the keeper has adopted."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if control in ready or signal.SIGTERM in os.read(woken, 4096):
            return
        ended, is_alone = reaped()
        if is_alone or pid in ended:
            return


def reaped():
    """Children that have ended, and whether there are no others."""
    found = set()
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return found, False
            found.add(pid)
    except ChildProcessError:
        return found, True


def end_all(plan):
    if plan["uid"]:
        kill_user(plan["uid"])
    agent_of.kill_descendants(os.getpid())
    for argv in plan["cleanup"]:
        run(argv, plan["environment"])
    remove_tree(plan["directory"])


def run(argv, environment):
    """Whether it helped or not, for so long as it takes, but not longer than `_CLEANUP_S`."""
    nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    signal.alarm(_CLEANUP_S)  # its handler is the default one: the keeper ends
    try:
        pid = os.posix_spawnp(argv[0], argv, environment, file_actions=nothing)
        os.waitid(os.P_PID, pid, os.WEXITED)
    except OSError:
        pass
    signal.alarm(0)


def kill_user(uid):
    """All processes of a user, whose forks the kernel holds up meanwhile."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED)


def remove_tree(path):
    """However deep it is: what lies in a directory of it is first moved to its top."""
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    count = before = 0
    try:
        while names := os.listdir(top):
            for name in names:
                count += _removed(top, name, count)
            if count == before:
                return  # what cannot be removed, stays
            before = count
    finally:
        os.close(top)
    os.rmdir(path)


def _removed(top, name, count):
    """How many files and directories were moved or removed."""
    try:
        if _unlinked(top, name):
            return 1
        inner = _opened(top, name)
    except OSError:
        return 0
    done = 0
    try:
        for child in os.listdir(inner):
            if not _unlinked(inner, child):
                os.chmod(child, 0o700, dir_fd=inner)
                os.rename(child, f".{count + done}", src_dir_fd=inner, dst_dir_fd=top)
            done += 1
        os.rmdir(name, dir_fd=top)
        done += 1
    except OSError:
        pass  # a name that is taken: the next round uses others
    finally:
        os.close(inner)
    return done


def _unlinked(directory, name):
    """False for a directory."""
    try:
        os.unlink(name, dir_fd=directory)
        return True
    except (IsADirectoryError, PermissionError):
        return False


def _opened(top, name):
    os.chmod(name, 0o700, dir_fd=top)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)


# --- what it keeps


def become(plan):
    """In the child of the keeper: what needs rights first, then none of them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.close(plan["control"])
    for fd in plan["groups"]:
        os.write(fd, b"0")
        os.close(fd)
    os.umask(0o022)
    if plan["shown"] and plan["uid"]:
        show(plan["shown"])
    if plan["root"]:
        make_root(plan)
    if plan["argv"]:
        become_program(plan)
    else:
        become_agent(plan)


def show(places):
    """Let other users reach directories that lie beneath one that is closed to them, (closed, place). Nothing else of
    what is closed is seen. Where root may not mount, the places stay out of reach.
    """
    try:
        kernel.unshare(kernel.NEWNS)
    except OSError:
        return
    kernel.mount("none", "/", flags=kernel.REC | kernel.PRIVATE)
    fds = {place: os.open(place, os.O_PATH | os.O_CLOEXEC) for _, place in places}
    for closed in {closed for closed, _ in places}:
        kernel.mount("tmpfs", closed, "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=0755,size=64k")
    for place, fd in fds.items():
        os.makedirs(place)
        kernel.bind(f"/proc/self/fd/{fd}", place)
        os.close(fd)


def make_root(plan):
    """A tree of read-only mounts, at `directory` in `root`, seen by nobody outside; and tools beside it."""
    from palestra.sandbox import zygote

    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(kernel.NEWNS if uid == 0 else kernel.NEWNS | kernel.NEWUSER)
    if uid != 0:
        proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        zygote.map_user(proc, 0, uid, gid)
        os.close(proc)
    kernel.mount("none", "/", flags=kernel.REC | kernel.PRIVATE)
    zygote.fill_root(plan["root"])
    for source, target in plan["tools"]:
        os.makedirs(target)
        kernel.bind(source, target)


def become_program(plan):
    """One that starts the agent. A descriptor `{seccomp}` among its arguments is that of the program for seccomp."""
    argv = plan["argv"]
    if plan["limits"]:
        kernel.limit(**plan["limits"])
    if "{seccomp}" in argv:
        fd = os.memfd_create("seccomp", 0)
        os.write(fd, kernel.seccomp_program(uncounted_memory=bool(plan["groups"])))
        os.lseek(fd, 0, os.SEEK_SET)
        argv = [str(fd) if word == "{seccomp}" else word for word in argv]
    os.dup2(os.open(_said(plan), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), 2)
    if plan["drops_user"]:
        become_user(plan["uid"])
    for fd in (0, 1):
        os.dup2(plan["link"], fd)
    os.chdir("/")
    os.execvpe(argv[0], argv, plan["environment"])


def become_user(uid):
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def become_agent(plan):
    """On this machine's own files and processes, behind the walls that the plan names."""
    import select  # noqa: F401  what the agent imports when it needs it, which it could not read from behind the walls
    import shutil  # noqa: F401

    become_user(plan["uid"])
    kernel.adopt_orphans()
    if plan["limits"]:
        kernel.limit(**plan["limits"])
    if plan["is_walled"]:
        kernel.drop_capabilities()
        kernel.set_no_new_privileges()
    if plan["readable"]:
        kernel.landlock(readable=plan["readable"], writable=plan["writable"], no_network=True)
    if plan["is_walled"]:
        kernel.Seccomp(kernel.seccomp_program(no_network=True, uncounted_memory=False)).install()
        kernel.set_dumpable(False)
    os.chdir(plan["home"])
    agent = agent_of.Agent(
        *(plan["link"], plan["link"]),
        home=plan["home"],
        environment=plan["environment"],
        memory_bytes=plan["watched_bytes"],
        is_first=False,
    )
    agent.serve()
    os._exit(0)
