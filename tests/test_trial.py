"""The faster of two digesters goes on, by the bytes that each moves on a clock of the test's own."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tierewrite.digest import DeviceFailed, Digester
from tierewrite.engines.trial import LASTS, SETTLES, Trial


class One:
    def __init__(self, device: str) -> None:
        self.device = device


CPU, GPU = cast("Digester", One("cpu")), cast("Digester", One("cuda"))


class Field:
    """Work in pieces of 10 ms; what a digester moves in one is its rate."""

    def __init__(self, cpu: int, gpu: int, ready: float) -> None:
        self.now = 0.0
        self.rates = {CPU: cpu, GPU: gpu}
        self.trial = Trial(CPU, lambda: GPU if self.now >= ready else None, lambda: self.now)
        self.trial.begin()

    def work(self, seconds: float) -> list[Digester]:
        """Who did the pieces, without repetitions."""
        done: list[Any] = []
        for _ in range(round(seconds / 0.01)):
            one = self.trial.next()
            self.now += 0.01
            self.trial.moved(self.rates[one])
            if done[-1:] != [one]:
                done.append(one)
        return done


@pytest.mark.parametrize(
    ("cpu", "gpu", "ready", "who"),
    [
        (100, 300, 1.0, [CPU, GPU]),
        (300, 100, 1.0, [CPU, GPU, CPU]),
        (100, 95, 1.0, [CPU, GPU]),  # about as fast: the CPU is left to others
        (100, 300, 0.0, [GPU, CPU, GPU]),  # ready at once: the CPU has its turn later
        (300, 100, 0.0, [GPU, CPU]),
        (100, 300, 0.3, [CPU, GPU, CPU, GPU]),  # too short a turn to be believed
        (100, 300, 99.0, [CPU]),
    ],
)
def test_the_faster_one_goes_on(cpu: int, gpu: int, ready: float, who: list[Digester]) -> None:
    assert Field(cpu, gpu, ready).work(5) == who


def test_it_is_decided_soon_after_the_gpu_is_ready() -> None:
    field = Field(300, 100, 0.0)
    field.work(2 * (SETTLES + LASTS) + 0.05)
    assert field.trial.chosen is CPU


def test_a_pause_between_two_passes_does_not_count() -> None:
    field = Field(100, 120, 1.0)
    field.work(1.3)
    field.now += 100
    field.trial.begin()
    field.work(2)
    assert field.trial.chosen is GPU


def test_without_a_gpu_the_cpu_stays_and_nothing_is_tried() -> None:
    trial = Trial(CPU, lambda: CPU)
    assert trial.next() is CPU
    assert trial.chosen is CPU


def test_a_failure_of_the_gpu_is_for_who_asks() -> None:
    def fails() -> Digester:
        raise DeviceFailed("no driver")

    with pytest.raises(DeviceFailed, match="no driver"):
        Trial(CPU, fails).next()
