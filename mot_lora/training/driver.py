"""What is around CUDA: the NVIDIA driver, also where torch cannot use it, and how torch is to hold a GPU's memory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = {12: 525, 13: 580}  # the driver that CUDA of this version needs, as NVIDIA says


def driver_version(root: Path = Path("/")) -> str | None:
    """The driver's version where there is a GPU, e.g. `580.65.06`. `root` is where the system's files begin: a
    container without a GPU has the host's version file, but no device.
    """
    file = root / "proc/driver/nvidia/version"
    if file.exists() and list(root.glob("dev/nvidia[0-9]*")):
        return _version(file.read_text(errors="replace"))
    smi = shutil.which("nvidia-smi")  # Windows, and its subsystem for Linux
    if smi is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return _version(said)


def why_unused(driver: str | None, cuda: str | None) -> str | None:
    """Why torch, whose CUDA has this version, finds no GPU although there is this driver; None where there is none, or
    torch has no CUDA, or GPUs are hidden.

    >>> why_unused("535.104.05", "13.0")
    "the NVIDIA driver 535.104.05 cannot run torch's CUDA 13.0: update it to 580 or newer"
    """
    if driver is None or cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    oldest = OLDEST.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < oldest:
        return f"the NVIDIA driver {driver} cannot run torch's CUDA {cuda}: update it to {oldest} or newer"
    return f"torch finds no GPU, although there is the NVIDIA driver {driver} and torch has CUDA {cuda}: see nvidia-smi"


def _version(text: str) -> str | None:
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def expandable_segments() -> None:
    """Have torch's segments of a GPU's memory grow, unless something else is set: traces of many lengths leave holes in
    segments of one size, and near its limit these decide. torch reads it when it first uses CUDA.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
