"""Every error of every system call, and reads and writes that do less than asked."""

from __future__ import annotations

from collections.abc import Iterable

from actckpt.checkpoint.files import Files
from tests.faults.disk import Disk
from tests.faults.judge import violations
from tests.faults.kinds import Fails, Fault
from tests.faults.power_loss import survives
from tests.faults.recording import Recording
from tests.faults.scene import RUN, Scene
from tests.faults.tally import Tally
from tests.system_calls import Watched, nested


def inject(scene: Scene, faults: Iterable[Fault], tally: Tally) -> None:
    """One fault in each of as many processes.

    Where a process says that it has saved or pinned, power is lost as soon as it has ended: an
    error that was swallowed shows no sooner.
    """
    for fault in faults:
        with scene.place() as place:
            disk, recording = Disk(place), Recording()
            files = Files(Watched(nested(fault, recording)))
            scene.act(place / RUN, files, recording.say)
            acted = recording.acted()
            wrong = []
            told = [*acted.refused, *acted.errors]
            if fault.harmless and (told or acted.claimed != acted.begun):
                wrong.append(f"a save fails that need not: {told}")
            if len(told) > 1 and not (isinstance(fault, Fails) and fault.on):
                wrong.append(f"it happened once, and is said {len(told)} times: {told}")
            if acted.claimed or acted.pins:
                wrong += survives(disk, recording, scene.known)
            wrong += violations(place / RUN, acted, scene.known)
        tally.add(str(fault), fault.fired, wrong)
