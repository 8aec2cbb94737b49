"""The Slurm of slurm_here.py with accounts: its database daemon and a MariaDB, on free ports.

Both are taken from Debian's packages without installing them, so no service of the machine starts.
"""

import shutil
import subprocess
from pathlib import Path

from tests.ranks import free_ports
from tests.slurm_here import SlurmHere, host_name, until

PACKAGES = ("mariadb-server-core", "libmariadb3", "libaio1", "liburing2")
PACKAGES += ("slurmdbd", "slurm-wlm-mysql-plugin")
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[0]}
AccountingStoragePass={folder}/munge/socket
AccountingStorageEnforce=associations
"""
DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[0]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[1]}
StorageUser=root
StoragePass=none
StorageLoc=slurm
PluginDir={plugins}:{more_plugins}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def unpack(folder: Path) -> str:
    """Download the packages and unpack them below a folder; why not, "" if it worked."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return "no apt-get here"
    got = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True, timeout=300
    )
    if got.returncode:
        return f"Slurm's database cannot be downloaded: {got.stderr.strip().splitlines()[-1]}"
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return ""


class SlurmWithAccounts(SlurmHere):
    """With the account `lab`, of which root is a member; no other account may be used.

    Args:
        folder: of its state.
        root: where the packages lie.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(folder)
        self._root, self._ports = root, free_ports(2)
        self.more_config = ACCOUNTING.format(folder=folder, ports=self._ports)

    def start_accounts(self) -> None:
        """Start MariaDB and slurmdbd, and enter the account."""
        (libraries,) = (self._root / "usr" / "lib").glob("*-linux-gnu")
        self.environment["LD_LIBRARY_PATH"] = str(libraries)
        self._start_database()
        plugins = libraries.relative_to(self._root) / "slurm-wlm"
        values = {"folder": self.folder, "ports": self._ports, "host": host_name()}
        values |= {"plugins": Path("/") / plugins, "more_plugins": self._root / plugins}
        file = self.folder / "slurmdbd.conf"
        file.touch(mode=0o600)  # it may hold a password, so slurmdbd takes no other
        file.write_text(DATABASE.format(**values))
        self.start_daemon(str(self._root / "usr" / "sbin" / "slurmdbd"), "-D")
        ask = ("sacctmgr", "--immediate", "show", "cluster")
        until(lambda: self.run(*ask, check=False).returncode == 0, 60, "slurmdbd does not answer")
        for words in (("cluster", "here"), ("account", "lab"), ("user", "root", "account=lab")):
            self.run("sacctmgr", "--immediate", "add", *words)

    def _start_database(self) -> None:
        """MariaDB with its own tables: Slurm keeps procedures in them."""
        shared, data = self._root / "usr" / "share" / "mysql", self.folder / "database"
        data.mkdir()
        settings = {"datadir": data, "socket": data / "socket", "port": self._ports[1]}
        settings |= {"bind-address": "127.0.0.1", "user": "root", "pid-file": data / "pid"}
        settings |= {"lc-messages-dir": shared, "character-sets-dir": shared / "charsets"}
        settings |= {"innodb-buffer-pool-size": "32M", "innodb-log-file-size": "32M"}
        command = [str(self._root / "usr" / "sbin" / "mariadbd"), "--no-defaults"]
        command += ["--skip-grant-tables", *(f"--{k}={value}" for k, value in settings.items())]
        tables = (shared / "mysql_system_tables.sql").read_text()
        self.run(*command, "--bootstrap", input=f"create database mysql;\nuse mysql;\n{tables}")
        self.start_daemon(*command)
        until((data / "socket").exists, 60, "no database")
