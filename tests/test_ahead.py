"""Hashing while the model class is asked: a guess that saves time and decides nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from blake3 import blake3

from tests.checkpoints import FIXTURES, read_tensors
from tierewrite import ahead, rewrite
from tierewrite import transfer as transfer_room
from tierewrite.checkpoint import Checkpoint
from tierewrite.engines.local import LocalEngine
from tierewrite.errors import SystemFailure
from tierewrite.transfer import Task, Transfer

CASES = [path.parent.name for path in sorted(FIXTURES.glob("dg_*/naive"))]


def _engine() -> LocalEngine:
    return LocalEngine("cpu", 2)


@pytest.mark.parametrize("case", CASES)
def test_what_is_tied_on_both_sides_is_guessed_from_the_headers(case: str, naive: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(naive(case))
    expected: set[str] = set()
    for key, entry in checkpoint.tensors.items():
        other = checkpoint.tensors.get(key.replace("model.decoder.layers.", "model.encoder.language_model.layers."))
        if other not in (None, entry) and (other.dtype, other.shape) == (entry.dtype, entry.shape):
            expected |= {key, other.name}
    assert expected
    assert expected <= set(ahead.probably_tied(checkpoint))


def test_tensors_that_are_alike_in_name_only_are_not_hashed_ahead(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "a.layers.0.weight": torch.ones(4),
        "b.layers.0.weight": torch.ones(5),
        "shared.weight": torch.ones(3),
        "lm_head.weight": torch.ones(3),
        "norm.weight": torch.ones(4),
        "norm.bias": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(ahead.probably_tied(Checkpoint.open(tmp_path))) == ["lm_head.weight", "shared.weight"]


def test_what_is_hashed_ahead_has_the_digest_of_its_bytes(naive: Callable[[str], Path]) -> None:
    source = naive("dg_nvfp4_experts_only")
    checkpoint = Checkpoint.open(source)
    known: dict[str, bytes] = {}
    with ahead.hashing(checkpoint, _engine(), known):
        for thread in threading.enumerate():
            if thread.name == "tierewrite-ahead":
                thread.join()
    data = {name: content for name, (_, _, content) in read_tensors(source).items()}
    assert known.keys() == set(ahead.probably_tied(checkpoint))
    assert known == {name: blake3(data[name]).digest() for name in known}


def test_nothing_is_hashed_twice_and_the_output_is_the_same(
    naive: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = naive("dg_nvfp4_experts_only")
    hashed: list[str] = []
    run = Transfer.run

    def noted(self: Transfer, work: Iterable[Task]) -> dict[str, bytes]:
        work = list(work)
        hashed.extend(span.key for task in work for span in task.spans if span.hashed)
        return run(self, work)

    monkeypatch.setattr(transfer_room.Transfer, "run", noted)
    rewrite(source, tmp_path / "ahead", device="cpu")
    assert len(hashed) == len(set(hashed))
    assert set(ahead.probably_tied(Checkpoint.open(source))) <= set(hashed)

    monkeypatch.setattr(ahead, "probably_tied", lambda checkpoint: [])
    rewrite(source, tmp_path / "plain", device="cpu")
    names = sorted(path.name for path in (tmp_path / "ahead").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "plain").iterdir())
    for name in names:
        if name != "tierewrite.json":  # it names DST
            assert (tmp_path / "ahead" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_the_threads_are_gone_when_the_class_has_answered_and_when_it_failed(naive: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(naive("dg_nvfp4_experts_only"))
    with pytest.raises(KeyError), ahead.hashing(checkpoint, _engine(), {}):
        raise KeyError
    assert not [t for t in threading.enumerate() if t.name.startswith("tierewrite")]


def test_a_failure_is_left_to_the_pass_that_needs_the_bytes(
    naive: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(naive("dg_nvfp4_experts_only"))
    engine = _engine()

    def fails(*args: object, **options: object) -> None:
        raise SystemFailure("reading failed", file="x")

    monkeypatch.setattr(engine, "transfer", fails)
    known: dict[str, bytes] = {}
    with ahead.hashing(checkpoint, engine, known):
        pass
    assert known == {}
