"""Two gloo processes on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

PATIENCE = 600
"""Seconds that any process of a test may take: for machines many times slower, and still an end."""


def run_two(script, folder, *arguments):
    """Run `script RANK STORE OUT`, and arguments, twice and return what each wrote as json to OUT.RANK."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parent / script),
                str(rank),
                str(folder / "store"),
                str(folder / "out"),
                *arguments,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(2)]


def report(work):
    """Be one of them: write what ``work(rank, folder, *arguments)`` finds."""
    rank, store, out, *arguments = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    found = work(int(rank), Path(out).parent, *arguments)
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive its group, and abort a process that they see exit
