"""Laws of staging: what is read is what was given, bit by bit, or an error names what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from palestra.core.errors import InfrastructureError
from palestra.wire.weights import files
from palestra.wire.weights.local import fetch
from palestra.wire.weights.manifest import (
    MANIFEST,
    Probe,
    Staged,
    WeightsManifest,
    chain,
    read_manifest,
    record,
    recorded,
    write_manifest,
)

TENSORS = {
    "embed": torch.arange(60, dtype=torch.float32).reshape(10, 6),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "counts": torch.arange(7),
}


def stage(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS, max_shard_bytes: int = 1 << 30) -> None:
    files.stage(directory, 3, 1, tensors.items(), max_shard_bytes)


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
    with pytest.raises(InfrastructureError, match=r"tensor second in \S+weights-00000\.safetensors arrived corrupted"):
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


def versions(directory: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """v0 whole, the others each as what changed: a few numbers of one, all of another, nothing of the rest."""
    found = [{name: tensor.contiguous().clone() for name, tensor in TENSORS.items()} | {"many": torch.zeros(4000)}]
    files.stage(directory / "v0", 0, 1, found[0].items())
    for version in range(1, count):
        tensors = {name: tensor.clone() for name, tensor in found[-1].items()}
        tensors["many"][version::97] = -0.0 if version % 2 else float("nan")
        tensors["embed"] *= -3.0
        found.append(tensors)
        previous = directory / f"v{version - 1}"
        files.stage(directory / f"v{version}", version, 1, tensors.items(), previous=previous, max_shard_bytes=200)
    return found


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(
        files.hash_tensor(found[name]) == files.hash_tensor(expected[name]) for name in expected
    )


def test_any_version_is_put_together_from_what_lies_in_staging(tmp_path: Path) -> None:
    """In any order and from nothing, as an engine does that joined late or missed versions."""
    expected = versions(tmp_path, 5)
    for version in (4, 0, 2, 3, 1):
        assert same_bits(read(tmp_path / f"v{version}"), expected[version])
    assert [path.name for path in chain(tmp_path / "v4")] == ["v0", "v1", "v2", "v3", "v4"]


def test_only_what_changed_is_sent(tmp_path: Path) -> None:
    versions(tmp_path, 2)
    manifest = read_manifest(tmp_path / "v1")
    changed = {entry.name: entry.num_changed for entry in manifest.tensors}
    assert changed == dict.fromkeys(TENSORS, 0) | {"embed": None, "many": 42}
    assert manifest.sent_bytes == TENSORS["embed"].nbytes + 42 + 42 + 42 * 4  # whole; gaps, steps, and far ones
    assert manifest.full_bytes == sum(tensor.nbytes for tensor in TENSORS.values()) + 16000
    assert read_manifest(tmp_path / "v0").sent_bytes == manifest.full_bytes


def test_a_version_that_changed_all_over_is_whole_and_needs_no_other(tmp_path: Path) -> None:
    stage(tmp_path / "v0", {"a": torch.ones(50), "b": torch.ones(50)})
    doubled = {"a": torch.full((50,), 2.0), "b": torch.full((50,), 5.0)}
    files.stage(tmp_path / "v1", 4, 1, doubled.items(), previous=tmp_path / "v0")
    assert read_manifest(tmp_path / "v1").previous == ""
    files.discard(tmp_path / "v0")
    assert same_bits(read(tmp_path / "v1"), doubled)


def test_a_new_tensor_and_one_of_another_shape_go_whole(tmp_path: Path) -> None:
    stage(tmp_path / "v0", {"same": torch.ones(50), "grows": torch.zeros(2)})
    tensors = {"same": torch.ones(50), "grows": torch.zeros(3), "new": torch.zeros(1)}
    files.stage(tmp_path / "v1", 4, 1, tensors.items(), previous=tmp_path / "v0")
    assert same_bits(read(tmp_path / "v1"), tensors)


def rebased(directory: Path, version: str, previous: str) -> None:
    """Plant a fault: the difference is to be applied to another version than it was taken from."""
    manifest = read_manifest(directory / version)
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    write_manifest(directory / version, WeightsManifest(**{**fields, "previous": previous}))


def test_a_difference_applied_to_the_wrong_base_is_refused(tmp_path: Path) -> None:
    versions(tmp_path, 4)
    rebased(tmp_path, "v3", "v1")
    with pytest.raises(InfrastructureError, match=r"tensor many in v3/weights-\d+\.safetensors arrived corrupted"):
        read(tmp_path / "v3")


def test_of_several_links_the_torn_one_is_named(tmp_path: Path) -> None:
    versions(tmp_path, 4)
    [file] = {entry.file for entry in read_manifest(tmp_path / "v1").tensors if entry.name == "many"}
    content = bytearray((tmp_path / "v1" / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / "v1" / file).write_bytes(content)
    with pytest.raises(InfrastructureError, match=r"tensor many in v1/"):
        read(tmp_path / "v3")


def test_a_base_that_is_missing_or_not_older(tmp_path: Path) -> None:
    versions(tmp_path, 4)
    rebased(tmp_path, "v2", "v3")
    with pytest.raises(InfrastructureError, match="is not older than what follows"):
        read(tmp_path / "v3")
    rebased(tmp_path, "v2", "v1")
    files.discard(tmp_path / "v0")
    with pytest.raises(InfrastructureError, match=r"v3 cannot be put together: \S+v0/manifest.json cannot be read"):
        read(tmp_path / "v3")


def test_an_engine_far_from_staging_copies_only_what_is_new(tmp_path: Path) -> None:
    staging, own = tmp_path / "staging", tmp_path / "own"
    expected = versions(staging, 4)
    assert same_bits(read(fetch(staging / "v2", own)), expected[2])
    for version in (0, 1, 2):  # what is there is not read again
        [*shards] = (staging / f"v{version}").glob("*.safetensors")
        for shard in shards:
            shard.unlink()
    assert same_bits(read(fetch(staging / "v3", own)), expected[3])
    files.discard(staging / "v0")  # for control: what is neither here nor there
    files.discard(own / "staging" / "v0")
    with pytest.raises(InfrastructureError, match="cannot be put together"):
        fetch(staging / "v3", own)


def test_copies_go_when_staging_has_them_no_more_and_broken_off_ones_are_made_anew(tmp_path: Path) -> None:
    staging, own = tmp_path / "staging", tmp_path / "own"
    expected = versions(staging, 2)
    fetch(staging / "v1", own)
    (own / "staging" / "v1" / MANIFEST).unlink()  # killed before the last file
    stage(staging / "v5", {"only": torch.ones(2)})
    assert same_bits(read(fetch(staging / "v1", own)), expected[1])
    files.discard(staging / "v0")
    files.discard(staging / "v1")
    assert list(read(fetch(staging / "v5", own))) == ["only"]
    assert sorted(path.name for path in (own / "staging").glob("v*")) == ["v5"]


def test_staged_again_under_its_name_it_is_copied_again(tmp_path: Path) -> None:
    staging, own = tmp_path / "staging", tmp_path / "own"
    stage(staging / "v3", {"only": torch.ones(2)})
    fetch(staging / "v3", own)
    stage(staging / "v3", {"only": torch.zeros(2)})
    assert read(fetch(staging / "v3", own))["only"].tolist() == [0.0, 0.0]
