"""Around CUDA: the NVIDIA driver's version, why torch cannot use a GPU, and the setting of torch's GPU allocator."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = {12: 525, 13: 580}  # the oldest driver for each major version of CUDA, from NVIDIA's release notes


def driver_version(root: Path = Path("/")) -> str | None:
    """The NVIDIA driver's version, e.g. `580.65.06`; None without a GPU. `root` is the root of the file system.

    Both files are checked: a container without a GPU sees the host's version file, but no device.
    """
    file = root / "proc/driver/nvidia/version"
    if file.exists() and list(root.glob("dev/nvidia[0-9]*")):
        return _version(file.read_text(encoding="utf-8", errors="replace"))
    smi = shutil.which("nvidia-smi")  # Windows, and its subsystem for Linux
    if smi is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return _version(said)


def why_unused(driver: str | None, cuda: str | None) -> str | None:
    """Why torch, built for this version of CUDA, finds no GPU although this driver is installed; None without a driver,
    without CUDA in torch, or if GPUs are hidden.

    >>> why_unused("535.104.05", "13.0")
    "the NVIDIA driver 535.104.05 cannot run torch's CUDA 13.0: update it to 580 or newer"
    """
    if driver is None or cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    oldest = OLDEST.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < oldest:
        return f"the NVIDIA driver {driver} cannot run torch's CUDA {cuda}: update it to {oldest} or newer"
    return f"torch (CUDA {cuda}) finds no GPU, although the NVIDIA driver {driver} is installed: check nvidia-smi"


def _version(text: str) -> str | None:
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def expandable_segments() -> None:
    """Let torch's segments of GPU memory grow, unless the user has set something else.

    Traces of many lengths fragment segments of fixed size, which matters near the limit of memory. torch reads the
    setting when it first uses CUDA.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
