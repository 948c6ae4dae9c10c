"""`vllm bench serve` without vLLM's command line, which asks for a package named vllm.

The build for CPUs has another name. Runs in an environment of its own (`make test-clients`).
"""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
