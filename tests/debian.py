"""Debian's packages for the slow tests that start a program of their own."""

import os
import shutil
import subprocess


def missing(programs: tuple[str, ...], packages: tuple[str, ...], seconds: float = 600) -> str:
    """Why some programs cannot be run here; "" if all can. Installs their packages as root."""
    lacking = _lacking(programs)
    if not lacking:
        return ""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        return f"no {lacking} here, and no right to install it"
    said = _install(packages, seconds)
    lacking = _lacking(programs)
    return f"no {lacking} here, and no installing it: {said}" if lacking else ""


def _lacking(programs: tuple[str, ...]) -> str:
    return ", ".join(name for name in programs if shutil.which(name) is None)


def _install(packages: tuple[str, ...], seconds: float) -> str:
    """Install packages, with newer lists if it fails at first; return what apt-get said last."""
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *packages)
    environment, said = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, ""
    for argv in (install, ("apt-get", "update"), install):
        try:
            done = subprocess.run(
                argv, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(argv[:2])} took more than {seconds:g} s"
        if argv is install and done.returncode == 0:
            break
        said = (done.stderr.strip().splitlines() or [said])[-1]
    return said
