"""Handles of weights on one GPU: vLLM's own classes make and check them; CUDA itself is a table of tensors here.

No GPU has seen this. What is tested is the contract with vLLM: its factory, its trainer side, its dataclasses.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from palestra.core.errors import InfrastructureError
from palestra.wire.weights import handles
from palestra.wire.weights.manifest import read_manifest
from tests.unit.wire.fake_gpu import DEVICE, fake_gpu

TENSORS = {
    "model.embed.weight": torch.arange(12.0).reshape(3, 4),
    "model.layers.0.proj.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "model.layers.1.gate.e_score_correction_bias": torch.arange(5.0),  # a buffer
    "model.layers.1.slice": torch.arange(12.0).reshape(3, 4).T,
}


@pytest.fixture
def gpu(monkeypatch) -> dict[int, torch.Tensor]:
    return fake_gpu(monkeypatch)


def test_what_the_engine_reads_is_what_the_trainer_had(gpu, tmp_path: Path) -> None:
    live = {name: tensor.clone() for name, tensor in TENSORS.items()}
    copies = handles.Copies(live.items())
    manifest = handles.stage(tmp_path / "v7", 7, 2, copies)
    for tensor in live.values():
        tensor.zero_()  # the optimizer goes on
    assert handles.are_in(manifest)
    assert read_manifest(tmp_path / "v7") == manifest
    assert (manifest.version, manifest.attempt) == (7, 2)
    assert manifest.full_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    found = dict(handles.read(tmp_path / "v7", manifest, DEVICE))
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert {tensor.data_ptr() for _, tensor in copies.tensors} == {tensor.data_ptr() for tensor in found.values()}


def test_an_engine_on_another_gpu_says_so(gpu, tmp_path: Path, monkeypatch) -> None:
    manifest = handles.stage(tmp_path / "v7", 7, 2, handles.Copies(TENSORS.items()))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-two"))
    with pytest.raises(InfrastructureError, match=r"lies on GPU GPU-one, and the engine on GPU-two.*sync\.kind=files"):
        list(handles.read(tmp_path / "v7", manifest, DEVICE))


def test_memory_that_is_gone(gpu, tmp_path: Path) -> None:
    manifest = handles.stage(tmp_path / "v7", 7, 2, handles.Copies(TENSORS.items()))
    gpu.clear()
    with pytest.raises(InfrastructureError, match="cannot be opened in the trainer's memory: invalid device pointer"):
        list(handles.read(tmp_path / "v7", manifest, DEVICE))


def test_handles_of_another_version_and_torn_ones(gpu, tmp_path: Path) -> None:
    manifest = handles.stage(tmp_path / "v7", 7, 2, handles.Copies(TENSORS.items()))
    handles.stage(tmp_path / "v7", 8, 2, handles.Copies([("other", torch.zeros(2))]))
    with pytest.raises(InfrastructureError, match="not of one version"):
        list(handles.read(tmp_path / "v7", manifest, DEVICE))
    path = tmp_path / "v7" / handles.HANDLES
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InfrastructureError, match=r"handles\.pickle cannot be read"):
        list(handles.read(tmp_path / "v7", manifest, DEVICE))


def test_a_tensor_given_twice_is_refused(gpu, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="tensor weight occurs twice"):
        handles.Copies([("weight", torch.zeros(2)), ("weight", torch.zeros(2))])


def test_copies_are_handed_out_once_and_filled_with_later_versions(gpu, tmp_path: Path) -> None:
    """Memory that was handed out and not opened exactly as often would never be free again."""
    copies = handles.Copies(TENSORS.items())
    handles.stage(tmp_path / "v7", 7, 2, copies)
    later = {name: tensor + 1 for name, tensor in TENSORS.items()}
    copies.fill(later.items())
    manifest = handles.stage(tmp_path / "v8", 8, 2, copies)
    for _ in range(2):  # an engine that died reads again
        found = dict(handles.read(tmp_path / "v8", manifest, DEVICE))
        assert all(torch.equal(found[name], later[name]) for name in TENSORS)
    assert len(gpu) == len(TENSORS)


def test_other_weights_do_not_go_where_some_were_handed_out(gpu) -> None:
    copies = handles.Copies(TENSORS.items())
    with pytest.raises(InfrastructureError, match=r"cannot go where model\.embed\.weight \[3, 4\]"):
        copies.fill(reversed(TENSORS.items()))
