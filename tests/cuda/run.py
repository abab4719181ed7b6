"""Runs a module or a script on a machine without CUDA as if it had a CUDA GPU. Needs torch's CPU build and g++.

    python tests/cuda/run.py -m mot_lora.cli run recipes/quickstart.yaml rounds=1 branch.steps=2 output=runs/false
    python tests/cuda/run.py --name "Tesla T4" --gib 16 --capability 7.5 script.py
    python tests/cuda/run.py --count 2 -m pytest -x tests/training/test_offload.py

What it shows: tensors on different devices, dtypes under CUDA's autocast, which attention kernel is chosen, bytes in
use and their peak, out-of-memory errors, use of memory that was given back, copies that nobody waited for. What it
cannot show: real kernels, speed, fragmentation. Products are the CPU's. A script may `import falsecuda` and ask it.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

import falsecuda


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="run.py [--name NAME] [--gib N] [--capability N.N] [--count N] (-m MODULE | SCRIPT) ..."
    )
    parser.add_argument("--name", default=falsecuda.Card.name)
    parser.add_argument("--gib", type=float, default=falsecuda.Card.gib)
    parser.add_argument("--capability", default=falsecuda.Card.capability)
    parser.add_argument("--count", type=int, default=falsecuda.Card.count)
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER)
    parser.add_argument("script", nargs=argparse.REMAINDER)
    said = parser.parse_args()
    if not (command := said.module or said.script):
        parser.error("a module or a script to run")
    if reason := falsecuda.why_not():
        sys.exit(f"no false GPU here: {reason}")
    card = falsecuda.Card(said.name, said.gib, said.capability, said.count)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles the kernels that it has for any device
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    falsecuda.load(falsecuda.build())
    import torch

    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401

    falsecuda.install(card)
    sys.argv = command
    sys.path.insert(0, str(Path.cwd()))
    if said.module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
