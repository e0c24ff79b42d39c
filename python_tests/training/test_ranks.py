"""Ranks: who launched, what the processes tell each other, and what is said where one is gone."""

from __future__ import annotations

import json
from pathlib import Path

import launch
import pytest
import torch

from evit_ext.training import ranks
from evit_ext.training.launcher import launched

SCRIPT = Path(__file__).with_name("talking_ranks.py")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0"}, None),
        (TORCHRUN, (3, 8, 1)),
        (SLURM, (5, 6, 2)),
        ({**SLURM, **TORCHRUN}, (3, 8, 1)),  # torchrun, started by srun
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),  # a batch script
    ],
)
def test_launched(environment: dict[str, str], place: tuple[int, int, int] | None) -> None:
    assert launched(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK is not set: expected all of RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "expected numbers in SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID"),
        ({**TORCHRUN, "RANK": "8"}, r"expected RANK and LOCAL_RANK in \[0, WORLD_SIZE\), got 8, 1 and 8"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, r"got 3, -1 and 8"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, r"got 3, 1 and 0"),
    ],
)
def test_launchers_that_make_no_sense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launched(environment)


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TORCHRUN, *SLURM, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone(unlaunched: pytest.MonkeyPatch) -> None:
    with ranks.join("cpu") as here:
        assert here == ranks.ALONE and here.is_first
        assert here.sum([1, 2.5, True]) == [1.0, 2.5, 1.0]
        assert here.gather("a") == ["a"]
        here.barrier()
    assert not torch.distributed.is_initialized()


def test_errors_of_join(unlaunched: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ranks.join("tpu"),
    ):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setenv("RANK", "1")
        patch.setenv("LOCAL_RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="local rank 1 has no GPU: this process sees 1"), ranks.join():
            pass
        with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT must say"), ranks.join("cpu"):
            pass
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ValueError, match="^MASTER_PORT must say"), ranks.join("cpu"):
            pass


def test_two_processes() -> None:
    first, second = (json.loads(printed) for printed in launch.run(SCRIPT, 2))
    assert first["place"] == [0, 2, 0, True, "cpu"]
    assert second["place"] == [1, 2, 1, False, "cpu"]
    assert first["sum"] == second["sum"] == [1.0, 2.0**25 + 2, 0.2]
    assert first["none"] == []
    assert first["gather"] == second["gather"] == [{"rank": rank, "nothing": None} for rank in (0, 1)]
    assert first["waited"] > 0.25  # for the second, which is half a second late
    for said in (first, second):
        # One that is at work while Python shuts down can abort the process.
        assert said["threads"] > 0
        assert said["threads left"] == 0
        assert "join() has ended" in said["barrier"]


def test_a_process_that_dies() -> None:
    (status, _, errors), (died, _, _) = launch.outputs(launch.start(SCRIPT, 2, "dying"))
    assert died == 9
    assert status == 1
    assert "ConnectionError: rank 0 of 2 lost another process of the run" in errors
