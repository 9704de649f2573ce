"""A checkpoint by some processes is gone on with by any number of them, to the same weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import parallel_checkpoints
from helpers.parallel_checkpoints import go_on, start, steps
from helpers.parallel_work import full
from helpers.processes import run
from helpers.tiny import config, upcycle, vit
from torch import Tensor

from vimoe.errors import FolderError
from vimoe.parallel.checkpoint import load_checkpoint, save_checkpoint

Mesh = tuple[dict[str, int] | None, int]  # None for one process without a mesh
ONE, TWO, FOUR = (None, 1), ({"expert": 2}, 2), ({"fsdp": 2, "expert": 2}, 4)
STEPS = 2  # of each of the jobs


def job(mesh: Mesh, *args: Any) -> dict[str, Tensor]:
    parallel, count = mesh
    return go_on(None, *args) if parallel is None else run(go_on, count, parallel, *args, timeout=300)[0]


@pytest.mark.parametrize(
    "meshes",
    [(TWO, ONE, TWO), *(pytest.param(m, marks=pytest.mark.slow) for m in [(FOUR, TWO, ONE, FOUR), (ONE, FOUR, ONE)])],
)
def test_jobs_of_other_meshes_go_on(meshes: tuple[Mesh, ...], tmp_path: Path) -> None:
    read, weights = None, dict[str, Tensor]()
    for i, mesh in enumerate(meshes):
        write = tmp_path / str(i)
        weights = job(mesh, range(i * STEPS, (i + 1) * STEPS), read, write)
        read = write
    made, optimizer = start(None)
    before = {name: full(tensor) for name, tensor in made.state_dict().items()}
    steps(made, optimizer, range(STEPS * len(meshes)))
    expected = made.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert not torch.equal(expected["blocks.0.mlp.experts.fc1.weight"], before["blocks.0.mlp.experts.fc1.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(i) for i in range(len(meshes))]


def test_a_full_disk_of_one_process_ends_all_and_keeps_what_was_there(tmp_path: Path) -> None:
    for seen in run(parallel_checkpoints.fails, 2, tmp_path, timeout=120):
        assert seen["message"] == (
            f"{tmp_path}/last could not be written: [Errno 28] No space left on device; make room, or name another "
            f"folder"
        )
        assert seen["left"] == ["last"] and seen["values"] == {"step": 1}


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_nothing_else_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = vit()
    save_checkpoint(tmp_path / "c", model)
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FolderError, match=r"got .* in .metadata, which describes no shards"):
        load_checkpoint(tmp_path / "c", model)
    assert not Path("sprung").exists()
    torch.save(Trap(), tmp_path / "c" / "values.pt")
    with pytest.raises(FolderError, match="cannot be read"):
        load_checkpoint(tmp_path / "c", model)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_it_is_read_by_another_version_of_python(tmp_path: Path, module: str) -> None:
    """3.13 names the module of paths otherwise than the versions before and after it."""
    model = vit()
    save_checkpoint(tmp_path / "c", model)
    file, mine = tmp_path / "c" / ".metadata", type(tmp_path).__module__
    described = pickle.dumps(pickle.loads(file.read_bytes()), protocol=2)
    assert (ours := f"c{mine}\n{type(tmp_path).__name__}\n".encode()) in described
    file.write_bytes(described.replace(ours, f"c{module}\n{type(tmp_path).__name__}\n".encode()))
    other = vit()
    with torch.no_grad():
        other.head.weight.zero_()
    load_checkpoint(tmp_path / "c", other)
    assert torch.equal(other.head.weight, model.head.weight) and model.head.weight.any()


def test_another_model_and_a_missing_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", vit())
    with pytest.raises(FolderError, match="expected a checkpoint of this model") as error:
        load_checkpoint(tmp_path / "c", upcycle(vit(), config()))
    assert "\n" not in str(error.value)
    with pytest.raises(FolderError, match="cannot be read"):
        load_checkpoint(tmp_path / "missing", vit())
