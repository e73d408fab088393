"""A trace of some steps of a run (`profile=true`), for finding out where its time goes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

SKIP, WARM, STEPS = 5, 1, 3  # steps passed over, steps with the profiler on but unheard, steps in the trace
NEEDED = SKIP + WARM + STEPS
TOP = 12  # operations in the table


class Profiler:
    """`start`, then `step` after each step of the run. `folder` gets trace.json, which Perfetto and Chromium's
    about:tracing open, and operations.txt, the operations that took the longest by themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left, self.told = folder, NEEDED, ""
        self.gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
        plan = schedule(wait=SKIP, warmup=WARM, active=STEPS, repeat=1)
        self.inner = profile(activities=activities, schedule=plan, on_trace_ready=self._write)

    def start(self) -> None:
        self.inner.start()

    def step(self) -> str:
        """What to tell the user: the table and where it is, once, after the last step of the trace; else nothing."""
        if not self.left:
            return ""
        self.left -= 1
        self.inner.step()
        return self.told

    def stop(self) -> None:
        """The end of the run: a trace that has not begun is given up."""
        if self.left:
            self.left = 0
            self.inner.stop()

    def _write(self, profiled: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.folder / "trace.json"))
        table = self._table(profiled)
        (self.folder / "operations.txt").write_text(table + "\n", encoding="utf-8")
        self.told = f"{table}\nprofile of {STEPS} steps: {self.folder}/trace.json, {self.folder}/operations.txt"

    def _table(self, profiled: profile) -> str:
        """A line an operation: its share of the time, milliseconds and calls a step."""

        def own(event) -> float:  # microseconds, without what it calls
            return event.self_device_time_total if self.gpu else event.self_cpu_time_total

        # A GPU's time is listed twice: with the operations that start its kernels, and again with the kernels.
        listed = [e for e in profiled.key_averages() if e.device_type == DeviceType.CPU]
        events = [e for e in listed if not e.key.startswith("ProfilerStep")]
        events.sort(key=own, reverse=True)
        whole = sum(map(own, events)) or 1.0
        lines = [f"{'operation':<50} {'share':>6} {'ms a step':>10} {'calls':>6}"]
        lines += [
            f"{e.key[:50]:<50} {own(e) / whole:>6.1%} {own(e) / 1000 / STEPS:>10.2f} {e.count / STEPS:>6.0f}"
            for e in events[:TOP]
        ]
        return "\n".join(lines)
