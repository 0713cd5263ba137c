"""Several hosts on one machine, in namespaces of their own, for `ray up` as it goes to real ones.

Each has its own address on a bridge, its own processes, /tmp, /dev/shm, home and sshd; the root file system is the
machine's, with changes in memory. Needs root, Debian's iproute2, openssh-server, openssh-client and rsync.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

BRIDGE, NETWORK = "rporec0", "10.231.7"
PROGRAMS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "rsync")


def missing() -> str:
    """Why hosts cannot be started here; "" when they can."""
    if os.geteuid() != 0:
        return "needs root for network and mount namespaces"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs {', '.join(lacking)} (iproute2, openssh-server, rsync)" if lacking else ""


class Hosts:
    """Started one by one; all end with the block.

    read_only, shared: folders of the machine that each host shows under the same path.
    """

    def __init__(self, folder: Path, read_only: list[Path], shared: list[Path]) -> None:
        self.folder, self._read_only, self._shared = folder, read_only, shared
        self.key = folder / "key"
        self._first: dict[int, subprocess.Popen] = {}  # process of each host

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for index in list(self._first):
            self.kill(index)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", f"{_name(index)}-up")  # a namespace stays until its last socket has timed out
                _ip("netns", "del", _name(index))
        _ip("link", "del", BRIDGE)

    @staticmethod
    def address(index: int) -> str:
        return f"{NETWORK}.{10 + index}"

    def start(self, index: int, patience: float = 20.0) -> None:
        """Boot a host, anew if it was killed, and wait for its sshd; its log is in the folder."""
        name = _name(index)
        if index not in self._first:
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}-up", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}-up", "master", BRIDGE, "up")
            for words in (
                ("addr", "add", f"{self.address(index)}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
                ("route", "add", "default", "via", f"{NETWORK}.1"),
            ):
                _ip("-n", name, *words)
        words = [Path(__file__).with_name("host.sh"), name, self.folder, *self._read_only, "--", *self._shared]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "bash", *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._first[index] = subprocess.Popen(
                ["ip", "netns", "exec", name, *unshare], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + patience
        while not self._answers(index):
            if time.monotonic() > deadline or self._first[index].poll() is not None:
                raise RuntimeError((self.folder / f"{name}.log").read_text()[-2000:])
            time.sleep(0.1)

    def kill(self, index: int) -> None:
        """As when its power fails: all its processes at once."""
        self._first[index].kill()
        self._first[index].wait()
        while self._answers(index):  # the kernel is still at it
            time.sleep(0.05)

    def cut(self, index: int) -> None:
        """As when its cable is pulled: nothing comes or goes, and nobody is told."""
        _ip("link", "set", f"{_name(index)}-up", "down")

    def join(self, index: int) -> None:
        """Plug the cable in again."""
        _ip("link", "set", f"{_name(index)}-up", "up")

    def _answers(self, index: int) -> bool:
        try:
            socket.create_connection((self.address(index), 22), 1).close()
        except OSError:
            return False
        return True

    def shell(self, index: int, command: str) -> str:
        """What a command on a host prints."""
        options = [f"-o{one}" for one in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")]
        words = ["ssh", *options, "-i", self.key, f"root@{self.address(index)}", command]
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout

    def processes(self, index: int) -> list[str]:
        """Command lines of all processes there, sorted, but for those of a login."""
        lines = self.shell(index, "ps -eo args=").splitlines()
        return sorted(line for line in lines if not line.startswith(("sshd:", "sshd-session:", "ps -eo", "sleep ")))

    def ray_processes(self, index: int) -> list[str]:
        """Of these Ray's: its own programs, its Python services, its workers."""
        return [line for line in self.processes(index) if line.startswith("ray::") or "/site-packages/ray/" in line]


def interpreter_folders() -> list[Path]:
    """What hosts must be shown to run the Python that runs this: its environment, and the one behind it."""
    return [Path(sys.prefix), Path(sys.base_prefix)]


def _name(index: int) -> str:
    return f"rporec-{index}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
