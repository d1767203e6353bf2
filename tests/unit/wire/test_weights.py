"""Laws of staging: what is read is what was given, bit by bit, or an error names what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from palestra.core.errors import InfrastructureError
from palestra.wire.weights import files
from palestra.wire.weights.manifest import MANIFEST, Probe, Staged, read_manifest, record, recorded

TENSORS = {
    "embed": torch.arange(60, dtype=torch.float32).reshape(10, 6),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "counts": torch.arange(7),
}


def stage(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: int) -> None:
    files.stage(directory, 3, 1, tensors.items(), **options)


def read(directory: Path) -> dict[str, torch.Tensor]:
    return dict(files.read(directory, read_manifest(directory)))


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 1 << 30])
def test_what_is_read_is_what_was_staged(tmp_path: Path, max_shard_bytes: int) -> None:
    stage(tmp_path / "v3", max_shard_bytes=max_shard_bytes)
    found = read(tmp_path / "v3")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_shards_stay_below_their_bound_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    stage(tmp_path, max_shard_bytes=100)
    manifest = read_manifest(tmp_path)
    sizes: dict[str, list[int]] = {}
    for entry in manifest.tensors:
        sizes.setdefault(entry.file, []).append(TENSORS[entry.name].nbytes)
    assert all(sum(shard) <= 100 or len(shard) == 1 for shard in sizes.values())
    assert len(sizes) > 1


def test_slices_of_one_storage_are_separate_tensors(tmp_path: Path) -> None:
    experts = torch.randn(4, 6, 2)
    stage(tmp_path, {f"experts.{index}": experts[index] for index in range(4)})
    assert torch.equal(read(tmp_path)["experts.2"], experts[2])


def test_the_manifest_says_version_attempt_and_shapes(tmp_path: Path) -> None:
    stage(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.version, manifest.attempt) == (3, 1)
    assert {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}["half"] == ("bfloat16", (3, 5))


def test_a_flipped_bit_is_found_and_its_tensor_named(tmp_path: Path) -> None:
    stage(tmp_path, {"first": torch.zeros(8), "second": torch.ones(8)})
    [shard] = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InfrastructureError, match=r"tensor second in weights-00000\.safetensors arrived corrupted"):
        read(tmp_path)


def test_the_hash_covers_dtype_and_shape_too() -> None:
    zeros = torch.zeros(4, dtype=torch.int32)
    assert files.hash_tensor(zeros) == files.hash_tensor(zeros.clone())
    assert files.hash_tensor(zeros) != files.hash_tensor(zeros.float())
    assert files.hash_tensor(zeros) != files.hash_tensor(zeros.reshape(2, 2))


def test_a_torn_shard_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    stage(tmp_path)
    [shard] = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(InfrastructureError, match="weights-00000"):
        read(tmp_path)


def test_a_shard_that_was_discarded_too_early(tmp_path: Path) -> None:
    stage(tmp_path)
    [shard] = tmp_path.glob("*.safetensors")
    shard.unlink()
    with pytest.raises(InfrastructureError, match="discarded too early"):
        read(tmp_path)


def test_a_tensor_given_twice_is_refused(tmp_path: Path) -> None:
    twice = [("weight", torch.zeros(2)), ("other", torch.ones(2)), ("weight", torch.zeros(2))]
    for max_shard_bytes in (1, 1 << 30):  # in two shards, in one
        with pytest.raises(InfrastructureError, match="tensor weight occurs twice"):
            files.stage(tmp_path, 1, 1, twice, max_shard_bytes)


def test_a_tied_tensor_given_under_both_names_is_refused(tmp_path: Path) -> None:
    tied = torch.zeros(2, 3)
    with pytest.raises(InfrastructureError, match="share memory"):
        stage(tmp_path, {"embed": tied, "head": tied})


def test_an_interrupted_stage_has_no_manifest(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.stage(tmp_path, 1, 1, interrupted(), max_shard_bytes=1)
    with pytest.raises(InfrastructureError, match="was the version staged"):
        read_manifest(tmp_path)


def test_staging_again_leaves_nothing_of_the_stage_before(tmp_path: Path) -> None:
    stage(tmp_path / "v3", max_shard_bytes=1)
    stage(tmp_path / "v3", {"only": torch.ones(2)})
    assert sorted(path.name for path in (tmp_path / "v3").iterdir()) == [MANIFEST, "weights-00000.safetensors"]


def test_discard_needs_nothing_to_be_there(tmp_path: Path) -> None:
    files.discard(tmp_path / "never staged")
    stage(tmp_path / "v3")
    files.discard(tmp_path / "v3")
    assert not (tmp_path / "v3").exists()


def test_recorded_versions_are_of_no_attempt(tmp_path: Path):
    """A resumed run stages anew what its checkpoint lacks; an engine refuses an attempt before the one it has seen."""
    for version, attempt in ((50, 2), (51, 1)):
        directory = tmp_path / f"staged-{version}"
        files.stage(directory, version, attempt, TENSORS.items())
        staged = Staged(version=version, directory=str(directory), probe=Probe(token_ids=[1, 2], logprobs=[-1.0]))
        record(staged, tmp_path / "published")
        assert read_manifest(directory).attempt == attempt, "what the engines are about to load stays as it is"
    kept = recorded(tmp_path / "published")
    assert [(read_manifest(Path(staged.directory)).attempt, staged.version) for staged in kept] == [(0, 50), (0, 51)]
    assert all(read(Path(staged.directory))["counts"].equal(TENSORS["counts"]) for staged in kept)
