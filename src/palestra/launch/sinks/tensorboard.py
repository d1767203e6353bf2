"""TensorBoard's event files in RUN/tensorboard, made from metrics.jsonl: when a step is measured again, all of them."""

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from palestra.launch.sinks.following import Once, Row


class TensorBoard:
    def __init__(self, directory: Path):
        self._directory, self._once = directory, Once()
        self._all: list[Row] = []
        self._writer: EventFileWriter | None = None

    def begin(self, rows: list[Row]) -> None:
        self.close()
        for old in self._directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._all = list(rows)
        self._writer = EventFileWriter(str(self._directory))
        # A TensorBoard that looks on forgets what it has read of the older file.
        self._writer.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        self._write(self._once.latest(rows))

    def tell(self, rows: list[Row]) -> None:
        if self._once.has_again(rows):
            self.begin(self._all + rows)
            return
        self._all += rows
        self._write(list(self._once.new(rows)))

    def _write(self, rows: list[Row]) -> None:
        assert self._writer is not None
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            self._writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
