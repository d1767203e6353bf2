"""A scripted run whose processes can be killed one by one, as a supervisor sees it: each gets a successor."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from palestra.config.schema import RunConfig
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.records import RolloutRecord
from palestra.orchestrate.checkpoint import recover_journal
from palestra.orchestrate.loop import Loop
from palestra.wire.channel import Caller, Listener
from palestra.wire.messages import Done, Play, ProcessEnded, ProcessStarted, Restart, ToSupervisor
from palestra.wire.policy import EngineError, UnreachableError
from palestra.wire.rundir import Attempt, RunDir, version_to_load
from tests.unit.orchestrate.scripted import ScriptedEngine, ScriptedTrainer, ScriptedWorker, threads_of_its_own

TIMEOUT_S = 60
Predicate = Callable[[Play], bool]


class Server(ScriptedEngine):
    """An engine that clients of several orchestrators may talk to, and that may die. `history` has every version it
    loaded, in all its lives; `fails_at` is one that its probe does not show."""

    def __init__(self, url: str, **options):
        super().__init__(url, **options)
        self.history: list[int] = []
        self.fails_at: int | None = None
        self.is_updating, self.num_deaths = False, 0
        self.is_alive = asyncio.Event()
        self.is_alive.set()

    def die(self) -> None:
        self.is_alive.clear()
        self.loaded, self.is_updating = -1, False
        self.num_deaths += 1

    async def _take(self, seconds: float) -> None:
        """A request dies with the life of the engine that it was sent to."""
        before = self.num_deaths
        await super()._take(seconds)
        if self.num_deaths > before:
            raise UnreachableError(f"{self.url} died")

    def _require_alive(self) -> None:
        if not self.is_alive.is_set():
            raise UnreachableError(f"{self.url} is dead")

    async def wait_healthy(self, deadline_s):
        await self.is_alive.wait()

    async def generate(self, *args, **options):
        self._require_alive()
        return await super().generate(*args, **options)

    async def stream(self, *args, **options):
        self._require_alive()
        return await super().stream(*args, **options)

    async def score(self, token_ids, *, deadline_s=None):
        self._require_alive()
        return [-9.0 if self.loaded == self.fails_at else -1.0] * (len(token_ids) - 1)

    async def start_update(self, *, deadline_s=None):
        self._require_alive()
        if self.is_updating:
            raise EngineError("start_weight_update called while a weight update is already active")
        self.is_updating = True

    async def abandon_update(self, *, deadline_s=None):
        self._require_alive()
        self.is_updating = False

    async def finish(self, version, *, deadline_s=None):
        self._require_alive()
        self.is_updating, self.loaded = False, version
        self.history.append(version)

    def forget(self):
        pass  # a client's affair: the server is as it is


class _Hears:
    """A channel of a worker that does not hear everything."""

    def __init__(self, channel: Caller, hears: Callable[[Any], bool]):
        self._channel, self._hears = channel, hears
        self.send, self.close = channel.send, channel.close

    async def receive(self, **options: Any) -> Any:
        while not self._hears(message := await self._channel.receive(**options)):
            pass
        return message


class MortalWorker(ScriptedWorker):
    """`deadly`: plays that kill it. `stuck`: plays that block its event loop: it hears nothing any more."""

    def __init__(self, attempt, reward, *, index: int, life: int, deadly: Predicate, stuck: Predicate):
        super().__init__(attempt, reward, index=index, life=life)
        self.is_dying, self._is_stuck = asyncio.Event(), False
        self._deadly, self._stuck = deadly, stuck
        self._channel = _Hears(self._channel, self._listens)  # type: ignore[assignment]

    def _listens(self, message: Any) -> bool:
        if isinstance(message, Play) and self._deadly(message):
            self.is_dying.set()
        self._is_stuck = self._is_stuck or (isinstance(message, Play) and self._stuck(message))
        return not (self._is_stuck or self.is_dying.is_set())


class MortalTrainer(ScriptedTrainer):
    """`trained` is what its weights hold, the batches in order: those of the checkpoint, and what it trained itself."""

    def __init__(self, *args, checkpoints: dict[int, list], **options):
        super().__init__(*args, **options)
        self._checkpoints = checkpoints
        self.trained = list(checkpoints.get(self._version, []))

    async def _train(self, step: int, publish: bool, save: bool) -> None:
        await super()._train(step, publish, save)
        if save:
            self._checkpoints[self._version] = list(self.trained)


class MortalRun:
    """The real loop, scripted peers, and what a supervisor does."""

    def __init__(
        self,
        config: RunConfig,
        *,
        reward: Callable[[RolloutRecord], float],
        num_engines: int = 1,
        delay_s: float = 0.002,
        step_s: float = 0.01,
        deadly: Predicate = lambda play: False,
        stuck: Predicate = lambda play: False,
    ):
        self._config, self._reward, self._step_s, self._deadly, self._stuck = config, reward, step_s, deadly, stuck
        self.run = RunDir(config.run_dir)
        self.run.path.mkdir(parents=True, exist_ok=True)
        self.attempt = Attempt(
            number=1,
            resumed_from=None,
            supervisor=f"ipc://{self.run.path}/s",
            orchestrator=f"ipc://{self.run.path}/o",
            engines=tuple(f"http://engine-{i}" for i in range(num_engines)),
            staging="",
            started_at=time.time(),
        )
        self.run.write_attempt(self.attempt)
        self.servers = {url: Server(url, delay_s=lambda seed: delay_s) for url in self.attempt.engines}
        self.engines = {f"engine-{i}": self.servers[url] for i, url in enumerate(self.attempt.engines)}
        self.checkpoints: dict[int, list] = {}
        self.lives: dict[str, int] = {}
        self.restarts: list[Restart] = []
        self.is_done = asyncio.Event()
        self.workers: dict[str, MortalWorker] = {}
        self._tasks: dict[str, asyncio.Task] = {}
        self._dying: set[str] = set()  # and not started again yet
        self.supervisor: Listener = Listener(self.attempt.supervisor, attempt=1, receives=ToSupervisor)

    # --- processes

    def start(self, name: str) -> None:
        self._dying.discard(name)
        life = self.lives[name] = self.lives.get(name, -1) + 1
        self._tasks[name] = asyncio.create_task(self._process(name, life))

    async def kill(self, name: str, *, why: str = "killed by SIGKILL") -> None:
        """And tell the orchestrator, if it is there."""
        self._dying.add(name)
        await self._end(name)
        await self._tell(ProcessEnded(process=name, why=why, life=self.lives[name]))

    async def restart(self, name: str) -> None:
        self.start(name)
        await self._tell(ProcessStarted(process=name, life=self.lives[name]))

    async def replace(self, name: str, *, gone_s: float = 0.05) -> None:
        await self.kill(name)
        await asyncio.sleep(gone_s)
        await self.restart(name)

    def _process(self, name: str, life: int) -> Coroutine[Any, Any, None]:
        if name in self.engines:
            return self._serve(self.engines[name])
        if name == "orchestrator":
            return self._orchestrate(life)
        if name == "trainer":
            return self._train(life)
        return self._work(int(name.removeprefix("env-")), life)

    async def _serve(self, server: Server) -> None:
        server.is_alive.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.die()

    async def _orchestrate(self, life: int) -> None:
        with threads_of_its_own():
            await self._loop_of(life).run()

    def _loop_of(self, life: int) -> Loop:
        journal = recover_journal(self.run, version_to_load(self.run, self.attempt, life))
        selector = LedgerSelector(Ledger("orchestrator"))
        make: Any = self.servers.__getitem__
        self.loop = Loop(self._config, self.run, self.attempt, journal, selector, life=life, make_client=make)
        return self.loop

    async def _train(self, life: int) -> None:
        version = version_to_load(self.run, self.attempt, life) or 0
        options: dict[str, Any] = {"version": version, "step_s": self._step_s, "life": life}
        self.trainer = MortalTrainer(self.run, self.attempt, checkpoints=self.checkpoints, **options)
        try:
            await self.trainer.run()
        finally:
            self.trainer._channel.close()

    async def _work(self, index: int, life: int) -> None:
        worker = MortalWorker(
            self.attempt, self._reward, index=index, life=life, deadly=self._deadly, stuck=self._stuck
        )
        self.workers[worker.name] = worker
        dying = asyncio.create_task(worker.is_dying.wait())
        working = asyncio.create_task(worker.run())
        with contextlib.closing(worker._channel):  # also if it is killed twice
            try:
                await asyncio.wait([dying, working], return_when=asyncio.FIRST_COMPLETED)
                if dying.done():
                    self._tasks[f"burial of {worker.name}"] = asyncio.create_task(self.replace(worker.name))
                    await asyncio.Event().wait()
            finally:
                for task in (dying, working):
                    task.cancel()
                await asyncio.gather(dying, working, return_exceptions=True)

    async def _end(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)

    # --- the supervisor

    async def _tell(self, message: ProcessEnded | ProcessStarted) -> None:
        with contextlib.suppress(Exception):  # nobody is there: with its first word it hears how things stand
            await self.supervisor.send("orchestrator", message)

    async def _listen(self) -> None:
        greeted = 0
        while True:
            _, message = await self.supervisor.receive()
            if self.lives["orchestrator"] > greeted:
                greeted = self.lives["orchestrator"]
                for name, life in self.lives.items():
                    if life and name != "orchestrator":
                        await self._tell(ProcessStarted(process=name, life=life))
                for name in ("trainer", *self.workers):
                    if self._tasks[name].done() and name not in self._dying:  # it did all it had to, for another one
                        await self.restart(name)
            match message:
                case Restart() if message.life == self.lives.get(message.process, 0) and self._is_there(message):
                    self.restarts.append(message)
                    await self.replace(message.process)
                case Done():
                    self.is_done.set()

    def _is_there(self, message: Restart) -> bool:
        """A death may be noticed by others before word of it comes."""
        return message.process in self._tasks and message.process not in self._dying

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                for name, task in self._tasks.items():
                    if task.done() and not task.cancelled() and task.exception() is not None:
                        raise AssertionError(f"{name} ended before {what}") from task.exception()
                await asyncio.sleep(0.002)

    async def __aenter__(self) -> "MortalRun":
        self._tasks["supervisor"] = asyncio.create_task(self._listen())
        for name in (*self.engines, "orchestrator", *(f"env-{i}" for i in range(self._config.env.workers)), "trainer"):
            self.start(name)
        await self.until(lambda: hasattr(self, "loop"), "the loop began")
        return self

    async def __aexit__(self, *failure: object) -> None:
        if failure[0] is None:
            await self.until(self.is_done.is_set, "the run was done")
            await asyncio.gather(self._tasks["orchestrator"])
        for name in sorted(self._tasks, key=lambda name: not name.startswith("burial")):  # they would start others
            await self._end(name)
        self.supervisor.close()

    # --- what it shows

    @property
    def state(self):
        return self.loop.desk.state

    @property
    def history(self) -> list[int]:
        """Versions in the order the first engine loaded them."""
        return next(iter(self.servers.values())).history
