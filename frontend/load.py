"""What load a frontend says it has, for clients and routers that know ORCA."""

import time
from collections.abc import Callable
from typing import Final

from frontend.metrics import FrontendMetrics
from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport

CPU_SAMPLE_S: Final = 1.0
"""Processor time is seen over so long at least."""


class FrontendLoad:
    """Of this process: the share of one core that it uses, and of the requests that it takes."""

    def __init__(
        self,
        counted: FrontendMetrics,
        *,
        num_running: Callable[[], int],
        running_max: int,
        num_waiting: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        """`num_waiting` are the choices that wait for a worker."""
        self._counted = counted
        self._num_running = num_running
        self._running_max = running_max
        self._num_waiting = num_waiting
        self._cpu_clock = cpu_clock
        self._cpu_share = 0.0
        self._sampled_at = clock()
        self._cpu_s = cpu_clock()

    def report(self, now: float) -> OrcaLoadReport:
        """At this moment; processor time since the report before, or over a second."""
        self._sample(now)
        num_running = self._num_running()
        share = num_running / self._running_max
        report = OrcaLoadReport(
            cpu_utilization=self._cpu_share,
            application_utilization=max(self._cpu_share, share),
            rps_fractional=self._counted.ended.per_second(now),
            eps=self._counted.ended_by_fault.per_second(now),
        )
        report.utilization["requests"] = min(1.0, share)
        report.named_metrics["requests_running"] = num_running
        report.named_metrics["choices_waiting"] = self._num_waiting()
        return report

    def _sample(self, now: float) -> None:
        passed_s = now - self._sampled_at
        if passed_s >= CPU_SAMPLE_S:
            cpu_s = self._cpu_clock()
            self._cpu_share = max(0.0, cpu_s - self._cpu_s) / passed_s
            self._sampled_at, self._cpu_s = now, cpu_s
