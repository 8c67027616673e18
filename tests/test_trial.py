"""The faster of two digesters goes on, by the bytes that each moves on a clock of the test's own."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tierewrite.digest import DeviceFailed, Digester
from tierewrite.engines.trial import LASTS, PAYS, SETTLES, Trial


class One:
    def __init__(self, device: str) -> None:
        self.device = device


CPU, GPU = cast("Digester", One("cpu")), cast("Digester", One("cuda"))


class Field:
    """Work in pieces of 10 ms; what a digester moves in one is its rate.

    Args:
        ready: seconds from being asked for until the GPU is ready.
        left: bytes of the pass.
    """

    def __init__(self, cpu: int, gpu: int, ready: float, left: int = 1 << 40) -> None:
        self.now = 0.0
        self.asked: float | None = None
        self.ready = ready
        self.rates = {CPU: cpu, GPU: gpu}
        self.trial = Trial(CPU, self.gpu, lambda: self.now)
        self.trial.begin(left)

    def gpu(self) -> Digester | None:
        self.asked = self.now if self.asked is None else self.asked
        return GPU if self.now - self.asked >= self.ready else None

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
        (100, 300, 0.0, [CPU, GPU]),
        (300, 100, 0.0, [CPU, GPU, CPU]),
        (100, 300, 99.0, [CPU]),
    ],
)
def test_the_faster_one_goes_on(cpu: int, gpu: int, ready: float, who: list[Digester]) -> None:
    assert Field(cpu, gpu, ready).work(5) == who


def test_it_is_decided_soon_after_the_gpu_is_ready() -> None:
    field = Field(300, 100, 0.0)
    field.work(2 * (SETTLES + LASTS) + 0.05)
    assert field.trial.chosen is CPU


@pytest.mark.parametrize("seconds", [0.0, 0.3, PAYS, PAYS + SETTLES + LASTS - 0.05])
def test_a_gpu_is_not_prepared_for_seconds_of_work(seconds: float) -> None:
    field = Field(100, 300, 0.0, left=round(100 * seconds / 0.01))
    assert field.work(5) == [CPU]
    assert field.asked is None


def test_a_gpu_is_prepared_once_the_cpu_is_known_to_take_longer() -> None:
    field = Field(100, 300, 1.0, left=round(100 * (PAYS + 1) / 0.01))
    assert field.work(3) == [CPU, GPU]
    assert field.asked == pytest.approx(SETTLES + LASTS, abs=0.021)


def test_a_later_pass_with_more_work_asks_for_it() -> None:
    field = Field(100, 300, 0.0, left=1000)
    assert field.work(1) == [CPU]
    field.trial.begin(1 << 40)
    assert field.work(2) == [GPU]
    assert field.trial.chosen is GPU


def test_a_pause_between_two_passes_does_not_count() -> None:
    field = Field(100, 120, 1.0)
    field.work(1.3)
    field.now += 100
    field.trial.begin(1 << 40)
    field.work(2)
    assert field.trial.chosen is GPU


def test_without_a_gpu_the_cpu_stays_and_nothing_more_is_tried() -> None:
    none_works = cast("Digester", One("cpu"))  # another object, whose description says why
    field = Field(100, 300, 0.0)
    field.rates[none_works] = 100
    asked = []
    field.trial = Trial(CPU, lambda: asked.append(field.now) or none_works, lambda: field.now)  # type: ignore[func-returns-value]
    field.trial.begin(1 << 40)
    assert field.work(5) == [CPU, none_works]
    assert field.trial.chosen is none_works
    assert len(asked) == 1


def test_a_failure_of_the_gpu_is_for_who_asks() -> None:
    def fails() -> Digester:
        raise DeviceFailed("no driver")

    field = Field(100, 300, 0.0)
    field.trial = Trial(CPU, fails, lambda: field.now)
    field.trial.begin(1 << 40)
    with pytest.raises(DeviceFailed, match="no driver"):
        field.work(5)
