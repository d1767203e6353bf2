"""Staging: what lies there is the version, versions go when they are not needed, the probe tells versions apart."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from palestra.core.ledger import Ledger
from palestra.model.load import load_policy
from palestra.train.publish import KEPT_COPIES, KEPT_VERSIONS, Differences, Publisher
from palestra.wire.weights import files, handles
from palestra.wire.weights.manifest import WeightsManifest, read_manifest, record, recorded
from tests.unit.wire.fake_gpu import DEVICE, fake_gpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    import palestra.wire.weights.changes_sender  # noqa: F401
    from tests.unit.wire import fake_m2n


@pytest.fixture
def policy(qwen, ranks):
    return load_policy(
        str(qwen),
        dtype=torch.float32,
        experts="grouped_mm",
        head_chunk_tokens=16,
        meshes=ranks.meshes,
        device=ranks.device,
    )


@pytest.fixture
def publisher(policy, ranks, tmp_path):
    return Publisher(policy, ranks=ranks, directory=tmp_path, attempt=4, dtype=torch.float32, probe_tokens=20, seed=0)


def _staging_publisher(policy, ranks, tmp_path, **settings) -> Publisher:
    directory = tmp_path / "staging"
    return Publisher(policy, ranks=ranks, directory=directory, attempt=1, probe_tokens=20, seed=0, **settings)


def _change(policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)


def test_the_probe_is_what_transformers_says_of_the_staged_tensors(publisher, policy, qwen):
    _change(policy)
    staged = publisher.stage(3, Ledger("test"))
    manifest = read_manifest(Path(staged.directory))
    assert (manifest.version, manifest.attempt, staged.version) == (3, 4, 3)
    own = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32, attn_implementation="eager").eval()
    own.load_state_dict(dict(files.read(staged.directory, manifest)), strict=False)
    ids = torch.tensor(staged.probe.token_ids)
    with torch.no_grad():
        expected = own(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(staged.probe.logprobs), expected, atol=1e-5, rtol=1e-5)
    assert len(staged.probe.logprobs) == 19


def test_the_probe_remembers_the_version_before(publisher, policy):
    first = publisher.stage(0, Ledger("test")).probe
    _change(policy)
    second = publisher.stage(1, Ledger("test")).probe
    assert first.previous_logprobs is None
    assert second.previous_logprobs == first.logprobs != second.logprobs
    assert second.token_ids == first.token_ids


def test_versions_older_than_the_loaded_one_go(publisher, tmp_path):
    for version in range(3):
        publisher.stage(version, Ledger("test"))
    publisher.loaded(2)
    assert [path.name for path in tmp_path.iterdir()] == ["v000002"]
    publisher.loaded(2)


def test_says_when_it_is_full_and_removes_nothing_by_itself(publisher, tmp_path):
    """An engine may be loading the oldest."""
    for version in range(KEPT_VERSIONS):
        assert not publisher.is_full
        publisher.stage(version, Ledger("test"))
    assert publisher.is_full
    assert len(list(tmp_path.iterdir())) == KEPT_VERSIONS
    publisher.loaded(1)
    assert not publisher.is_full


@pytest.fixture
def differing(policy, ranks, tmp_path):
    """A publisher of differences; every fifth version is whole."""
    return _staging_publisher(
        policy,
        ranks,
        tmp_path,
        dtype=torch.bfloat16,
        recorded_in=tmp_path / "published",
        full_every=5,
    )


def _nudge(policy) -> None:
    """Change few of the bits that bfloat16 has, as a step of reinforcement learning does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.view(-1)[::37] *= 1.01


def _whole_versions(staged) -> list[int]:
    return [one.version for one in staged if not read_manifest(Path(one.directory)).previous]


def test_differences_are_staged_and_each_version_is_what_was_recorded_whole(differing, policy, tmp_path):
    staged = []
    for version in range(7):
        staged.append(differing.stage(version, Ledger("test")))
        _nudge(policy)
    assert _whole_versions(staged) == [0, 5]
    assert all(one.sent_bytes < 0.1 * one.full_bytes for one in staged if one.version not in (0, 5))
    assert all(one.stage_s > 0 for one in staged)
    for one, kept in zip(staged, recorded(tmp_path / "published"), strict=True):
        assert not read_manifest(Path(kept.directory)).previous, "what is kept needs no other version"
        tensors, whole = (dict(files.read(each.directory, read_manifest(Path(each.directory)))) for each in (one, kept))
        assert tensors.keys() == whole.keys()
        assert all(files.hash_tensor(tensors[name]) == files.hash_tensor(whole[name]) for name in tensors)


