"""A checkpoint of many ranks in a folder of each node: no rank sees what the others write.

As `SaveTogether`, but for this: every rank writes into the folder of its own node. Once all have,
each sends what it wrote to a rank of the next node, so that the files of any one node are in two
places. Then the first rank of each node gives the checkpoint its name there; and only when all of
them have does any of them delete an older one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actckpt.checkpoint.commit import abandon, free_name
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import MANIFEST, rank_file
from actckpt.checkpoint.verification import read_share
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.sharded.committing import SaveTogether
from actckpt.sharded.nodes import Nodes


class NodeSave(SaveTogether):
    """One save of one rank in its node's folder.

    Args:
        nodes: by that folder.

    Attributes:
        local: where it has its name on this node; "" before.
    """

    def __init__(self, nodes: Nodes, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._nodes = nodes
        self.local = ""
        # what the others wait for, of the coordinator
        self._untold = [f"{self._key}/{word}" for word in ("root", "name")]

    def run(self) -> Checkpoint:
        """As `SaveTogether.run`; the checkpoint is this node's part of it."""
        try:
            made = super().run()
        except BaseException:
            if self._nodes.leads and self._temporary:
                abandon(self._files, self._temporary)
            raise
        return replace(made, path=Path(self.local))

    def make_folder(self) -> None:
        """Makes the folder that the ranks of this node write into."""
        self._files.make_directories(self._temporary)

    def _seen(
        self, votes: Sequence[dict[str, Any]], entries: Mapping[str, FileEntry], save: str
    ) -> int:
        """What the ranks say: nobody sees all files. Each has read its own back."""
        return sum(vote["data_bytes"] for vote in votes)

    def _named_as(self, name: str, manifest: Manifest) -> Path:
        """The coordinator's part of giving it its name, on every node."""
        exchange, key = self._exchange, self._key
        self._tell("root", {"manifest": manifest.to_bytes().decode()})
        self._copy(manifest)
        copied = exchange.hear_all(f"{key}/copied")
        if any("failed" in said for said in copied):
            self._nodes.cut_off()
        self._raise_failures(dict(enumerate(copied)))
        self._named = True
        self._tell("name", {})
        self._name(name, manifest)
        self._raise_failures(dict(enumerate(exchange.hear_all(f"{key}/named"))))
        return Path(self.local)

    def _tell(self, word: str, message: dict[str, Any]) -> None:
        key = f"{self._key}/{word}"
        self._exchange.tell(key, message)
        self._untold.remove(key)

    def _give_up(self, error: BaseException, planned: bool) -> None:
        """As there; and to those who have voted."""
        super()._give_up(error, planned)
        for key in self._untold:
            try:
                self._exchange.tell(key, {"failed": str(error)})
            except CheckpointError:
                return

    def _before_verdict(self, plan: dict[str, Any]) -> None:
        """Every other rank's part."""
        exchange, key = self._exchange, self._key
        root = exchange.hear(f"{key}/root", (0,))
        if "failed" in root:
            return
        manifest = Manifest.from_bytes(root["manifest"].encode(), plan["name"])
        self._copy(manifest)
        if "failed" in exchange.hear(f"{key}/name", (0,)):
            self._nodes.cut_off()
        else:
            self._name(plan["name"], manifest)

    # ---- all

    def _copy(self, manifest: Manifest) -> None:
        """Sends this rank's files to the next node, and takes those of the one before."""
        said: dict[str, Any] = {}
        try:
            if self._nodes.reaches:
                self._exchange_copies(manifest)
        except Exception as error:  # the others wait for a word of this rank, whatever it is
            said, self._cause = {"failed": str(error) or type(error).__name__}, error
        self._exchange.tell_all(f"{self._key}/copied", said)

    def _exchange_copies(self, manifest: Manifest) -> None:
        nodes, exchange, folder = self._nodes, self._exchange, self._temporary
        rank, key = exchange.rank, f"{self._key}/sends"
        share = read_share(self._files, folder, rank_file(rank), manifest.files)
        mine = {rank_file(rank): manifest.files[rank_file(rank)], **share.files}
        # whoever takes them has to know how much comes before it can read the first
        exchange.tell_all(key, [[name, entry.size_bytes] for name, entry in mine.items()])
        transfer = nodes.transfer()
        for name, entry in mine.items():
            transfer.send(f"{folder}/{name}", entry.size_bytes, nodes.copied_to(rank))
        came: dict[str, str] = {}
        senders = nodes.copied_from(rank)
        for sender in senders:
            for name, size_bytes in exchange.hear(f"{key}/of/{sender}", (sender,)):
                came[name] = transfer.receive(f"{folder}/{name}", size_bytes, sender)
        transfer.end()
        for sender in senders:
            share = read_share(self._files, folder, rank_file(sender), manifest.files)
            for name, entry in share.files.items():
                if came.get(name) != entry.checksum:
                    raise CheckpointFormatError(f"{name} of rank {sender} came as another")

    def _name(self, name: str, manifest: Manifest) -> None:
        """The first rank of a node gives the folder its name; the others hear it."""
        key, nodes = f"{self._key}/named", self._nodes
        if not nodes.leads:
            told = self._exchange.hear(f"{key}/of/{nodes.leader}", (nodes.leader,))
            self.local = f"{self._directory}/{told.get('name', name)}"
            self._exchange.tell_all(key, {})
            return
        said: dict[str, Any]
        try:
            files, temporary = self._files, self._temporary
            with files.writing(f"{temporary}/{MANIFEST}") as sink:
                sink.write(manifest.to_bytes())
            files.sync_directory(temporary)
            local = free_name(files, self._directory, manifest.step)
            files.rename(temporary, f"{self._directory}/{local}")
            self._temporary = ""
            files.sync_directory(self._directory)
            self.local = f"{self._directory}/{local}"
            said = {"name": local}
        except Exception as error:  # likewise
            said, self._cause = {"failed": str(error) or type(error).__name__}, error
        self._exchange.tell_all(key, said)
