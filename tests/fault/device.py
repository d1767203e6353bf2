"""The one device that engine and trainer of a faulty run share: who is on it while another is, is noted down."""

import fcntl
import os

from tests.fault.witness import Witness


class Device:
    """Of one process. A lock that the kernel takes back from processes that are killed."""

    def __init__(self, witness: Witness, process: str):
        self._witness, self._process = witness, process
        self._file = os.open(witness.directory / "device.lock", os.O_CREAT | os.O_RDWR)

    def enter(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._witness.entered(self._process, is_alone=False)
        else:
            self._witness.entered(self._process, is_alone=True)

    def leave(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    # --- the trainer's, as its belongings

    bring_back, put_away = enter, leave
