"""What outlives its process by a moment."""

from pathlib import Path

from palestra.core.guard import keep


def test_the_guard_removes_what_it_was_told_to(tmp_path: Path):
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "weights").touch()
    gone = 4_194_305  # above the largest process id
    keep([f"watch {gone}\n", f"remove {tmp_path / 'staging'}\n", f"watch {gone + 1}\n", f"ended {gone + 1}\n"])
    assert not (tmp_path / "staging").exists()
