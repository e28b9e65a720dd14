"""The Slurm script queues itself again after a stop in good order, and never after a failure."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples/slurm/train.sbatch"


def run_script(folder: Path, *, code: int, **environment: str) -> tuple[int, str]:
    """Run the script where `srun` writes down what it is given and ends with `code`; return its code and all notes."""
    programs = {
        "srun": f'echo "srun $*" >> notes; SLURM_PROCID=1 SLURM_LOCALID=1 "${{@:2}}"; exit {code}',
        "scontrol": 'echo "scontrol $*" >> notes; echo node1; echo node2',
        "python": 'echo "rank $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*" >> notes',
    }
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    path_variable = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), "--seed", "3"], cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": path_variable, "VENV": str(folder), **slurm, **environment},
    )  # fmt: skip
    return done.returncode, (folder / "notes").read_text() + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "ends_with", "is_queued"),
    [(0, "0", 0, False), (138, "0", 0, True), (143, "3", 0, True), (138, "50", 138, False), (2, "0", 2, False)],
    ids=["finished", "time limit", "preempted", "too many starts", "mistake"],
)
def test_only_a_run_that_was_stopped_in_good_order_is_queued_again(
    code: int, restarts: str, ends_with: int, is_queued: bool, tmp_path: Path
) -> None:
    ended, notes = run_script(tmp_path, code=code, SLURM_RESTART_COUNT=restarts)
    assert ended == ends_with
    assert ("scontrol requeue 7" in notes) == is_queued


def test_each_process_knows_its_rank_and_where_to_meet(tmp_path: Path) -> None:
    _, notes = run_script(tmp_path, code=0)
    assert "rank 1 of 2 at node1:20007: -m perturbgene.main mlm --corpus corpus" in notes
    assert "--resume_from_checkpoint" in notes
    assert "--seed 3" in notes


@pytest.mark.parametrize("verb", ["predict", "perturb"])
def test_each_job_of_an_array_does_its_part_and_the_last_one_merges(verb: str, tmp_path: Path) -> None:
    """The script's words reach the program; `tests/test_parts.py` runs such words."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text('#!/usr/bin/env bash\necho "$*"\n')
    (tmp_path / "bin/python").chmod(0o755)

    def words_of(**environment: str) -> list[str]:
        done = subprocess.run(
            ["bash", str(SCRIPT.with_name(f"{verb}.sbatch"))], capture_output=True, text=True, check=True, timeout=60,
            env={"PATH": os.environ["PATH"], "VENV": str(tmp_path), "OUTPUT": "out.csv", **environment},
        )  # fmt: skip
        return done.stdout.split()[2:]

    part = words_of(SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="10", OPTIONS="--min_gene_coverage 0.1")
    output = ["--output", "out.csv", "--min_gene_coverage", "0.1", "--part", "3/10"]
    assert part == [verb, "runs/mlm", "cells.h5ad", *output]
    assert words_of(STEP="merge", SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="1") == ["merge", "out.csv"]
