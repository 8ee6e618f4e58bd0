"""Tiers in S3: a server of moto's on loopback, by s3fs. Skipped without the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import actckpt
from actckpt.checkpoint.object_store import INDEX, ObjectStore
from tests.small_run import advance, objects, state
from tests.test_checkpoint_encoding import same

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
URL = "s3://bucket/runs/a"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with suppress(FileExistsError):  # what moto holds outlives its server
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield
    running.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("s3")
def test_a_lost_machine_goes_on_from_s3(tmp_path: Path) -> None:
    made = objects(width=400_000)  # larger than one part of an upload
    tiers = [(URL, 2, 2)]
    with actckpt.Checkpointer(tmp_path / "a", **made, every=2, tiers=tiers) as run:
        advance(run, made, 7)
        run.save()
    # those between may have given way to it
    assert ObjectStore(URL, "full").stored()[0][0].manifest.step == 7
    shutil.rmtree(tmp_path / "a")
    # what an interrupted upload leaves is nothing
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.pipe_file("bucket/runs/a/step-00000009/model.safetensors", b"x")
    other = objects(width=400_000, seed=1)
    with actckpt.Checkpointer(tmp_path / "a", **other, every=2, tiers=tiers) as run:
        result = run.resume()
        assert result is not None
        assert result.step == 7
        assert same(state(other), state(made))
        advance(run, other, 1)
    found = sorted(path.rsplit("/", 1)[-1] for path in fs.ls("bucket/runs/a", refresh=True))
    assert found == [INDEX, "step-00000007", "step-00000008"]  # the unfinished one is gone


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = objects()
    tiers = [("s3://nobody/a", 1, 1)]
    run = actckpt.Checkpointer(tmp_path / "a", **made, every=1, tiers=tiers)
    assert run.resume() is None  # an empty listing, as of a new run
    advance(run, made, 1)
    with pytest.raises(actckpt.CheckpointSaveError, match="could not be copied to s3://nobody/a"):
        run.close()
    assert [c.step for c in run.list()] == [1]
