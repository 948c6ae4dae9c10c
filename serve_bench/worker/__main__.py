"""``python -m serve_bench.worker TASK``: the process of one arm."""

from __future__ import annotations

import sys

from serve_bench.worker.process import main


def run(task: str) -> None:
    """Answer the commands of a task; a process imports the libraries of its own task only."""
    if task == "causal-lm":
        from serve_bench.worker.language import Session

        main(Session())
    else:
        from serve_bench.worker.encoder import Session as EncoderSession

        main(EncoderSession())


if __name__ == "__main__":
    run(sys.argv[1])
