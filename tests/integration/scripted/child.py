"""A process that behaves as it is told: `child.py RUN_DIR NAME BEHAVIOUR`."""

import http.server
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from palestra.core.errors import DeadlineError
from palestra.core.process import life
from palestra.wire.channel import BlockingCaller
from palestra.wire.messages import Done, Failed, Progress, Ready, Restart, ToOrchestrator, ToSupervisor
from palestra.wire.rundir import RunDir

run, name, behaviour = RunDir(sys.argv[1]), sys.argv[2], sys.argv[3]
attempt = run.read_attempt()


def say(*messages) -> None:
    supervisor: BlockingCaller[ToSupervisor, ToSupervisor] = BlockingCaller(
        attempt.supervisor, name=name, attempt=attempt.number, receives=ToSupervisor, life=life()
    )
    for message in messages:
        supervisor.send(message)
    supervisor.close()


def note_pid() -> None:
    """RUN_DIR/NAME.pid has the newest life's, RUN_DIR/NAME.lives a line for each."""
    beside = run.path / f".{name}.pid"
    beside.write_text(str(os.getpid()))
    beside.replace(run.path / f"{name}.pid")
    with (run.path / f"{name}.lives").open("a") as file:
        file.write(f"{life()} {os.getpid()}\n")


def done() -> None:
    """A leader that trains two steps once every engine is there."""
    numbers = {"reward": 0.5, "age": 1.0, "tokens_per_s": 100.0, "trainer_idle": 0.1}
    steps = [Progress(process=name, stage="training", step=step, steps=2, numbers=numbers) for step in range(3)]
    say(*steps, Done(process=name))


def wait_for_file() -> None:
    """A leader that says its first word and waits for RUN_DIR/go."""
    say(Progress(process=name, stage="training", step=1, steps=2))
    note_pid()
    while not (run.path / "go").exists():
        time.sleep(0.02)
    say(Done(process=name))


def lingers() -> None:
    say(Progress(process=name, stage="training"), Done(process=name))
    time.sleep(600)


def listen() -> None:
    """A leader that notes what the supervisor tells this life, a line each, asks for what RUN_DIR/ask says, and ends at
    RUN_DIR/go."""
    supervisor: BlockingCaller[ToOrchestrator, ToSupervisor] = BlockingCaller(
        attempt.supervisor, name=name, attempt=attempt.number, receives=ToOrchestrator, life=life()
    )
    supervisor.send(Progress(process=name, stage="training", step=1, steps=2))
    note_pid()
    while not (run.path / "go").exists():
        try:
            heard = supervisor.receive(deadline_s=0.05, waiting_for="news")
            with (run.path / f"{name}.heard-{life()}").open("a") as file:
                file.write(f"{heard}\n")
        except DeadlineError:
            pass
        if (ask := run.path / "ask").exists():
            process, its_life, *planned = ask.read_text().split()
            ask.unlink()
            why, is_planned = "it is planted", planned == ["planned"]
            supervisor.send(Restart(process=process, why=why, life=int(its_life), is_planned=is_planned))
    supervisor.send(Done(process=name))
    supervisor.close()


def work() -> None:
    """A member that is ready and waits."""
    note_pid()
    say(Ready(process=name))
    time.sleep(600)


def listen_late() -> None:
    """A leader whose first word comes after the trainer has ended."""
    deadline = time.monotonic() + 30
    while not (run.path / "trainer.pid").exists() or is_alive(int((run.path / "trainer.pid").read_text())):
        assert time.monotonic() < deadline, "the trainer goes on"
        time.sleep(0.02)
    time.sleep(0.2)  # the supervisor heard of it
    listen()


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def work_with_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with (run.path / f"{name}-child.pid").open("w") as file:
        file.write(str(child.pid))
    work()


def do_all() -> None:
    """A member that is done and ends before its leader is."""
    note_pid()
    say(Ready(process=name), Done(process=name))


def do_all_and_linger() -> None:
    """Done, but it ends at RUN_DIR/leave."""
    do_all()
    while not (run.path / "leave").exists():
        time.sleep(0.02)


def work_once() -> None:
    """Later lives of it never get ready."""
    if life():
        crash()
    work()


def work_shortly() -> None:
    """Ready, and soon dead without a word."""
    note_pid()
    say(Ready(process=name))
    os._exit(1)


def same_words() -> None:
    say(Ready(process=name), Failed(process=name, error="the batch is torn", is_user_error=False))
    note_pid()
    sys.exit(1)


def final() -> None:
    say(Progress(process=name, stage="training"))
    say(Failed(process=name, error="no engine is left", is_user_error=False, is_final=True))
    note_pid()
    sys.exit(1)


def user_error_later() -> None:
    if life():
        user_error()
    work()


def train() -> None:
    """A leader of a supervised run: done in its second life."""
    say(Progress(process=name, stage="training", step=life(), steps=2))
    note_pid()
    if life():
        say(Done(process=name))
        return
    time.sleep(600)


def crash() -> None:
    print("about to crash")
    raise RuntimeError("planted fault")


def crash_late() -> None:
    time.sleep(0.5)
    crash()


def failed() -> None:
    say(Failed(process=name, error="disk is full", is_user_error=False))
    sys.exit(1)


def user_error() -> None:
    say(Failed(process=name, error="data.sources.0.path=x.jsonl is not there; give a file", is_user_error=True))
    sys.exit(2)


def refuse() -> None:
    print("model.build.architecture='Nope' is unknown", file=sys.stderr)
    sys.exit(2)


def quit_early() -> None:
    """Ends with 0 and without a word."""


def hang() -> None:
    note_pid()
    time.sleep(600)


def deaf() -> None:
    """Ignores SIGTERM, and so does a process that it started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run.path / f"{name}-child.pid").write_text(str(child.pid))
    note_pid()
    time.sleep(600)


def serve() -> None:
    """An engine that becomes healthy."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    host, port = attempt.engines[int(os.environ["PALESTRA_INDEX"])].removeprefix("http://").split(":")
    http.server.HTTPServer((host, int(port)), Health).serve_forever()


def serve_noted() -> None:
    note_pid()
    serve()


globals()[behaviour]()
