"""trackio: its database says how far it was told, so it goes on from there. What it had not written when it was killed
is told again."""

from typing import Any

from palestra.launch.sinks.following import Once, Row


class Trackio:
    """Imports trackio, which is not installed with the tools of tests: its Pillow is not that of the CPU build."""

    def __init__(self, *, project: str, name: str, config: dict[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

        self._library, self._storage = trackio, SQLiteStorage
        self._project, self._name, self._config = project, name, config
        self._once = Once()
        self._run: Any = None

    def begin(self, rows: list[Row]) -> None:
        self.close()
        known = self._storage.get_max_step_for_run(self._project, self._name)
        self._run = self._library.init(
            project=self._project,
            name=self._name,
            config=self._config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._once = Once()
        for row in self._once.new(rows):
            if known is None or row.number > known:
                self._log(row)

    def tell(self, rows: list[Row]) -> None:
        for row in self._once.new(rows):
            self._log(row)

    def _log(self, row: Row) -> None:
        self._run.log({"train_step": row.step, **row.values}, step=row.number)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
