"""Every wait has a deadline: the walk over all awaits and blocking calls of the sources.

A wait is an await of something that is not a coroutine of ours (whose own awaits are walked where it stands), a lock,
or a blocking call. It is bounded by `within(...)`, `asyncio.timeout` or a deadline among its arguments, or it is named
below with the reason why it ends all the same.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("src/**/*.py"))

DEADLINES = {"deadline_s", "timeout", "silence_s"}  # arguments that bound a call
BOUNDING = {"within", "_within", "wait_for"}  # functions that bound what they are given
SCOPES = {"timeout", "timeout_at", "Unhurried"}  # of asyncio, and ours
SHARED_NAMES = {"wait", "receive", "get", "join", "acquire", "read", "communicate"}  # with what is not ours
NEVER_WAIT = {"sleep", "send", "_send", "progress", "close", "aclose"}  # sleeps end; channels take and ends are closed
BLOCKING = {"communicate", "waitpid", "accept", "recv", "recv_multipart", "urlopen", "flock", "poll", "select"}
BLOCKING_RUNS = {"run", "call", "check_call", "check_output"}  # of subprocess
HTTP = {"get", "post", "put", "request", "stream"}  # of httpx and requests


@dataclass(frozen=True)
class Wait:
    """`text` is its source; `place` the module and the functions around it."""

    place: str
    text: str
    line: int


def unbounded(tree: ast.Module, place: str, ours: set[str]) -> list[Wait]:
    """Waits without a deadline. `ours` are the names of all coroutine functions of the sources."""
    return [
        Wait(_place(path, place), _text(node), node.lineno)
        for node, path in _with_ancestors(tree, ())
        if _is_wait(node, path, ours) and not _is_bounded(node, path)
    ]


def _with_ancestors(node: ast.AST, path: tuple[ast.AST, ...]) -> Iterator[tuple[ast.expr, tuple[ast.AST, ...]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child, (*path, node)
        yield from _with_ancestors(child, (*path, node))


def _place(path: tuple[ast.AST, ...], module: str) -> str:
    names = [n.name for n in path if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return ".".join([module, *names])


def _text(node: ast.expr) -> str:
    """Without the arguments of a call, where there are any."""
    call = node.value if isinstance(node, ast.Await) else node
    if not isinstance(call, ast.Call) or not (call.args or call.keywords):
        return ast.unparse(node)
    return ("await " if call is not node else "") + f"{ast.unparse(call.func)}(...)"


def _is_wait(node: ast.expr, path: tuple[ast.AST, ...], ours: set[str]) -> bool:
    parent = path[-1]
    if isinstance(node, ast.Await):
        return _is_foreign(node.value, ours)
    if isinstance(parent, ast.AsyncFor) and node is parent.iter:
        return True
    if isinstance(parent, ast.withitem) and isinstance(path[-2], ast.AsyncWith) and node is parent.context_expr:
        return not isinstance(node, ast.Call)  # a lock or a semaphore that somebody else may hold
    return isinstance(node, ast.Call) and not isinstance(parent, ast.Await) and _blocks(node)


def _is_foreign(awaited: ast.expr, ours: set[str]) -> bool:
    """Whether it is anything but a call of a coroutine function of ours, or a sleep."""
    if not isinstance(awaited, ast.Call):
        return True  # a future, a task
    name = _last(awaited.func)
    if name in {*NEVER_WAIT, *BOUNDING}:
        return ast.unparse(awaited.func).endswith("_http.send")  # a client's, which waits for the answer
    return name not in ours or name in SHARED_NAMES


def _blocks(call: ast.Call) -> bool:
    """Whether the call may block the thread it is made in."""
    *owner, name = _dotted(call.func) or ("",)
    if owner[-1:] == ["subprocess"] and name in BLOCKING_RUNS:
        return True
    if owner[-1:] in (["httpx"], ["requests"]) and name in HTTP:
        return True
    if name == "init_process_group":
        return True  # its deadline is that of every collective
    if name in {"wait", "join", "get"}:
        return _waits_for_another(call, owner, name)
    return name in BLOCKING


def _waits_for_another(call: ast.Call, owner: list[str], name: str) -> bool:
    """A process's, thread's or queue's: called with nothing but a deadline, where dictionaries and texts take more."""
    is_method = isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Constant)
    return is_method and not call.args and owner[-1:] != ["asyncio"] and name in {"wait", "join", "get"}


