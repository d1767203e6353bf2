"""How much of the weights changes from one recorded version of a run to the next, and what telling it costs.

    palestra run RECIPE log.keep_weights=true train.steps=6
    python benchmarks/weight_differences.py outputs/RUN [--json]

Every recorded version is staged anew as a difference from the one before, read back and compared by hash; `whole` is
the same version staged and read whole. Bytes are those of the files' tensors. Nothing of the run is changed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from palestra.wire.rundir import RunDir
from palestra.wire.weights import files
from palestra.wire.weights.manifest import WeightsManifest, read_manifest, recorded


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One version. `changed`: elements that are not what they were, of all; `sent`: bytes, of the whole version's."""

    version: int
    changed: float
    sent: float
    full_bytes: int
    whole_stage_s: float
    stage_s: float
    whole_read_s: float
    read_s: float


def measure(directories: list[Path], work: Path) -> Iterator[Row]:
    """Errors: InfrastructureError, if a version does not come out as it went in."""
    previous: Path | None = None
    for number, directory in enumerate(directories):
        own, beside = work / f"v{number:06d}", work / "whole"
        whole, whole_stage_s, whole_read_s = _round(directory, beside, number, None)
        manifest, stage_s, read_s = _round(directory, own, number, previous)
        if [entry.hash for entry in manifest.tensors] != [entry.hash for entry in whole.tensors]:
            raise SystemExit(f"{own} is not {directory}")
        if previous is not None:
            yield Row(
                version=read_manifest(directory).version,
                changed=_changed(manifest),
                sent=manifest.sent_bytes / manifest.full_bytes,
                full_bytes=manifest.full_bytes,
                whole_stage_s=whole_stage_s,
                stage_s=stage_s,
                whole_read_s=whole_read_s,
                read_s=read_s,
            )
        previous = own


def _round(source: Path, target: Path, version: int, previous: Path | None) -> tuple[WeightsManifest, float, float]:
    """Stage and read back, which checks every tensor's hash; the seconds of each."""
    tensors = list(files.read(source, read_manifest(source)))
    began = time.perf_counter()
    manifest = files.stage(target, version, 0, tensors, previous=previous)
    staged = time.perf_counter()
    for _ in files.read(target, manifest):
        pass
    return manifest, staged - began, time.perf_counter() - staged


def _changed(manifest: WeightsManifest) -> float:
    """Of tensors that went whole, all elements count."""
    sizes = [_size(entry.shape) for entry in manifest.tensors]
    changed = [
        size if entry.num_changed is None else entry.num_changed
        for size, entry in zip(sizes, manifest.tensors, strict=True)
    ]
    return sum(changed) / sum(sizes)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directories = [Path(staged.directory) for staged in recorded(RunDir(arguments.run).published)]
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as work:
        rows = list(measure(directories, Path(work)))
    if arguments.json:
        print(json.dumps([msgspec.to_builtins(row) for row in rows], indent=2))
        return
    print("version  changed     sent  of bytes     stage s (whole)    read s (whole)")
    for row in rows:
        print(
            f"{row.version:7d} {row.changed:8.3%} {row.sent:8.3%} {row.full_bytes:9,d} "
            f"{row.stage_s:9.3f} ({row.whole_stage_s:.3f}) {row.read_s:9.3f} ({row.whole_read_s:.3f})"
        )


if __name__ == "__main__":
    main()
