"""Jobs for tests: a launcher that starts nothing, and a manager with what tests do again and again."""

import json
import time

from model.config import FineTuneSettings
from model.jobs.process import Process, boot_id, boottime_s

ROWS = [{"text": "We sailed at dawn.", "prompt": None, "split": "train"}] * 3


class PaperLauncher:
    """Starts nothing; a worker is alive for as long as its process is in `living`."""

    def __init__(self):
        self.started, self.living, self.terminated = [], set(), []

    def start(self, folder):
        process = Process(100_000 + len(self.started), 7, boot_id())
        self.started.append(folder.name)
        self.living.add(process)
        return process

    def is_alive(self, process):
        return process in self.living

    def terminate(self, process):
        self.terminated.append(process)
        self.living.discard(process)

    def reap(self):
        pass


class Jobs:
    """A manager with what tests do again and again."""

    def __init__(self, manager):
        self.manager = manager
        self.root, self.launcher = manager.root, manager.launcher

    def add(self, name="pirates", n_steps=20, **more):
        return self.manager.create(name, ROWS, FineTuneSettings(max_steps=n_steps), **more)

    def state(self, job):
        return self.manager.get(job.id).state

    def until(self, job, *states, timeout_s=30.0):
        """Tend until the job is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.manager.tend()
            now = self.manager.get(job.id)
            if now.state in states:
                return now
            time.sleep(0.02)
        raise AssertionError(f"{now.state} ({now.message}) instead of {states}\n{self.manager.log(job.id)}")

    def until_step(self, job, step, timeout_s=30.0):
        """Tend until the job has got so far; returns its worker's process."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.manager.tend()
            now = self.manager.get(job.id)
            if now.process and len(self.manager.metrics(job.id)) >= step:
                return now.process
            time.sleep(0.005)
        raise AssertionError(f"{now.state} ({now.message}) before step {step}\n{self.manager.log(job.id)}")

    def losses(self, job):
        metrics = self.manager.metrics(job.id)
        assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
        return [record["loss"] for record in metrics]

    def say(self, job, state, attempt=None, **more):
        """Write the status that the job's worker would."""
        job = self.manager.get(job.id)
        process = Process(*job.launched["process"])
        status = {"state": state, "message": "A sentence.", "step": 5, "steps": 20, "process": list(process)}
        status |= {"attempt": attempt or job.attempt, "heartbeat": {"time": time.time(), "boottime": boottime_s()}}
        (job.folder / "status.json").write_text(json.dumps({**status, **more}))
        if state not in ("starting", "running"):
            self.launcher.living.discard(process)
        return process

    def request(self, job, **changes):
        """Change job.json behind the manager's back."""
        path = job.folder / "job.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