def _is_bounded(node: ast.expr, path: tuple[ast.AST, ...]) -> bool:
    call = node.value if isinstance(node, ast.Await) else node
    if isinstance(call, ast.Call) and _has_deadline(call):
        return True
    for outer in path:
        if isinstance(outer, ast.Call) and _last(outer.func) in BOUNDING:
            return True
        if isinstance(outer, ast.AsyncWith) and any(_is_scope(item.context_expr) for item in outer.items):
            return True
    return False


def _has_deadline(call: ast.Call) -> bool:
    given = {k.arg for k in call.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is None)}
    if given & DEADLINES:
        return True
    name = _last(call.func)
    if name == "wait" and call.args and isinstance(call.args[0], ast.JoinedStr | ast.Constant):
        return True  # `Changes.wait("what for")`, which has a deadline of its own
    if name == "flock":
        return "LOCK_NB" in ast.unparse(call)
    if name in {"recv", "recv_multipart"}:
        return "NOBLOCK" in ast.unparse(call)
    return name in {"poll", "select"} and bool(call.args) and not isinstance(call.args[0], ast.Constant)


def _is_scope(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _last(node.func) in SCOPES


def _last(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _dotted(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Attribute):
        return (*_dotted(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ("",)


def _coroutines(trees: list[ast.Module]) -> set[str]:
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src" / "palestra").with_suffix("").parts)


TREES = {_module(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
OURS = _coroutines(list(TREES.values()))

_ROLLOUT = "of a rollout, whose calls have engine.call_s, and which has env.stall_s between them"
_WATCH = (
    "it watches a process for as long as the run goes on; what the process must do in time has deadlines of its own"
)
_ASKED = "who asked the worker waits for at most env.stall_s"
_LISTENS = "it listens for whatever comes; a peer that is silent is missed by whoever waits for its answer"
_DISK = "the disk takes it or refuses it; a kernel that does neither holds every process of the machine"
_DATABASE = "connections, locks and SQLite's turns have timeouts in `hub/registry/database.py`"

ENDS_ALL_THE_SAME = {
    ("model.ring._Passing.arrived", "work.wait()"): "the process group has a deadline",
    ("model.tensor._arrived", "x.wait()"): "as above",
    (
        "wire.weights.local._alone",
        "fcntl.flock(...)",
    ): "for who copies; sync.deadline_s ends the publish, death the lock",
    ("core.deadline.within", "scope"): "this is the deadline",
    ("core.deadline.within", "await awaited"): "this is what has the deadline",
    ("env.aside.limited", "await asyncio.wrap_future(...)"): "the pool ends what takes longer than `timeout`",
    ("env.check._case", "await held"): "`palestra env check` gives the process a deadline",
    ("env.check._run", "Check(Here(id, variant, num_tasks=num_tasks)).cases()"): "as above",
    ("env.environment.Environment.run", "await agent(...)"): _ROLLOUT,
    ("env.scoring._called", "await given"): _ROLLOUT,
    ("env.tools.Tool.__call__", "await given"): "`ToolBox` gives every call a deadline",
    ("env.tools.ToolBox._call", "limit"): "this is the deadline",
    ("env.tools.ToolBox._call", "await self._tools[name](...)"): "this is what has the deadline",
    ("env.worker.Worker.call", "await self._replies[key]"): _ROLLOUT,
    ("env.worker.Worker._list_tasks", "stage.listing"): _ASKED,
    ("env.worker.Worker._list_tasks", "await asyncio.to_thread(...)"): _ASKED,
    (
        "launch.bench.bare.BareClient.measure",
        "await asyncio.wait(...)",
    ): "each of them waits for replies, at most call_s",
    ("launch.bench.bare.BareClient._post", "await self._http.post(...)"): "`_reply` bounds all attempts together",
    ("launch.bench.env.Waiting.run", "await agent(...)"): _ROLLOUT,
    ("launch.bench.environment.ForcedLengths.run", "await agent(...)"): _ROLLOUT,
    (
        "hub.guard.Guard.__call__",
        "await self._app(...)",
    ): "a page, whose waits are walked here; uvicorn ends the others",
    ("hub.guard.Guard.__call__", "await PlainTextResponse(text, status_code=421)(...)"): "it is a line of text",
    ("hub.operation.access.Access.__call__", "await self._app(...)"): "the application; its limits are those below",
    ("hub.operation.limits.Limits.__call__", "await self._app(...)"): "the application, whose body comes in time",
    ("hub.operation.limits.Limits.__call__", "await refusal(...)"): "it is a line of text",
    ("env.subject.Boxed._line", "await self._process.read()"): "it answers after a while; `_ask` bounds all of them",
    ("hub.trust.worker.Worker.do_one", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.trust.worker.Worker.do_one", "await self._examine(...)"): "`examine` bounds all of it",
    ("hub.trust.worker.Worker._keep", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.trust.worker.Worker.do_one", "await asyncio.shield(...)"): _DATABASE,
    ("hub.trust.examine._examined", "await asyncio.to_thread(...)"): _DISK,
    ("hub.trust.examine._build", "await asyncio.to_thread(...)"): _DISK,
    ("hub.trust.examine._build", "await box.read(...)"): "the sandbox answers in time, and `examine` bounds all",
    ("hub.trust.examine._judge", "Check(subject).cases()"): "each answer has its time, and `examine` bounds all",
    ("hub.operation.ready.routes.numbers", "await asyncio.to_thread(...)"): "it counts rows of a table",
    ("hub.guard.Guard.__call__", "await PlainTextResponse(text, status_code=405)(...)"): "as above",
    ("hub.server.until_told", "await server.serve(...)"): "it goes on until it is told to end",
    ("hub.registry.delivery.routes.answered.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.delivery._pieces", "await asyncio.to_thread(...)"): _DISK,
    ("hub.registry.receive._read", "await asyncio.to_thread(...)"): _DISK,
    ("hub.registry.uploads.Uploads._taken", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.evals.verify._verdict", "await sandbox.read(...)"): "every request to an agent has a deadline",
    ("hub.evals.uploads.EvaluationUploads._taken", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._OnlyText.__call__", "await app(...)"): "as `Guard`",
    ("hub.registry.web._flushing.flush", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._twin.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._page.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._action.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._login.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.registry.web._logout.answer", "await asyncio.to_thread(...)"): _DATABASE,
    ("hub.watch.Watch.run", "await asyncio.to_thread(...)"): _DISK,
    ("hub.watch.Watch._until_new", "notices"): "it listens to the kernel until it is told to end",
    ("hub.watch.Watch._take_over", "await anext(...)"): "a watch says so when nothing has changed for half a second",
    ("hub.watch.Watch._take_over", "await asyncio.to_thread(...)"): _DISK,
    ("hub.watch.Watch._until_new", "await asyncio.to_thread(...)"): _DISK,
    ("hub.web.application.lifespan", "site"): "it begins a task, and waits for its end with a timeout",
    ("hub.web._answer", "await asyncio.to_thread(...)"): _DISK,
    ("launch.child.start", "await asyncio.create_subprocess_exec(...)"): "the kernel starts it or refuses",
    ("launch.cli._fetch", "subprocess.run(...)"): "a download that a person watches and can interrupt",
    ("launch.sinks.keeping._heed", "process.wait()"): "the process ends when its input does, or is killed then",
    ("launch.sinks.keeping.tell", "subprocess.run(...)"): "a person watches it, and can interrupt it",
    ("launch.supervisor.Supervisor.run", "await self._lead_ended.wait()"): _WATCH,
    ("launch.supervisor.Supervisor.stop", "child.process.wait()"): "gathered and awaited with a deadline below",
    ("launch.supervisor.Supervisor.stop", "self._hurry.wait()"): "awaited with a deadline below",
    ("launch.supervisor.Supervisor._live", "await child.process.wait()"): _WATCH,
    ("launch.supervisor.Supervisor._rest", "await wanted.wait()"): "it ends with the run",
    ("launch.supervisor.Supervisor._reach_milestones", "await child.done.wait()"): _WATCH,
    ("launch.supervisor.Supervisor._start", "self._starting"): "held while the system starts a process",
    ("launch.supervisor.Supervisor._may_end", "reason.wait()"): "awaited with a deadline below",
    ("launch.supervisor.Supervisor._listen", "self._starting"): "held while the system starts a process",
    ("launch.supervisor.Supervisor._listen", "await self._listener.receive()"): _LISTENS,
    ("launch.supervisor.Supervisor._heed_interrupt", "await self._interrupted.wait()"): "a user may never interrupt",
    ("launch.supervisor._answers", "await client.get(...)"): "the client has a timeout, and the caller a deadline",
    ("orchestrate.evaluate._Measuring._rollout", "self._slots"): _ROLLOUT,
    ("env.aside._give_up", "await asyncio.to_thread(...)"): "the pool joins with a deadline of its own",
    ("env.play._run", "await closing.enter_async_context(...)"): "`Sandboxes.opened`, which is walked here",
    ("env.sandbox.Sandboxes.opened", "self._turn"): _ROLLOUT,
    ("env.sandbox.Sandboxes.opened", "await closing.enter_async_context(...)"): _ROLLOUT,
    ("env.mcp._start", "await entered.enter_async_context(...)"): "`mcp` gives it `start_s`",
    ("env.mcp._start", "await client.list_tools()"): "`mcp` gives it `start_s`",
    ("env.mcp._start", "await client.list_tools(...)"): "`mcp` gives it `start_s`",
    ("env.mcp._call", "await client.call_tool(...)"): "`ToolBox` gives every call of a tool `tool_s`",
    ("env.proxy.Session.ask", "await asyncio.shield(...)"): "the voice has deadlines, and `close` ends it",
    ("env.proxy.Session.close", "await asyncio.gather(...)"): "they were cancelled",
    ("env.proxy.Proxy.close", "await (await self._serving).cleanup()"): "aiohttp gives its handlers `_LAST_WORD_S`",
    ("env.proxy.Proxy.close", "await self._serving"): "it only binds a socket",
    ("env.proxy.Proxy._serve", "await runner.setup()"): "it only makes the application",
    ("env.proxy._answer", "await asking"): "the voice has deadlines, and the session's end ends it",
    ("env.proxy._tried", "await asking"): "the voice has deadlines, and the session's end ends it",
    ("launch.bench.instant.Instant._generate", "await request.read()"): "a part of the bench, which has a deadline",
    ("launch.bench.instant.Instant._generate", "await response.prepare(...)"): "as above",
    ("launch.bench.instant.Instant._generate", "await response.write_eof()"): "as above",
    ("launch.bench.instant._serve", "await runner.setup()"): "it only makes the application",
    ("launch.bench.instant._serve", "await asyncio.Event().wait()"): "its parent ends it",
    ("launch.replay_rewards._rescore_all", "await asyncio.gather(...)"): "rewards have deadlines where they wait",
    ("launch.replay_rewards._rescore", "slots"): "rewards have deadlines where they wait",
    ("env.judge.Judge._answer", "self._slots"): "each of those before has a deadline of its own",
    ("env.judge.Judge.__call__", "await asyncio.shield(...)"): "each of its questions has a deadline",
    ("orchestrate.evaluator.Evaluator.run", "self._tasks"): "what it waits for, by tasks that have deadlines",
    ("orchestrate.evaluator.Evaluator._receive", "await self._listener.receive()"): _LISTENS,
    ("launch.bench.sandbox.latencies", "await asyncio.to_thread(...)"): "a program without a sandbox has 60 s",
    (
        "launch.bench.sandbox.rate.at_once",
        "await asyncio.gather(...)",
    ): "programs, with sandboxes and without, have deadlines",
    ("launch.bench.sandbox.queue.one", "asked"): "as above",
    ("launch.bench.sandbox.queue", "await asyncio.gather(...)"): "as above",
    (
        "launch.bench.sandbox.served",
        "await asyncio.create_subprocess_exec(...)",
    ): "a program that is there starts or does not",
    ("launch.sandbox_check._told", "check(...)"): "every case has 300 s",
    ("sandbox.agent.is_readable", "select.poll()"): "it makes one",
    ("sandbox.agent.is_readable", "poll.poll(...)"): "it only asks: its time is 0",
    ("sandbox.agent.kill_descendants", "os.waitpid(...)"): "it only asks",
    ("sandbox.agent.awaited", "listening.accept()"): "it waits for its host, as long as its pod is there",
    ("sandbox.agent._begins_with", "link.recv(...)"): "the socket has what is left of 5 s",
    ("sandbox.backends.cluster.Cluster.watch", "answer.content"): "the request has a deadline in all",
    ("sandbox.backends.cluster.Cluster._asked", "asking"): "as above",
    ("sandbox.backends.cluster._require_success", "await answer.text()"): "as above",
    ("sandbox.backends.kubernetes.Kubernetes._require_walls", "await self._cluster.get(...)"): "as above",
    ("sandbox.backends.kubernetes.Kubernetes._token", "await self._cluster.get(...)"): "as above",
    ("sandbox.backends.kubernetes.Kubernetes._ready", "events"): "the watch has a deadline, and so has the start",
    (
        "sandbox.backends.once._exactly",
        "link.recv(...)",
    ): "the agent keeps the program's deadline; its host, the command's",
    ("sandbox.backends.remote.FarLink.install", "await asyncio.to_thread(...)"): _DISK,
    ("sandbox.backends.remote.FarLink._asked", "await self._place.read(...)"): "its host waits for as long as it wants",
    ("sandbox.backends.interpreter.Interpreter._complaint", "self._link.recv(...)"): "the socket does not block",
    ("sandbox.backends.local.Local.is_broken", "self._process.poll()"): "it only asks",
    ("sandbox.backends.local.Local._admitted", "self._process.poll()"): "it only asks",
    ("sandbox.backends.local.Local._on_message", "self._socket.recv(...)"): "the socket does not block",
    (
        "sandbox.backends.local.Local.close",
        "await asyncio.to_thread(...)",
    ): "it waits for a killed process, with a deadline inside",
    ("sandbox.box.Sandbox.upload_dir", "await asyncio.to_thread(...)"): _DISK,
    ("sandbox.box.Sandbox.download", "await self.read(...)"): "every request to an agent has a deadline",
    ("sandbox.box.Sandbox.download", "await asyncio.to_thread(...)"): _DISK,
    ("sandbox.box.Creating.__aenter__", "await self._making"): "a sandbox's start has a deadline",
    (
        "sandbox.box.Process.output",
        "await self.read()",
    ): "it reads until the program ends; every request has a deadline",
    ("sandbox.check.gathered", "await asyncio.gather(...)"): "of a case, which has 300 s",
    ("sandbox.host.Host.create", "await asyncio.shield(...)"): "a sandbox's start has a deadline",
    ("sandbox.host.Host._made", "self._starting"): "as above, of those before it",
    ("sandbox.host.Host.run_code", "self._running"): "programs before it have deadlines, and it has its turn",
    ("sandbox.host.Host.bulk_create", "await asyncio.gather(...)"): "each start has a deadline",
    ("sandbox.host.host_of", "await asyncio.shield(...)"): "a backend's opening has a deadline",
    ("sandbox.host._until_the_loop_ends", "await host"): "as above",
    ("sandbox.backends.local.Local._room", "await room"): "`_ask` bounds it",
    ("sandbox.host._hosts_here", "await anext(...)"): "it waits for nothing",
    ("sandbox.link.Link.call", "await future"): "whoever asks has a deadline: `Box.call`, `ports.passed`",
    ("sandbox.zygote.become_first", "os.waitpid(...)"): "it stays for as long as its host wants",
    ("sandbox.zygote.main", "link.recv(...)"): "whoever started it says what it is to be before anything else",
    ("sandbox.backends.choose.open_backend", "await opener(...)"): "backends have deadlines of their own",
    ("sandbox.backends.kept.KeptBackend.open", "await asyncio.to_thread(...)"): _DISK,
    ("sandbox.keeper.wait_for_an_end", "selector.select()"): "it keeps a sandbox for as long as its host wants",
    ("sandbox.keeper.reaped", "os.waitpid(...)"): "it only asks",
    ("sandbox.accounts.Accounts._sync_always", "await self._dirty.wait()"): "it goes on as long as the service does",
    ("sandbox.accounts.Accounts._sync_always", "await asyncio.to_thread(...)"): _DISK,
    ("sandbox.client._Http.ask.exchange", "await answer.read()"): "`ask` bounds all tries together",
    ("sandbox.client._Http.frames.exchange", "await answer.read()"): "`frames` bounds all tries together",
    ("sandbox.client._Http.frames.exchange", "_frames(...)"): "as above",
    ("sandbox.client._frames", "answer.content.iter_any()"): "as above",
    ("sandbox.holdings.Holdings.create", "await asyncio.shield(...)"): "a sandbox's start has a deadline",
    ("sandbox.holdings.Holdings._made", "await asyncio.gather(...)"): "as above",
    ("sandbox.routes._Routes.delete_many", "await asyncio.gather(...)"): "each end has a deadline",
    ("sandbox.routes._Routes.read", "await sandbox.read(...)"): "every request to an agent has a deadline",
    ("sandbox.routes._Routes.read", "await answer.prepare(...)"): "it is some bytes, which the kernel takes",
    ("sandbox.routes._streamed", "await answer.prepare(...)"): "as above",
    (
        "sandbox.routes._streamed",
        "await pieces.get()",
    ): "the last piece comes when the program beside it ends, which has a deadline",
    ("sandbox.routes._last", "await acting"): "as above",
    ("sandbox.service.Service.drain", "self._idle.wait()"): "awaited with a deadline below",
    ("sandbox.service.Service.drain", "hurry.wait()"): "awaited with a deadline below",
    ("sandbox.service._serve", "await runner.setup()"): "it waits for nothing of others",
    ("sandbox.service._serve", "await told_to_end.wait()"): "a service goes on until it is told to end",
    ("sandbox.service._serve", "await runner.cleanup()"): "it has a deadline inside, shutdown_timeout",
    ("sandbox.ports.relay", "await asyncio.gather(...)"): "each way gives up after an hour without a byte",
    ("train.exchange._Transfer.arrived", "self.work.wait()"): "the process group has a deadline",
    ("wire.chat.ChatClient._tried", "await self._http.post(...)"): "`ask` bounds all tries together",
    ("orchestrate.gateway.Gateway._join", "await future"): "the request behind it has engine.call_s",
    ("orchestrate.gateway.Gateway.close", "await asyncio.gather(...)"): "they are cancelled already",
    ("orchestrate.gateway._until_gone", "link.gone.wait()"): "it ends with the call beside it",
    ("orchestrate.gateway._until_gone", "await asyncio.wait(...)"): "the call that it waits for has engine.call_s",
    ("orchestrate.loop.Loop.run", "self.desk.tasks"): "the tasks of the loop, each of which is walked here",
    ("orchestrate.loop.Loop._receive", "await self._listener.receive()"): _LISTENS,
    ("orchestrate.measure.Evaluations.run_last", "await self._running"): _ROLLOUT,
    ("orchestrate.measure.Evaluations._measure", "await asyncio.to_thread(...)"): _DISK,
    ("orchestrate.mend._make_anew", "await asyncio.to_thread(...)"): _DISK,
    ("orchestrate.mend._make_anew", "await desk.frozen.wait(...)"): "it has train.batch_deadline_s inside",
    ("orchestrate.ship._ship", "await asyncio.to_thread(...)"): _DISK,
    ("orchestrate.ship._wait_for_answers", "await desk.frozen.wait(...)"): "it has train.batch_deadline_s inside",
    ("orchestrate.workers.WorkerPool._late_answer", "await asked.answer"): "`_deaf` ends it after env.answer_s",
    ("orchestrate.workers.WorkerPool._try", "await playing.ended"): _ROLLOUT,
    ("wire.sending.Sending._begin_if_all_are_here", "await self._begin(...)"): "it says one word to the trainer",
    ("wire.sending.Sending._heard", "await self._events[what].wait()"): "a publish has sync.deadline_s",
    ("wire.channel._LoopSocket.receive", "await self._arrived.wait()"): "every caller of a Caller gives a deadline",
    ("wire.channel.Listener.receive", "await self._socket.receive()"): _LISTENS,
    ("wire.channel.BlockingCaller.receive", "self._socket.recv_multipart()"): "ZeroMQ says that a message is there",
    ("wire.channel.BlockingCaller._was_woken", "self._woken.recv(...)"): "the socket does not block",
    ("wire.connections._Body.__aiter__", "self._answer.content.iter_any()"): "whoever reads the body has a deadline",
    ("wire.connections.Connections.handle_async_request", "await request.aread()"): "it is in memory",
    (
        "wire.policy.EngineClient._exchange",
        "await response.aread()",
    ): "`_call` bounds all attempts together",
    ("wire.policy.read_events", "parts"): "`_stream` bounds the wait for each event",
    ("wire.publish.publish.one", "slots"): "who holds one publishes, for at most sync.deadline_s",
}
"""Waits that need no deadline of their own, and why."""


BOUNDED_AS_A_WHOLE = "sandbox.cases."
"""Cases of `palestra sandbox check`: each has 300 s, in `check._outcome`."""


def _found() -> list[Wait]:
    found = [wait for module, tree in TREES.items() for wait in unbounded(tree, module, OURS)]
    return [wait for wait in found if not wait.place.startswith(BOUNDED_AS_A_WHOLE)]


def test_every_wait_has_a_deadline():
    assert [wait for wait in _found() if (wait.place, wait.text) not in ENDS_ALL_THE_SAME] == []


def test_no_reason_is_given_for_a_wait_that_is_not_there():
    assert ENDS_ALL_THE_SAME.keys() - {(wait.place, wait.text) for wait in _found()} == set()


@pytest.mark.parametrize(
    "planted",
    [
        "async def f(event):\n    await event.wait()",
        "async def f(self):\n    return await self._future",
        "async def f(queue):\n    return await queue.get()",
        "async def f(socket):\n    return await socket.receive()",
        "async def f(condition):\n    async with condition:\n        pass",
        "async def f(tasks):\n    await asyncio.gather(*tasks)",
        "async def f(stream):\n    async for line in stream:\n        pass",
        "async def f(process):\n    await process.communicate()",
        "async def f(client):\n    return await client.get('http://x', timeout=None)",
        "async def f(wait):\n    await foreign(wait)",
        "def f(thread):\n    thread.join()",
        "def f(process):\n    process.wait()",
        "def f(queue):\n    return queue.get()",
        "def f(poller):\n    poller.poll()",
        "def f(socket):\n    return socket.recv_multipart()",
        "def f():\n    subprocess.run(['sleep', '1e9'])",
        "def f():\n    return httpx.get('http://x')",
        "def f(file):\n    fcntl.flock(file, fcntl.LOCK_EX)",
        "def f():\n    dist.init_process_group('gloo')",
    ],
)
def test_a_planted_wait_without_a_deadline_is_found(planted: str):
    assert len(unbounded(ast.parse(planted), "planted", OURS)) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        "async def f(event):\n    await within(5, event.wait(), waiting_for='x')",
        "async def f(event):\n    async with asyncio.timeout(5):\n        await event.wait()",
        "async def f(caller):\n    await caller.receive(deadline_s=5, waiting_for='x')",
        "async def f(self):\n    await self.changed.wait('a free slot')",
        "async def f():\n    await asyncio.sleep(1)",
        "async def f(caller, message):\n    await caller.send(message)",
        "def f(words, given):\n    return ', '.join(words) + given.get('a')",
        "def f(process):\n    process.wait(timeout=5)",
        "def f(poller):\n    poller.poll(5 * 1000)",
        "def f():\n    subprocess.run(['true'], timeout=5)",
    ],
)
def test_a_wait_with_a_deadline_is_let_through(harmless: str):
    assert unbounded(ast.parse(harmless), "harmless", OURS) == []


def test_sending_never_waits():
    """What lets the walk pass over `send`: queues without a limit, and no waiting for a place in them."""
    source = ast.unparse(TREES["wire.channel"])
    assert source.count("setsockopt(zmq.SNDHWM, 0)") == 2
    assert "send_multipart(frames, zmq.NOBLOCK)" in source
