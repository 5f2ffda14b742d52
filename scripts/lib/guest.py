"""Real guests on a mount of EpochFS, for the scripts beside this directory.

`Guest` is one QEMU; `Mount` is a repository of its own, mounted by a daemon of its
own; `Control` stands in for it with a plain directory, to tell what QEMU does from
what the mount does. All of them are context managers that leave nothing behind.
"""

import contextlib
import ctypes
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benches import CACHE
from qmp import Monitor, QmpError

SCRIPTS = Path(__file__).resolve().parent.parent
MIB = 1 << 20
DISK_MIB = 8  # scripts/guest/workload.rs uses all of it


class Failed(Exception):
    """What a script tells its user before it ends with 1."""


def check_tools():
    for tool in ("qemu-system-x86_64", "busybox", "cpio", "rustc"):
        if not shutil.which(tool):
            raise Failed(f"{tool} is missing; run scripts/setup first")
    if not (CACHE / "guest/vmlinuz").exists():
        raise Failed(f"the guest's kernel is missing from {CACHE / 'guest'}; run scripts/setup first")


def run(command, **options):
    """Runs a command to its end and gives what it printed."""
    command = [str(word) for word in command]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(f"'{' '.join(command)}' exited with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def build_initramfs(workload, directory):
    path = Path(directory) / f"initramfs-{workload}"
    run([SCRIPTS / "lib/initramfs", workload, path])
    return path


def fsync(path):
    """Syncs a file from a descriptor of this process, as an agent beside the VMM would."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def resident_pages(path):
    """How many pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {path}")
        states = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        try:
            if libc.mincore(address, size, states):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
        finally:
            libc.munmap(address, size)
    return sum(state & 1 for state in states)


def qemu(console, initramfs, memory, append, disk=None, processors=2, cpu="max"):
    """The command line of a guest, but for its RAM and its monitor."""
    command = [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot",
        "-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", str(processors), "-m", str(memory),
        "-serial", f"file:{console}",
        "-kernel", str(CACHE / "guest/vmlinuz"), "-initrd", str(initramfs),
        "-append", f"console=ttyS0 quiet panic=-1 {append}",
    ]  # fmt: skip
    if disk:
        command += ["-drive", f"if=none,id=disk,format=raw,{disk}", "-device", "virtio-blk-pci,drive=disk"]
    return command


def empty_start(directory, initramfs, memory, append):
    """How many seconds the same QEMU takes until an empty machine has begun to run: what a restore cannot do without."""
    directory = Path(directory)
    console, path, disk = directory / "empty.console", directory / "empty.qmp", directory / "empty.disk"
    with open(disk, "wb") as file:
        file.truncate(DISK_MIB * MIB)
    path.unlink(missing_ok=True)
    words = qemu(console, initramfs, memory, append, f"file={disk},snapshot=on")
    words += ["-machine", "q35", "-S", "-qmp", f"unix:{path},server=on,wait=off"]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not path.exists():
            if process.poll() is not None:
                raise Failed(f"QEMU ended: {process.stderr.read().strip()}")
            time.sleep(0.001)
        Monitor(path).run("cont")
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
        console.unlink(missing_ok=True)


class Guest:
    """A QEMU whose RAM is what `ram` says, the options of a memory backend. `memory` is in MiB.

    `agent` is the socket of a second monitor. With `restore`, the words and the environment of an `epochfs restore`, that starts it, and
    says what RAM it has."""

    count = 0

    def __init__(self, directory, initramfs, memory, ram, append, disk=None, processors=2, cpu="max", incoming=False, restore=None, agent=None):
        Guest.count += 1
        self.name = f"guest-{Guest.count}"
        self.console_path = Path(directory) / f"{self.name}.console"
        self.log_path = Path(directory) / f"{self.name}.log"
        monitor = Path(directory) / f"{self.name}.qmp"
        command = qemu(self.console_path, initramfs, memory, append, disk, processors, cpu)
        if agent:
            command += ["-qmp", f"unix:{agent},server,nowait"]
        words, environment = restore or ([], None)
        if restore:
            command = [*words, "--qmp", str(monitor), "--", *command, "-machine", "q35"]
        else:
            command += ["-machine", "q35,memory-backend=ram", "-object", f"{ram},id=ram,size={memory}M"]
            command += ["-qmp", f"unix:{monitor},server,nowait"] + ["-incoming", "defer"] * incoming
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 60
            # The monitor is the restore's until the machine runs.
            while b"first instruction after" not in self.log_path.read_bytes() if restore else not monitor.exists():
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self.failure("QEMU did not open its monitor")
                time.sleep(0.005)
            self.monitor = Monitor(monitor)
            ignore_shared = {"capability": "x-ignore-shared", "state": True}
            self.monitor.run("migrate-set-capabilities", capabilities=[ignore_shared])
        except BaseException:
            self.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """As a host that dies would: nothing is flushed, nobody is told."""
        if started := self.started():
            # `epochfs restore` ends with the QEMU that it started.
            for pid in started:
                os.kill(pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def started(self):
        """The QEMU of an `epochfs restore`."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        except OSError:
            return []

    def console(self):
        return self.console_path.read_text(errors="replace") if self.console_path.exists() else ""

    def failure(self, what):
        tail = "\n".join((self.log_path.read_text(errors="replace") + self.console()).splitlines()[-15:])
        return Failed(f"{self.name}: {what}; the end of its log and console:\n{tail}")

    def check_alive(self):
        if self.process.poll() is not None:
            raise self.failure(f"QEMU exited with {self.process.returncode}")

    def wait_for(self, pattern, what, seconds=180):
        """Waits until the console matches, and gives the match."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            if found := re.search(pattern, text := self.console(), re.MULTILINE):
                return found
            if "guest: failed" in text:
                raise self.failure("the workload failed")
            if ended or time.monotonic() > deadline:
                raise self.failure(f"no {what}" + ("" if ended else f" after {seconds} s"))
            time.sleep(0.01)

    def ticks(self):
        return ticks(self.console())

    def wait_ticks(self, more, seconds=180):
        """Waits for so many more ticks of the workload `keep`; it checks everything it keeps in eight of them."""
        last = (self.ticks() or [0])[-1]
        deadline = time.monotonic() + seconds
        while (self.ticks() or [0])[-1] < last + more:
            if "guest: failed" in self.console():
                raise self.failure("the workload failed")
            if time.monotonic() > deadline:
                raise self.failure(f"the workload did not go on for {seconds} s")
            self.check_alive()
            time.sleep(0.01)

    def save_state(self, path):
        """The devices' state; the guest is stopped from here on, until `run_on`."""
        self.monitor.run("stop")
        self.monitor.run("migrate", uri=f"file:{path}")
        self.monitor.wait_migrated()

    def load_state(self, path):
        try:
            self.monitor.run("migrate-incoming", uri=f"file:{path}")
            self.monitor.wait_incoming()
        except QmpError as error:
            raise self.failure(str(error)) from error

    def run_on(self):
        self.monitor.run("cont")

    def dump(self, path, memory):
        """The guest's memory as QEMU itself sees it; up to 2816 MiB it is one piece."""
        self.monitor.run("pmemsave", val=0, size=memory * MIB, filename=str(path))


def ticks(console):
    return [int(number) for number in re.findall(r"^guest: tick (\d+)\r?\n", console, re.MULTILINE)]


class Mount:
    """A new repository in a directory, mounted by `epochfs mount`."""

    what = "a mount of EpochFS"

    def __init__(self, directory, epochfs):
        self.directory = Path(directory)
        self.epochfs = epochfs
        self.mounted = self.directory / "mount"
        self.log_path = self.directory / "daemon.log"
        self.environment = os.environ | {
            "EPOCHFS_REPO": str(self.directory / "repository"),
            "EPOCHFS_STATE_DIR": str(self.directory / "state"),
        }
        self.mounted.mkdir()
        self.run("init")
        self.start()

    def start(self):
        with open(self.log_path, "wb") as log:
            self.daemon = subprocess.Popen(
                [self.epochfs, "mount", str(self.mounted)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while b"mounted" not in self.log_path.read_bytes():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                reason = self.log_path.read_text(errors="replace")
                self.close()
                raise Failed(f"'epochfs mount' did not come up: {reason.strip()}")
            time.sleep(0.01)

    def crash(self):
        self.daemon.kill()
        self.daemon.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def run(self, *arguments):
        return run([self.epochfs, *arguments], env=self.environment)

    def create(self, machine):
        (self.mounted / machine).mkdir()

    def live(self, machine):
        return self.mounted / machine / "live"

    def commit(self, machine, tag, by_mkdir):
        """Returns when the epoch is durable."""
        if by_mkdir:
            (self.mounted / machine / "epochs" / tag).mkdir()
        else:
            self.run("commit", machine, "--tag", tag)

    @contextlib.contextmanager
    def commit_frozen(self, machine, tag):
        """The block runs once what is committed is frozen, and ends when the epoch is durable."""
        before = self.state_of(machine)["base"]
        with ThreadPoolExecutor(1) as thread:
            committing = thread.submit(self.commit, machine, tag, by_mkdir=True)
            while not committing.done():
                state = self.state_of(machine)
                if state["commits_in_flight"] or state["base"] != before:
                    break
            yield
            committing.result()

    def state_of(self, machine):
        """What the daemon says about a machine."""
        (path,) = (self.directory / "state").glob("*/daemon.sock")
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(str(path))
            daemon.sendall(b'{"version":1,"request":"status"}\n')
            answer = json.loads(daemon.makefile().readline())["answer"]
        return next(state for state in answer["machines"] if state["machine"] == machine)

    def epoch(self, machine, tag):
        return self.mounted / machine / "epochs" / tag

    def clone(self, machine, tag, name):
        self.run("clone", f"{machine}@{tag}", name)

    def restore(self, machine, tag, *options):
        """What starts a guest from an epoch, for `Guest`."""
        return [str(self.epochfs), "restore", f"{machine}@{tag}", *options], self.environment

    def facts(self, machine):
        epochs = json.loads(self.run("log", machine, "--json"))
        return {"log": epochs, "daemon_peak_bytes": peak_memory(self.daemon.pid)}

    def verify(self):
        self.run("verify")

    def close(self):
        """Unmounts; a daemon that does not end in time is killed, and its mount detached."""
        if self.daemon.poll() is None:
            self.daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait(30)
        if self.daemon.poll() is None:
            print("the daemon did not end on SIGTERM, and is killed", file=sys.stderr)
            self.daemon.kill()
            self.daemon.wait()
        if is_mounted(self.mounted):
            subprocess.run(["fusermount3", "-u", "-z", str(self.mounted)], stderr=subprocess.DEVNULL, check=False)


class Control:
    """A plain directory in the place of the mount: an epoch is a copy."""

    what = "a plain directory (the control)"

    def __init__(self, directory, stale=None):
        self.root = Path(directory)
        self.stale, self.last = stale, None  # a file that each epoch wrongly takes from the one before

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def crash(self):
        pass

    def start(self):
        pass

    def create(self, machine):
        self.live(machine).mkdir(parents=True)

    def live(self, machine):
        return self.root / machine / "live"

    def commit(self, machine, tag, by_mkdir):
        self.copy(self.live(machine), epoch := self.epoch(machine, tag))
        if self.stale and self.last:
            self.copy(self.last / self.stale, epoch / self.stale)
        self.last = epoch

    @contextlib.contextmanager
    def commit_frozen(self, machine, tag):
        self.commit(machine, tag, by_mkdir=True)
        yield

    def epoch(self, machine, tag):
        return self.root / machine / "epochs" / tag

    def clone(self, machine, tag, name):
        self.copy(self.epoch(machine, tag), self.live(name))

    def facts(self, machine):
        return {}

    def verify(self):
        pass

    @staticmethod
    def copy(source, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        run(["cp", "-r", "--sparse=always", source, target])


def is_mounted(path):
    """Without asking the file system, which may have no daemon any more."""
    return any(line.split(" ")[1] == str(path) for line in Path("/proc/mounts").read_text().splitlines())


def peak_memory(pid):
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
