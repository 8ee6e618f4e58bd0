"""One training run of a suite's model with everything that a checkpoint holds, and its digest.

As a program, ``python -m tests.resumable JOBS.json``, it performs every job in a process of its
own: a child of one that has imported everything and computed nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import actckpt
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.tensor_file import bytes_of
from actckpt.data.profile import Cost, Profile
from actckpt.resuming.resumed import Resumed
from actckpt.resuming.run_state import OWN
from actckpt.tracing.tracer import trace_step
from tests.predictions import case_step
from tests.suite import CASES, Case, call, loss_of, rolled

EPOCH = 4
TOTAL_STEPS = 5


class Rolled(Dataset[Any]):
    """A few batches of a case; whole batches, each with a shift and noise of its own."""

    def __init__(self, case: Case) -> None:
        self.batch = case.batch()

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> Any:
        return index, rolled(self.batch, index)


def as_it_is(item: Any) -> Any:
    """A tuple of tensors is a model's arguments, and must not become a list."""
    return item


class Tally:
    """Something of the user's own that has a state."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.losses = state["seen"], state["losses"]


@dataclass(frozen=True, slots=True)
class Job:
    """How far to train which model, and how that ends.

    Args:
        seed: of the objects as they are made; whatever it is, resuming must make up for it.
        until: optimizer steps in the whole run.
        save_at: after these steps.
        policy, budget_gb, scope: for `actckpt.optimize`; policy "" leaves the model as it is.
        share: of what an untouched step adds, instead of ``budget_gb``; the smallest budget that
            the policy can meet where that is more.
        kill_at: SIGKILL after so many steps; 0 never.
        workers: of the data loader.
        verbatim: planning, or measuring, is an error.
        digest: file for the digest at the end, "" for none.
    """

    case: str
    directory: str
    seed: int = 0
    until: int = TOTAL_STEPS
    save_at: tuple[int, ...] = ()
    policy: str = "full"
    budget_gb: float | None = None
    scope: str = "step"
    share: float = 0.0
    kill_at: int = 0
    workers: int = 0
    verbatim: bool = False
    digest: str = ""


class Run:
    """The objects of a run, and its loop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.case = CASES[job.case]
        self.model = self.case.build()
        seed_everything(job.seed)
        if job.seed:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(torch.randn_like(p))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=2e-3, total_steps=50
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
        self.ema: Any = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        self.tally = Tally()
        self.loader: DataLoader[Any] = DataLoader(
            actckpt.SeededSamples(Rolled(self.case)),
            batch_size=None,
            shuffle=True,
            num_workers=job.workers,
            collate_fn=as_it_is,
        )
        if job.policy:
            actckpt.optimize(
                self.model,
                job.budget_gb,
                policy=job.policy,
                scope=job.scope,
                accumulate=self.case.micro_steps > 1,
            )
        self.checkpointer = actckpt.Checkpointer(
            job.directory,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            ema=self.ema,
            loader=self.loader,
            extra={"tally": self.tally},
            config={"case": job.case},
            every=None,
            keep_last=None,
        )

    def train(self, until: int) -> None:
        """Trains up to a number of optimizer steps in the whole run."""
        run = self.checkpointer
        parts = self.case.micro_steps
        for count, (_, (index, batch)) in enumerate(run.steps(epochs=None, total_steps=until)):
            if count % parts == 0:
                self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
                output = call(self.model, batch)
                loss = loss_of(self.case, output) / parts
            self.scaler.scale(loss).backward()
            self.tally.seen.append(int(index))
            self.tally.losses.append(loss.item())
            del output
            if count % parts == parts - 1:
                self.update()
                run.step(metrics={"loss": loss.detach()})
                if run.step_count in self.job.save_at:
                    # in the background, and over before the process is killed
                    run.save(wait=False)
                    run.list()
                if run.step_count == self.job.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if run.step_count == until:
                    return

    def update(self) -> None:
        """One optimizer step, and what goes with it."""
        self.scaler.unscale_(self.optimizer)
        if self.case.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        random.random()
        np.random.rand()

    def digest(self) -> dict[str, str]:
        """A hash of every tensor and every other value of the run's state."""
        run = self.checkpointer
        items = run._saves.snapshot("").items
        found = {"params": digest_of(dict(self.model.named_parameters()))}
        for item, encoded in items.items():
            if item == "plans":
                continue  # its times are measured
            found |= {f"{item}/{name}": _hash(t) for name, t in encoded.tensors.items()}
            found[item] = json.dumps(encoded.tree, sort_keys=True)
        assert found.keys() >= {*OWN, "model", "optimizer", "ema", "extra-tally"} - {"plans"}
        return found


def digest_of(state: Any) -> str:
    """A hash of a whole state."""
    encoded = encode(state, "state")
    return _hash(torch.tensor(list(json.dumps(encoded.tree).encode()))) + "".join(
        _hash(t) for t in encoded.tensors.values()
    )


def _hash(tensor: torch.Tensor) -> str:
    data = bytes_of(tensor) if tensor.numel() else b""
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.blake2b(data).hexdigest()[:16]}"


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def perform(job: Job) -> tuple[Run, Resumed | None]:
    """Makes the objects, resumes if there is something to resume, and trains."""
    if job.share:
        job = within_share(job)
    if job.verbatim:
        forbid_planning()
    run = Run(job)
    resumed = run.checkpointer.resume()
    if resumed is not None:
        assert resumed.bit_exact, str(resumed)
    run.train(job.until)
    run.checkpointer.close()
    if job.digest:
        Path(job.digest).write_text(json.dumps(run.digest()), encoding="utf-8")
    return run, resumed


def within_share(job: Job) -> Job:
    """A job with the budget that its share stands for; the same in every process."""
    note = Path(job.directory + "-budget")
    if not note.exists():
        case = CASES[job.case]
        model = case.build()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        step = case_step(case, case.batch(), optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            graph = trace_step(model, step)
        flat = Profile(graph.device, tuple(Cost(1e-6) for _ in graph.signatures))
        added = actckpt.price(graph, flat, actckpt.Plan("none")).added_bytes
        budget_gb = job.share * added / 1e9
        trial = replace(job, directory=job.directory + "-trial", share=0.0, kill_at=0, digest="",
                        until=1, save_at=(), budget_gb=budget_gb)  # fmt: skip
        try:
            perform(trial)
        except actckpt.BudgetError as error:
            budget_gb = 1.01 * (error.smallest_bytes or 0) / 1e9
        note.write_text(repr(budget_gb), encoding="utf-8")
    return replace(job, share=0.0, budget_gb=float(note.read_text(encoding="utf-8")))


def forbid_planning() -> None:
    """From now on, measuring operations or asking a policy is an error."""
    from actckpt.planning import making
    from actckpt.policies import POLICIES

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the saved plan was to be used")

    making.__dict__["build_profile"] = never
    for name in POLICIES:
        POLICIES[name] = never


def main(path: str) -> None:
    for data in json.loads(Path(path).read_text(encoding="utf-8")):
        job = Job(**{**data, "save_at": tuple(data["save_at"])})
        child = os.fork()
        if child == 0:
            status = 1
            try:
                perform(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-signal.SIGKILL if job.kill_at else 0), (status, job)


def write_jobs(path: Path, jobs: list[Job]) -> Path:
    """The file that the program is started with."""
    path.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
