"""Checkpoints in an object store: data first, the manifest last, nothing renamed.

A store has no rename and no folders: an object appears whole when its upload ends. A checkpoint is
there once its manifest is, which goes last and, where one is deleted, first; an upload that was
interrupted has none. An index names them, for listings of a store may lag behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import Checkpoint, Skipped
from actckpt.checkpoint.documents import sealed, unsealed
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import MANIFEST, SAVING, parse_step_name, step_name, unique
from actckpt.checkpoint.stored_base import (
    base_in,
    compare,
    fetch_base,
    needed_bytes,
    passed,
    put_base,
    sweep_base,
)
from actckpt.checkpoint.verification import read_shares
from actckpt.errors import CheckpointError, CheckpointFormatError, CheckpointSaveError

logger = logging.getLogger("actckpt")

INDEX = "checkpoints.json"
_KIND = "stored"
_VERSION = 1
# these have no folders, and would make a bucket whose name is misspelt
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"})


@dataclass(frozen=True, slots=True)
class Stored:
    """One checkpoint there, by its folder's name."""

    name: str
    manifest: Manifest


class ObjectStore:
    """A prefix of a store, of one run alone.

    Args:
        url: as fsspec takes it.
        verify: "full" reads every byte back before an upload counts, "manifest" the manifest and
            the sizes.
    """

    def __init__(self, url: str, verify: str) -> None:
        self.url = url.rstrip("/")
        self._verify = verify
        self._opened: tuple[Any, str] | None = None
        # files of frozen tensors that were seen to be sound there
        self._known: set[str] = set()

    # ---- reading

    def stored(self) -> tuple[list[Stored], list[Skipped]]:
        """The checkpoints there, newest first, and what is named as one and cannot be used.

        Raises:
            CheckpointError: the store cannot be read now.
        """
        with self._reached("read") as (fs, root):
            found, skipped = [], []
            listed, indexed = self._listed(fs, root), self._indexed(fs, root)
            for name in sorted(listed | indexed):
                data = _content(fs, f"{root}/{name}/{MANIFEST}")
                where = f"{self.url}/{name}/{MANIFEST}"
                if data is None:
                    # else an upload that has not ended
                    if name in indexed:
                        skipped.append(Skipped(f"{self.url}/{name}", f"{where} is missing"))
                    continue
                try:
                    found.append(Stored(name, Manifest.from_bytes(data, where)))
                except CheckpointFormatError as error:
                    skipped.append(Skipped(f"{self.url}/{name}", str(error)))
        found.sort(key=lambda s: (s.manifest.serial, s.manifest.step, s.name), reverse=True)
        return found, skipped

    def fetch(self, stored: Stored, files: Files, directory: str) -> Checkpoint:
        """The checkpoint, verified and durable in a run's directory, whose lock the caller holds.

        Raises:
            CheckpointFormatError: it is damaged there.
            CheckpointError: it cannot be brought here.
        """
        manifest = stored.manifest
        temporary = f"{directory}/{unique(SAVING, stored.name)}"
        try:
            needed = needed_bytes(files, directory, manifest)
            free = files.free_bytes(directory)
            if free < needed:
                raise CheckpointError(
                    f"{self.url}/{stored.name} needs {needed} bytes in {directory}; {free} are "
                    "free. Free some"
                )
            files.make_directory(temporary)
            with self._reached("read") as (fs, root):
                fetch_base(files, directory, manifest, fs, root)

                def bring(entries: Mapping[str, FileEntry]) -> None:
                    for name, entry in entries.items():
                        with files.writing(f"{temporary}/{name}") as sink:
                            found = passed(fs, f"{root}/{stored.name}/{name}", sink.write)
                        compare(f"{self.url}/{stored.name}/{name}", found, entry)

                bring(manifest.files)
                for share in read_shares(files, temporary, manifest).ranks:
                    bring(share.files)
            with files.writing(f"{temporary}/{MANIFEST}") as sink:
                sink.write(manifest.to_bytes())
            files.sync_directory(temporary)
            name = _free(stored.name, lambda n: files.status(f"{directory}/{n}") is None)
            files.rename(temporary, f"{directory}/{name}")
            files.sync_directory(directory)
        except OSError as error:
            raise CheckpointError(
                f"{self.url}/{stored.name} cannot be brought to {directory}: {error}"
            ) from error
        finally:
            files.remove_tree(temporary)
        return Checkpoint(Path(f"{directory}/{name}"), manifest)

    # ---- writing

    def upload(self, checkpoint: Checkpoint) -> Stored:
        """A copy of a checkpoint, verified.

        Raises:
            CheckpointSaveError: there is none; those that were there are as before.
        """
        manifest = checkpoint.manifest
        data = manifest.to_bytes()
        try:
            entries = _all_files(checkpoint)
            with self._reached("written") as (fs, root):

                def is_free(name: str) -> bool:
                    return _content(fs, f"{root}/{name}/{MANIFEST}") in (None, data)

                name = _free(checkpoint.path.name, is_free)
                folder = f"{root}/{name}"
                if _content(fs, f"{folder}/{MANIFEST}") == data:
                    # what is in sight is not written anew
                    for file, entry in entries.items():
                        self._check(fs, f"{folder}/{file}", entry)
                    for file, entry in manifest.base.items():
                        self._check(fs, f"{root}/{file}", entry)
                    return Stored(name, manifest)
                protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
                buckets = not _BUCKETS.isdisjoint(protocols)
                run = str(checkpoint.path.parent)
                put_base(
                    run, manifest, fs, root, known=self._known, buckets=buckets, check=self._check
                )
                if not buckets:
                    fs.makedirs(folder, exist_ok=True)
                for file, entry in entries.items():
                    fs.put_file(f"{checkpoint.path}/{file}", f"{folder}/{file}")
                    self._check(fs, f"{folder}/{file}", entry)
                fs.pipe_file(f"{folder}/{MANIFEST}", data)
                if _content(fs, f"{folder}/{MANIFEST}") != data:
                    raise CheckpointFormatError(f"{folder}/{MANIFEST} did not read back as written")
                self._index(fs, root, {*self._indexed(fs, root), name})
        except CheckpointError as error:
            raise CheckpointSaveError(
                f"{checkpoint.path} could not be copied to {self.url}: {error}. It is whole where "
                "it is"
            ) from error
        return Stored(name, manifest)

    def _check(self, fs: Any, path: str, entry: FileEntry) -> None:
        if self._verify == "full":
            compare(path, passed(fs, path), entry)
        elif fs.info(path)["size"] != entry.size_bytes:
            raise CheckpointFormatError(f"{path} has not the {entry.size_bytes} bytes of the file")

    def retire(self, name: str) -> None:
        """Deletes a checkpoint, of which somebody has made sure that a newer one is there.

        What is gone already is no error.

        Raises:
            CheckpointError: it could not be deleted; it is whole, or none any more.
        """
        with self._reached("written") as (fs, root):
            self._index(fs, root, self._indexed(fs, root) - {name})
            for path, recursive in ((f"{root}/{name}/{MANIFEST}", False), (f"{root}/{name}", True)):
                with suppress(FileNotFoundError):
                    fs.rm(path, recursive=recursive)
            self._sweep(fs, root)

    def clean(self) -> None:
        """Deletes what interrupted uploads and deletions left.

        Raises:
            CheckpointError: something could not be deleted.
        """
        with self._reached("written") as (fs, root):
            for name in self._listed(fs, root) - self._indexed(fs, root):
                folder = f"{root}/{name}"
                if _content(fs, f"{folder}/{MANIFEST}") is None:
                    logger.info("actckpt: removing %s/%s, an unfinished upload", self.url, name)
                    fs.rm(folder, recursive=True)
            self._sweep(fs, root)

    def _sweep(self, fs: Any, root: str) -> None:
        if held := base_in(fs, root):
            left, skipped = self.stored()
            if not skipped:  # which may name what is shared
                sweep_base(fs, root, held, [s.manifest for s in left])

    # ---- how

    def _index(self, fs: Any, root: str, names: set[str]) -> None:
        fs.pipe_file(f"{root}/{INDEX}", sealed(_KIND, _VERSION, {"names": sorted(names)}))

    def _listed(self, fs: Any, root: str) -> set[str]:
        """Names of all that may be checkpoints, as the store lists them; it may lag behind."""
        fs.invalidate_cache()
        try:
            paths = fs.ls(root, detail=False)
        except FileNotFoundError:
            return set()
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
        return {name for name in names if parse_step_name(name) is not None}

    def _indexed(self, fs: Any, root: str) -> set[str]:
        """Names of those whose uploads have ended."""
        data = _content(fs, f"{root}/{INDEX}")
        if data is None:
            return set()
        try:
            names = unsealed(data, _KIND, (_VERSION,), f"{self.url}/{INDEX}")["names"]
        except CheckpointFormatError as error:
            logger.warning("actckpt: %s; the listing of the store counts", error)
            return set()
        return {name for name in names if parse_step_name(name) is not None}

    @contextmanager
    def _reached(self, verb: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it, connected once.

        Every error of the store's own library, and there are as many kinds as libraries, says one
        thing: not now.
        """
        try:
            if self._opened is None:
                self._opened = _file_system(self.url)
            yield self._opened
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.url} cannot be {verb} now: {type(error).__name__}: {error}. Look at the "
                "address, the network and the credentials"
            ) from error


def _all_files(checkpoint: Checkpoint) -> dict[str, FileEntry]:
    """Of many ranks, the files that their manifests name, and then these."""
    manifest = checkpoint.manifest
    shares = read_shares(Files(), str(checkpoint.path), manifest).ranks
    return {n: e for share in shares for n, e in share.files.items()} | manifest.files


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(
            f"{url} needs fsspec, which is not installed: pip install 'actckpt[fsspec]'"
        ) from error
    fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return fs, root.rstrip("/")


def _content(fs: Any, path: str) -> bytes | None:
    """Of a small object; None where there is none."""
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None


def _free(name: str, is_free: Callable[[str], bool]) -> str:
    """The name, or that of a further attempt at its step."""
    key = parse_step_name(name)
    assert key is not None, name
    step, attempt = key
    while not is_free(step_name(step, attempt)):
        attempt += 1
    return step_name(step, attempt)
