"""The agent: the first process of a sandbox, which starts programs and opens files in it for whoever made it.

Consumes: frames on one descriptor, each a request with an `id`. Produces: a frame with the same `id` when it is done,
and `ready` at the start. Waits for: frames, output and ends of programs, its clock. Ends when: that is closed.

A frame is `!II`, the lengths of a JSON object and of the bytes after it. This file is self-contained (Python 3.8,
standard library), so that it also runs where nothing of ours is installed: `python3 -I agent.py`. It runs with the
rights of the programs, and protects itself only as the first process of its PID namespace can.
"""

import errno
import heapq
import json
import os
import selectors
import signal
import socket
import stat
import struct
import sys
import time

_HEAD = struct.Struct("!II")
MOST_HEADER, MOST_BODY = 2**20, 2**26
_CHUNK, _AT_ONCE = 65_536, 4
_DIAL_S = 5.0
_TOKEN_S = 5.0
_PIPE_BYTES = 2**20  # the most that the kernel lets a pipe hold
WATCH_S = 0.02
_SOFT_ERRORS = (BlockingIOError, InterruptedError)
_PAGE = os.sysconf("SC_PAGE_SIZE")


def frame(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogateescape")
    return b"".join((_HEAD.pack(len(text), len(body)), text, body))


def frames(buffer: bytearray):
    """Take whole frames out of `buffer`. Errors: ValueError, for one that is too long, or has no JSON object."""
    while len(buffer) >= _HEAD.size:
        header_bytes, body_bytes = _HEAD.unpack_from(buffer)
        if header_bytes > MOST_HEADER or body_bytes > MOST_BODY:
            raise ValueError(f"a frame of {header_bytes} + {body_bytes} bytes")
        middle, end = _HEAD.size + header_bytes, _HEAD.size + header_bytes + body_bytes
        if len(buffer) < end:
            return
        header, body = json.loads(bytes(buffer[_HEAD.size : middle])), bytes(buffer[middle:end])
        del buffer[:end]
        if not isinstance(header, dict):
            raise ValueError("a frame whose header is no object")
        yield header, body


class _Kept:
    """One stream of a program. `mode`: `head` keeps what came first, `tail` what came last, `block` lets it wait."""

    def __init__(self, fd, most, mode):
        self.fd, self.most, self.mode = fd, most, mode
        self.data, self.start, self.is_cut, self.is_read = bytearray(), 0, False, True

    def take(self):
        """Some of what there is to read, so that a program that floods it holds nobody up; False at its end."""
        for _ in range(_AT_ONCE):
            if self.mode == "block" and len(self.data) >= self.most:
                return True
            try:
                piece = os.read(self.fd, _CHUNK)
            except _SOFT_ERRORS:
                return True
            except OSError:
                return False
            if not piece:
                return False
            self._keep(piece)
            if len(piece) < _CHUNK:
                return True
        return True

    def _keep(self, piece):
        self.data += piece
        over = len(self.data) - self.most
        if over > 0 and self.mode == "head":
            del self.data[self.most :]
            self.is_cut = True
        elif over > 0 and self.mode == "tail":
            del self.data[:over]
            self.start += over
            self.is_cut = True

    def since(self, offset, most):
        """Its bytes from `offset` on, and where they begin; of `block`, what is asked beyond is forgotten."""
        begin = max(offset, self.start)
        if self.mode == "block":
            del self.data[: begin - self.start]
            self.start = begin
        data = bytes(self.data[begin - self.start : begin - self.start + most])
        return data, begin


class _Program:
    def __init__(self, pid, stdin, stdout, stderr):
        self.pid, self.stdin, self.streams = pid, stdin, (stdout, stderr)
        self.given, self.is_closing = bytearray(), False
        self.began, self.is_late = time.monotonic(), False
        self.wall_s, self.status, self.usage, self.is_oom = 0.0, None, None, False
        self.exec_id, self.is_streamed, self.waiting = None, False, []

    def named_streams(self):
        return ("stdout", self.streams[0]), ("stderr", self.streams[1])

    def result(self):
        code = signal_number = None
        if self.status is not None and not self.is_late:
            if os.WIFSIGNALED(self.status):
                signal_number = os.WTERMSIG(self.status)
            else:
                code = os.WEXITSTATUS(self.status)
        used = self.usage
        return {
            "exit_code": code,
            "signal": signal_number,
            "timed_out": self.is_late,
            "oom": self.is_oom,
            "wall_s": self.wall_s,
            "cpu_s": used.ru_utime + used.ru_stime if used else 0.0,
            "max_rss": used.ru_maxrss * 1024 if used else 0,
            "truncated": any(stream.is_cut for stream in self.streams),
        }


class Agent:
    """`memory_bytes`: above it, what uses most is killed, where no cgroup counts; 0 for no limit.

    `is_first`: it is the first process of a PID namespace, so that all others end with it.
    """

    def __init__(self, read_fd, write_fd, *, home, environment, memory_bytes=0, memory_places=(), is_first=True):
        self._read, self._write = read_fd, write_fd
        self._home, self._environment = home, environment
        self._memory, self._places, self._is_first = memory_bytes, memory_places, is_first
        self._selector = selectors.DefaultSelector()
        self._incoming, self._outgoing, self._is_writing = bytearray(), bytearray(), False
        self._programs, self._by_pid, self._count = {}, {}, 0
        self._timers, self._is_ended = [], False
        self._passed = []

    # --- the loop

    def serve(self):
        for fd in {self._read, self._write}:
            os.set_blocking(fd, False)
        self._selector.register(self._read, selectors.EVENT_READ, self._on_frames)
        woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, self._on_child)
        self._send({"ready": True})
        while not self._is_ended:
            for key, mask in self._selector.select(self._patience()):
                key.data(key.fd, mask)
            self._on_time()
        if not self._is_first:
            kill_descendants(os.getpid())

    def _patience(self):
        if self._memory and self._by_pid:
            return WATCH_S
        return max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None

    def _at(self, when, act, *arguments):
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, act, arguments))

    def _on_time(self):
        if self._memory and self._by_pid:
            self._watch_memory()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, act, arguments = heapq.heappop(self._timers)
            act(*arguments)

    def _on_frames(self, fd, mask):
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if not mask & selectors.EVENT_READ:
            return
        try:
            piece = os.read(fd, 4 * _CHUNK)
        except _SOFT_ERRORS:
            return
        except OSError:
            piece = b""
        if not piece:
            self._is_ended = True
            return
        self._incoming += piece
        for header, body in frames(self._incoming):
            self._answer(header, body)

    def _answer(self, header, body):
        try:
            act = _REQUESTS.get(header.get("do"))
            if act is None:
                raise ValueError("there is no request {!r}".format(header.get("do")))
            answer = act(self, header, body)
        except OSError as error:
            answer = {"error": "os", "errno": error.errno, "message": str(error)}, b""
        except (RecursionError, MemoryError) as error:  # of directories too deep, or what is too large for this sandbox
            number = errno.ENOMEM if isinstance(error, MemoryError) else errno.ENAMETOOLONG
            answer = {"error": "os", "errno": number, "message": f"{type(error).__name__}: {error}"}, b""
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            answer = {"error": "value", "message": f"{type(error).__name__}: {error}"}, b""
        if answer is not None:
            self._send(dict(answer[0], id=header.get("id")), answer[1])

    def _send(self, header, body=b"", passed=None):
        data = frame(header, body)
        if passed is not None:
            self._passed.append((data, passed))
        elif self._passed:
            self._passed.append((data, None))
        else:
            self._outgoing += data
        self._flush()

    def _flush(self):
        """A descriptor that is passed goes with the first byte of its frame, after all that was said before."""
        try:
            while self._outgoing or self._passed:
                while self._outgoing:
                    done = os.write(self._write, self._outgoing)
                    del self._outgoing[:done]
                if self._passed:
                    data, passed = self._passed[0]
                    done = self._pass(data, passed) if passed is not None else 0
                    self._passed.pop(0)
                    self._outgoing += data[done:]
        except _SOFT_ERRORS:
            pass
        except OSError:
            self._is_ended = True
            return
        self._want_writing(bool(self._outgoing or self._passed))

    def _pass(self, data, passed):
        """How many bytes went with it: none, if this end of the link takes no descriptors, and it goes unanswered."""
        try:
            with socket.socket(fileno=os.dup(self._write)) as link:
                done = socket.send_fds(link, [data], [passed.fileno()])
        except _SOFT_ERRORS:
            raise
        except OSError:
            done = 0
        passed.close()
        return done

    def _want_writing(self, is_writing):
        if is_writing == self._is_writing:
            return
        self._is_writing = is_writing
        if self._read == self._write:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if is_writing else 0)
            self._selector.modify(self._read, events, self._on_frames)
        elif is_writing:
            self._selector.register(self._write, selectors.EVENT_WRITE, self._on_frames)
        else:
            self._selector.unregister(self._write)

    # --- programs

    def _exec(self, header, body):
        """To its end, and answered then."""
        program = self._start(header, body, most=int(header.get("most", 2**20)), mode="head")
        if program is None:
            return self._unstarted(header)
        program.exec_id, program.is_streamed = header["id"], bool(header.get("stream"))
        return None

    def _open(self, header, body):
        """In the background: its output is kept, and asked for."""
        mode = "block" if header.get("blocks") else "tail"
        program = self._start(header, body, most=int(header.get("most", 2**20)), mode=mode, is_open=True)
        if program is None:
            return self._unstarted(header)
        number = self._count = self._count + 1
        self._programs[number] = program
        return {"process": number, "pid": program.pid}, b""

    def _unstarted(self, header):
        return {"unstarted": self._reason.errno, "message": str(self._reason)}, b""

    def _start(self, header, body, *, most, mode, is_open=False):
        """None, and `_reason`, if no program can be made of it."""
        try:
            program = self._spawn(header, most, mode)
        except OSError as error:
            self._reason = error
            return None
        except ValueError as error:  # a zero byte in an argument, half of a surrogate pair
            self._reason = OSError(errno.EINVAL, str(error))
            return None
        program.given += body
        program.is_closing = not is_open
        if header.get("timeout_s") is not None:
            self._at(program.began + float(header["timeout_s"]), self._on_late, program)
        self._by_pid[program.pid] = program
        for stream in program.streams:
            self._selector.register(stream.fd, selectors.EVENT_READ, self._reader(program, stream))
        self._feed(program)
        return program

    def _spawn(self, header, most, mode):
        environment = dict(self._environment, **header.get("env", {}))
        argv = [os.fsencode(word) for word in header["argv"]]
        if not argv:
            raise ValueError("no program is named")
        os.chdir(os.path.join(self._home, header.get("cwd", "")))
        ours, theirs = [], []
        try:
            for is_input in (True, False, False):
                readable, writable = os.pipe2(os.O_CLOEXEC)
                theirs.append(readable if is_input else writable)
                ours.append(writable if is_input else readable)
            for fd in ours:
                os.set_blocking(fd, False)
            pid = os.posix_spawn(
                _find(argv[0], environment.get("PATH", os.defpath)),
                argv,
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(theirs)],
                setsid=True,
                setsigmask=[],
                setsigdef=_DEFAULT_SIGNALS,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
            os.chdir(self._home)
        return _Program(pid, ours[0], _Kept(ours[1], most, mode), _Kept(ours[2], most, mode))

    def _reader(self, program, stream):
        def read(fd, mask):
            if stream.fd is None:
                return  # closed by what came before in this turn of the loop
            before = stream.start + len(stream.data)
            is_open = stream.take()
            if program.is_streamed and stream.start + len(stream.data) > before:
                name = "stdout" if stream is program.streams[0] else "stderr"
                self._send({"id": program.exec_id, "stream": name}, bytes(stream.data[before - stream.start :]))
            if not is_open:
                self._close_stream(stream)
            elif stream.mode == "block" and len(stream.data) >= stream.most:
                self._selector.unregister(fd)
                stream.is_read = False
            self._tell_waiting(program)

        return read

    def _close_stream(self, stream):
        if stream.fd is not None:
            if stream.is_read:
                self._selector.unregister(stream.fd)
            os.close(stream.fd)
            stream.fd = None

    def _feed(self, program):
        """What is left of its input; closed after it, unless more may come."""
        if program.stdin is None:
            return
        try:
            while program.given:
                done = os.write(program.stdin, program.given[:_CHUNK])
                del program.given[:done]
        except _SOFT_ERRORS:
            if program.stdin not in self._selector.get_map():
                act = self._feeder(program)
                self._selector.register(program.stdin, selectors.EVENT_WRITE, act)
            return
        except OSError:
            program.given.clear()
            program.is_closing = True
        if program.stdin in self._selector.get_map():
            self._selector.unregister(program.stdin)
        if program.is_closing:
            os.close(program.stdin)
            program.stdin = None

    def _feeder(self, program):
        return lambda fd, mask: self._feed(program)

    def _on_late(self, program):
        if program.status is None:
            program.is_late = True
            kill_tree(program.pid)

    def _on_child(self, fd, mask):
        try:
            os.read(fd, 4096)
        except _SOFT_ERRORS:
            pass
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            program = self._by_pid.pop(pid, None)
            if program is not None:
                self._end(program, status, usage)

    def _end(self, program, status, usage):
        """Whoever still holds its streams, such as a process that it left behind, is not waited for."""
        program.wall_s = time.monotonic() - program.began
        program.status, program.usage = status, usage
        program.is_closing = True
        program.given.clear()
        for name, stream in program.named_streams():
            if stream.fd is not None and stream.mode != "block":
                before = stream.start + len(stream.data)
                for _ in range(_PIPE_BYTES // (_CHUNK * _AT_ONCE) + 1):
                    if not stream.take():
                        break
                if program.is_streamed and stream.start + len(stream.data) > before:
                    self._send({"id": program.exec_id, "stream": name}, bytes(stream.data[before - stream.start :]))
                self._close_stream(stream)
        if program.stdin is not None:
            if program.stdin in self._selector.get_map():
                self._selector.unregister(program.stdin)
            os.close(program.stdin)
            program.stdin = None
        if program.exec_id is not None:
            out, err = (bytes(stream.data) for stream in program.streams)
            self._send(dict(program.result(), id=program.exec_id, stdout_bytes=len(out)), out + err)
            for stream in program.streams:
                stream.data.clear()  # its timer knows the program until its time would be over
        self._tell_waiting(program)

    # --- programs in the background

    def _output(self, header, body):
        """What came since, as soon as there is something, or it ended, or `wait_s` are over."""
        program = self._of(header)
        if not self._tell_output(program, header):
            program.waiting.append(header)
            self._at(time.monotonic() + float(header.get("wait_s", 0)), self._tell_late, program, header)
        return

    def _tell_late(self, program, header):
        if header in program.waiting:
            program.waiting.remove(header)
            self._tell_output(program, header, is_patient=False)

    def _tell_waiting(self, program):
        program.waiting = [header for header in program.waiting if not self._tell_output(program, header)]

    def _tell_output(self, program, header, is_patient=True):
        most = min(int(header.get("most", 2**20)), MOST_BODY // 2)
        offsets = (int(header.get("stdout", 0)), int(header.get("stderr", 0)))
        (out, out_at), (err, err_at) = (program.streams[i].since(offsets[i], most) for i in (0, 1))
        for stream in program.streams:
            is_held_up = stream.mode == "block" and not stream.is_read
            if is_held_up and stream.fd is not None and len(stream.data) < stream.most:
                self._selector.register(stream.fd, selectors.EVENT_READ, self._reader(program, stream))
                stream.is_read = True
        is_over = (
            program.status is not None
            and not (out or err)
            and all(
                stream.fd is None or stream.mode != "block" or not is_readable(stream.fd) for stream in program.streams
            )
        )
        if is_patient and not (out or err or is_over):
            return False
        answer = {"id": header["id"], "stdout": out_at, "stderr": err_at, "stdout_bytes": len(out)}
        answer["ended"] = program.result() if is_over else None
        self._send(answer, out + err)
        return True

    def _input(self, header, body):
        program = self._of(header)
        if program.stdin is None:
            raise BrokenPipeError(errno.EPIPE, "the program reads no more")
        if len(program.given) + len(body) > MOST_BODY:
            raise BlockingIOError(errno.EAGAIN, "the program does not read what it was given before")
        program.given += body
        program.is_closing = bool(header.get("eof"))
        self._feed(program)
        return {}, b""

    def _signal(self, header, body):
        program = self._of(header)
        if program.status is None:
            if header.get("tree"):
                kill_tree(program.pid)
            else:
                os.killpg(program.pid, int(header["number"]))
        return {}, b""

    def _forget(self, header, body):
        program = self._of(header)
        if program.status is None:
            kill_tree(program.pid)
        for stream in program.streams:
            self._close_stream(stream)
        del self._programs[int(header["process"])]
        return {}, b""

    def _processes(self, header, body):
        known = [
            {"process": number, "pid": program.pid, "ended": program.result() if program.status is not None else None}
            for number, program in self._programs.items()
        ]
        return {"processes": known}, b""

    def _of(self, header):
        program = self._programs.get(int(header["process"]))
        if program is None:
            raise ProcessLookupError(errno.ESRCH, "there is no process {}".format(header["process"]))
        return program

    # --- files

    def _place(self, header):
        path = header["path"]
        if not isinstance(path, str) or "\0" in path:
            raise ValueError("a path is a text without zero bytes")
        return os.path.join(self._home, path)

    def _write_file(self, header, body):
        """With the directories above it. `offset`: there, in what is there already."""
        place = self._place(header)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | (0 if "offset" in header else os.O_TRUNC)
        fd = os.open(place, flags, int(header.get("mode", 0o644)))
        try:
            _require_regular(fd, place)
            os.lseek(fd, int(header.get("offset", 0)), os.SEEK_SET)
            view = memoryview(body)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        return {}, b""

    def _read_file(self, header, body):
        place = self._place(header)
        length = min(int(header.get("length", MOST_BODY)), MOST_BODY)
        fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_regular(fd, place)
            size = os.fstat(fd).st_size
            pieces, at = [], int(header.get("offset", 0))
            while length > 0:
                piece = os.pread(fd, min(length, 2**20), at)
                if not piece:
                    break
                pieces.append(piece)
                at, length = at + len(piece), length - len(piece)
        finally:
            os.close(fd)
        return {"size": size}, b"".join(pieces)

    def _list_files(self, header, body):
        """At most `most` of them, and what fits into one frame; links are named, never followed."""
        top, found, most = self._place(header), [], int(header.get("most", 10_000))
        pending, room = [""], MOST_HEADER - _CHUNK
        while pending:
            below = pending.pop()
            with os.scandir(os.path.join(top, below)) as entries:
                for entry in entries:
                    if len(found) >= most or room < 0:
                        return {"files": found, "is_cut": True}, b""
                    about = entry.stat(follow_symlinks=False)
                    path = os.path.join(below, entry.name)
                    kind = _KINDS.get(stat.S_IFMT(about.st_mode), "other")
                    found.append([path, kind, about.st_size, about.st_mode & 0o777, about.st_mtime])
                    room -= len(json.dumps(found[-1])) + 1
                    if kind == "directory" and header.get("is_deep"):
                        pending.append(path)
        return {"files": found, "is_cut": False}, b""

    def _remove(self, header, body):
        place = self._place(header)
        if os.path.isdir(place) and not os.path.islink(place):
            import shutil

            shutil.rmtree(place)
        else:
            os.unlink(place)
        return {}, b""

    # --- sockets, which belong to the network that they were made in

    def _dial(self, header, body):
        """A connection to a port in here, passed out; that of a server whose queue is full holds up nobody else."""
        link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            reason = link.connect_ex(("127.0.0.1", int(header["port"])))
        except BaseException:
            link.close()
            raise
        if reason != errno.EINPROGRESS:
            self._tell_dialled(header, link, reason)
            return

        def dialled(fd, mask):
            self._selector.unregister(link)
            self._tell_dialled(header, link, link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

        def late():
            if link.fileno() >= 0:
                self._selector.unregister(link)
                self._tell_dialled(header, link, errno.ETIMEDOUT)

        self._selector.register(link, selectors.EVENT_WRITE, dialled)
        self._at(time.monotonic() + _DIAL_S, late)

    def _tell_dialled(self, header, link, reason):
        if reason == 0:
            self._send({"id": header["id"], "passes": True}, passed=link)
        else:
            link.close()
            self._send({"id": header["id"], "error": "os", "errno": reason, "message": os.strerror(reason)})

    def _listen(self, header, body):
        """A port in here that is answered outside."""
        link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            link.bind(("127.0.0.1", int(header["port"])))
            link.listen(128)
        except BaseException:
            link.close()
            raise
        self._send({"id": header["id"], "passes": True}, passed=link)
        return

    def _set_environment(self, header, body):
        self._environment.update(header["env"])
        return {}, b""

    # --- memory, where no cgroup counts it

    def _watch_memory(self):
        users = children_of(os.getpid())  # never others: without a namespace, those of the whole machine are in /proc
        if users and held_by(users, self._memory, self._places) > self._memory:
            for program in self._by_pid.values():
                program.is_oom = True
            for pid in users:
                _kill(pid)


_REQUESTS = {
    "exec": Agent._exec,
    "open": Agent._open,
    "output": Agent._output,
    "input": Agent._input,
    "signal": Agent._signal,
    "forget": Agent._forget,
    "processes": Agent._processes,
    "write": Agent._write_file,
    "read": Agent._read_file,
    "list": Agent._list_files,
    "remove": Agent._remove,
    "dial": Agent._dial,
    "listen": Agent._listen,
    "environment": Agent._set_environment,
    "ping": lambda agent, header, body: ({}, b""),
}
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
_DEFAULT_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]


def _ignore(number, stack):
    """A signal that only wakes the loop."""


def _find(name, path):
    """Errors: FileNotFoundError, PermissionError."""
    if b"/" in name:
        return name
    reason = FileNotFoundError(errno.ENOENT, "no such program", os.fsdecode(name))
    for directory in path.split(os.pathsep):
        place = os.path.join(os.fsencode(directory), name)
        if os.path.isfile(place):
            if os.access(place, os.X_OK):
                return place
            reason = PermissionError(errno.EACCES, "not executable", os.fsdecode(place))
    raise reason


def _require_regular(fd, place):
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "no regular file", place)


def is_readable(fd):
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid):
    """Parent and session; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[1]), int(fields[3])
    except (OSError, IndexError, ValueError):
        return None


def _resident(pid):
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _proportional(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    return _resident(pid)  # it hides that, or its kernel does not count so


def _held(place):
    try:
        about = os.statvfs(place)
    except OSError:
        return 0
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def held_by(pids, most, places):
    """Bytes of processes, and of file systems in memory. Resident pages are looked at first, which counts shared ones
    twice; the exact number only where that is too much.
    """
    files = sum(_held(place) for place in places)
    rough = files + sum(map(_resident, pids))
    return rough if rough <= most else files + sum(map(_proportional, pids))


def children_of(pid):
    """All that come from it, as the kernel tells."""
    found, pending = set(), [pid]
    while pending:
        one = pending.pop()
        try:
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children", "rb") as file:
                    for child in map(int, file.read().split()):
                        found.add(child)
                        pending.append(child)
        except OSError:
            pass
    return found


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def kill_tree(pid):
    """It, its session, and all that came from either and still has a parent there."""
    for _ in range(8):
        known = {other: about for other in _all_pids() for about in [_stat(other)] if about is not None}
        doomed = {pid} | {other for other, about in known.items() if about[1] == pid}
        while True:
            more = {other for other, about in known.items() if about[0] in doomed} - doomed
            if not more:
                break
            doomed |= more
        doomed -= {1, os.getpid()}
        for other in doomed:
            _kill(other)
        if len(doomed) <= 1:
            return


def kill_descendants(pid):
    """All that came from `pid`, which adopts those whose parent is gone."""
    for _ in range(64):
        known = {other: about for other in _all_pids() for about in [_stat(other)] if about is not None}
        doomed = {other for other, about in known.items() if about[0] == pid}
        while True:
            more = {other for other, about in known.items() if about[0] in doomed} - doomed
            if not more:
                break
            doomed |= more
        for other in doomed:
            _kill(other)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def main(argv):
    """`agent.py [--listen PORT] HOME [MEMORY_BYTES [PLACE...]]`, on its standard input and output, or on the first
    connection to PORT that begins with the environment's PALESTRA_TOKEN. Programs inherit neither.

    Its environment is that of the programs; a PLACE is a file system in memory, counted with it.
    """
    if argv[1] == "--listen":
        read_fd = write_fd = awaited(int(argv[2]), os.environ.pop("PALESTRA_TOKEN", "").encode())
        argv = argv[2:]
    else:
        read_fd, write_fd = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    home = argv[1]
    os.chdir(home)
    environment = dict({"PATH": os.defpath, "LANG": "C.UTF-8"}, **dict(os.environ, HOME=home))
    memory, is_first = int(argv[2]) if len(argv) > 2 else 0, os.getpid() == 1
    _hide()
    agent = Agent(
        *(read_fd, write_fd),
        home=home,
        environment=environment,
        memory_bytes=memory,
        memory_places=argv[3:],
        is_first=is_first,
    )
    agent.serve()


def awaited(port, token):
    """A descriptor of the first connection to `port` that begins with `token`. Before it, others are closed, one after
    the other; after it, nobody is answered. Errors: SystemExit, without a token.
    """
    if not token:
        raise SystemExit("PALESTRA_TOKEN is empty: set it to what the host's connection begins with")
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=16, dualstack_ipv6=family == socket.AF_INET6
    ) as listening:
        while True:
            link, _ = listening.accept()
            if _begins_with(link, token):
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # else a host that is gone is never missed
                return link.detach()
            link.close()


def _begins_with(link, token):
    from hmac import compare_digest

    said, deadline = b"", time.monotonic() + _TOKEN_S
    try:
        while len(said) < len(token):
            link.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = link.recv(len(token) - len(said))
            if not piece:
                return False
            said += piece
    except OSError:
        return False
    return compare_digest(said, token)


def _hide():
    """From programs of the same user, as far as the kernel can: they neither trace it nor read its memory."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    except (ImportError, OSError, AttributeError):
        pass


if __name__ == "__main__":
    main(sys.argv)
