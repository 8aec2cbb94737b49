"""Make `.venv-launch`, which sends jobs to Slurm: nemo-run alone, whose pins clash with vLLM's.

What `slurm` of setup.py asks for is installed into the cache of make_env.py, in a folder named by a
hash of it; `.venv-launch` is a thin environment over that and sees the checkout. It holds nothing
of the training stack. A script apart from make_env.py, whose text is part of the training
environment's key. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from make_env import ROOT, requirements


def main() -> int:
    """Make the environment if its key is not in the cache yet, then lay `.venv-launch` over it."""
    wanted = requirements("slurm")
    key = hashlib.sha256("\n".join([*wanted, sys.version]).encode()).hexdigest()[:16]
    default = Path.home() / ".cache" / "megatron_sr1"
    base = Path(os.environ.get("MEGATRON_SR1_CACHE") or default) / f"launch-{key}"
    base.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{base}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "complete").exists():
            print(f"make_launch_env: making {base} (a minute or two, once)", flush=True)
            venv.create(base, with_pip=True, clear=True)
            pip = [str(base / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, "--disable-pip-version-check", *wanted], check=True)
            (base / "complete").touch()
    here = ROOT / ".venv-launch"
    venv.create(here, with_pip=False, clear=True, symlinks=True)
    site = next((here / "lib").glob("python*")) / "site-packages"
    packages = next((base / "lib").glob("python*")) / "site-packages"
    # A line of a .pth that starts with "import" runs: the packages, and the checkout before them.
    (site / "_base.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({str(packages)!r})\n")
    (here / "bin" / "nemo").symlink_to(base / "bin" / "nemo")
    print(f"make_launch_env: .venv-launch is ready, over {base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