def test_what_a_later_version_is_put_together_from_stays(differing, policy, tmp_path):
    for version in range(5):
        differing.stage(version, Ledger("test"))
        _nudge(policy)
    differing.loaded(3)
    there = sorted(path.name for path in (tmp_path / "staging").iterdir())
    assert there == [f"v{version:06d}" for version in range(5)], "engines that join load 3 from 0 on"
    differing.stage(5, Ledger("test"))
    differing.loaded(5)
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["v000005"]


def test_after_a_restart_the_first_is_whole_and_the_life_before_is_left_to_engines(differing, policy, ranks, tmp_path):
    for version in range(3):
        differing.stage(version, Ledger("test"))
        _nudge(policy)
    again = _staging_publisher(
        policy,
        ranks,
        tmp_path,
        life=1,
        dtype=torch.bfloat16,
        full_every=5,
    )
    staged = [again.stage(1, Ledger("test")), again.stage(2, Ledger("test"))]
    assert _whole_versions(staged) == [1]
    again.loaded(2)
    left = sorted(path.name for path in (tmp_path / "staging").iterdir())
    assert left == ["v000000", "v000001", "v000001.1", "v000002", "v000002.1"]
    again.loaded(3)  # a version of the life before, which went further
    assert not list((tmp_path / "staging").iterdir())
    assert _whole_versions([again.stage(3, Ledger("test"))]) == [3]


def test_a_version_is_handed_out_by_handle_until_a_later_one_is_loaded(policy, ranks, tmp_path, monkeypatch):
    memory = fake_gpu(monkeypatch)
    publisher = _staging_publisher(
        policy,
        ranks,
        tmp_path,
        dtype=torch.float32,
        recorded_in=tmp_path / "published",
        by_handle=True,
    )
    staged = []
    for version in range(KEPT_COPIES):
        assert not publisher.is_full
        staged.append(Path(publisher.stage(version, Ledger("test")).directory))
        _change(policy)
    assert publisher.is_full, "each is a copy of the model in the GPU's memory"
    for directory, kept in zip(staged, recorded(tmp_path / "published"), strict=True):
        handed = dict(handles.read(directory, read_manifest(directory), DEVICE))
        whole = dict(files.read(kept.directory, read_manifest(Path(kept.directory))))
        assert handed.keys() == whole.keys()
        assert all(torch.equal(handed[name], whole[name]) for name in whole)
    publisher.loaded(1)
    assert not publisher.is_full
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["v000001"]
    num_handed_out = len(memory)
    for version in range(2, 6):
        serving = dict(handles.read(staged[-1], read_manifest(staged[-1]), DEVICE))
        before = {name: tensor.clone() for name, tensor in serving.items()}
        staged.append(Path(publisher.stage(version, Ledger("test")).directory))
        assert all(torch.equal(serving[name], before[name]) for name in serving), "what an engine may still read"
        _change(policy)
        publisher.loaded(version)
    assert len(memory) == num_handed_out, "no memory is handed out twice"


def test_large_differences_bring_the_next_whole_version_forward():
    differences = Differences(full_every=100)
    for version, (sent, is_next_whole) in enumerate([(1000, False), (300, False), (300, True)]):
        path = Path("/")  # a directory that exists
        previous = "before" if version else ""
        manifest = WeightsManifest(
            version=version, attempt=1, tensors=(), previous=previous, sent_bytes=sent, full_bytes=1000
        )
        differences.staged(path, manifest)
        assert (differences.previous is None) is is_next_whole


def test_time_is_booked(publisher):
    ledger = Ledger("test")
    publisher.stage(0, ledger)
    assert {"stage", "probe"} <= ledger.close().parts_s.keys()


def test_staging_leaves_the_policy_sharded(publisher, policy):
    """The parameters the optimizer holds are the policy's own again, not a gathered copy."""
    before = {id(parameter) for parameter in policy.parameters()}
    publisher.stage(0, Ledger("test"))
    assert {id(parameter) for parameter in policy.parameters()} == before


