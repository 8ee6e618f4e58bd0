"""Every error of every system call, and reads and writes that do less than asked."""

from __future__ import annotations

from collections.abc import Iterable

from actckpt.checkpoint.files import Files
from tests.faults.disk import Disk
from tests.faults.judge import violations
from tests.faults.kinds import Fault
from tests.faults.power_loss import survives
from tests.faults.recording import Recording
from tests.faults.scenario import act
from tests.faults.scene import RUN, Scene
from tests.faults.tally import Tally
from tests.system_calls import Watched, nested


def inject(scene: Scene, faults: Iterable[Fault], tally: Tally) -> None:
    """One fault in each of as many processes.

    Where a process says that it has saved, power is lost as soon as it has ended: an error that
    was swallowed shows no sooner.
    """
    for fault in faults:
        with scene.place() as place:
            disk, recording = Disk(place), Recording()
            files = Files(Watched(nested(fault, recording)))
            act(place / RUN, files, recording.say, in_thread=scene.in_thread)
            acted = recording.acted()
            wrong = []
            if acted.claimed is not None:
                wrong += survives(disk, recording, scene.allowed)
            elif fault.harmless:
                wrong.append(f"a save fails that need not: {acted.error}")
            wrong += violations(place / RUN, acted, scene.allowed)
        tally.add(str(fault), fault.fired, wrong)