def test_recorded_versions_outlive_the_staged_ones(policy, ranks, tmp_path):
    kept = tmp_path / "published"
    publisher = _staging_publisher(
        policy,
        ranks,
        tmp_path,
        dtype=torch.float32,
        recorded_in=kept,
    )
    staged = [publisher.stage(version, Ledger("test")) for version in range(3)]
    tensors = dict(files.read(staged[0].directory, read_manifest(Path(staged[0].directory))))
    publisher.loaded(3)
    assert not list((tmp_path / "staging").iterdir())
    found = recorded(kept)
    assert [one.version for one in found] == [0, 1, 2]
    assert [one.probe for one in found] == [one.probe for one in staged]
    again = dict(files.read(found[0].directory, read_manifest(Path(found[0].directory))))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_a_version_recorded_in_halves_does_not_exist(publisher, tmp_path):
    kept = tmp_path / "published"
    record(publisher.stage(0, Ledger("test")), kept)
    record(publisher.stage(1, Ledger("test")), kept)
    (kept / "000001" / "staged.json").unlink()  # killed before the last file
    assert [one.version for one in recorded(kept)] == [0]


def test_versions_after_the_first_are_sent_unless_files_are_wanted(policy, ranks, tmp_path):
    """The probe of a version is one, however often it is staged."""
    sending = _staging_publisher(policy, ranks, tmp_path, dtype=torch.bfloat16, send_from="127.0.0.1")
    ledger = Ledger("test")
    first = sending.stage(0, ledger)
    assert not first.is_sent
    assert read_manifest(Path(first.directory)).version == 0
    _change(policy)
    offered = sending.stage(1, ledger)
    assert (offered.is_sent, offered.directory, offered.version) == (True, "", 1)
    assert offered.full_bytes == first.full_bytes
    assert offered.probe.previous_logprobs == first.probe.logprobs != offered.probe.logprobs
    wanted = sending.stage(1, ledger, as_files=True)
    assert not wanted.is_sent
    assert wanted.probe == offered.probe
    assert read_manifest(Path(wanted.directory)).version == 1
    sending.loaded(1)
    assert not Path(first.directory).exists()


def _change_little(policy, to: float) -> None:
    """Three weights, one of them of a tensor that comes twice."""
    with torch.no_grad():
        for parameter in list(policy.parameters())[:3]:
            parameter.view(-1)[5] = to


def test_only_changes_are_offered_where_they_are_few(policy, ranks, tmp_path):
    """Each from the version before, whichever way that went; a version that is mostly new is staged, and is then what
    the next one is taken from."""
    ledger, options = Ledger("test"), {"dtype": torch.bfloat16, "send_from": "127.0.0.1", "sends": "changes"}
    sending = _staging_publisher(policy, ranks, tmp_path, **options)
    first = sending.stage(0, ledger)
    assert (first.is_sent, first.mark, read_manifest(Path(first.directory)).mark) == (False, "1.0.0", "1.0.0")
    _change_little(policy, 3.0)
    offered = sending.stage(1, ledger)
    assert (offered.is_sent, offered.base, offered.mark, offered.directory) == (True, "1.0.0", "1.0.1", "")
    assert (offered.sent_bytes, offered.full_bytes) == (3 * (4 + 2), first.full_bytes)
    wanted = sending.stage(1, ledger, as_files=True)
    assert (wanted.is_sent, wanted.mark) == (False, "1.0.1")
    _change_little(policy, 4.0)
    assert sending.stage(2, ledger).base == "1.0.1"
    _change(policy)
    staged = sending.stage(3, ledger)
    assert (staged.is_sent, staged.mark, read_manifest(Path(staged.directory)).mark) == (False, "1.0.3", "1.0.3")
    _change_little(policy, 5.0)
    assert sending.stage(4, ledger).base == "1.0.3"


def test_each_life_of_a_trainer_has_marks_of_its_own(policy, ranks, tmp_path):
    options = {"dtype": torch.bfloat16, "send_from": "127.0.0.1", "sends": "changes"}
    marks = {
        _staging_publisher(policy, ranks, tmp_path, life=life, **options).stage(7, Ledger("test")).mark
        for life in range(2)
    }
    assert marks == {"1.0.7", "1.1.7"}


def test_what_is_offered_by_shards_tells_how_much_is_gathered_nowhere(policy, ranks, tmp_path, monkeypatch):
    fake_m2n.stand_in(monkeypatch)
    options = {"dtype": torch.bfloat16, "send_from": "127.0.0.1", "sends": "shards"}
    sending = _staging_publisher(policy, ranks, tmp_path, **options)
    first = sending.stage(0, Ledger("test"))
    assert (first.is_sent, first.shard_bytes) == (False, 0)
    offered = sending.stage(1, Ledger("test"))
    assert (offered.is_sent, offered.base, offered.sent_bytes, offered.full_bytes) == (
        True,
        "",
        *[first.full_bytes] * 2,
    )
    assert offered.shard_bytes == offered.full_bytes, "one rank has all of it"
