"""What the benches share."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
GIB = 1 << 30
CACHE = Path(os.environ.get("EPOCHFS_CACHE") or Path.home() / ".cache/epochfs")


class Ran(NamedTuple):
    seconds: float
    cpu: float  # seconds of user and system time
    peak: int  # bytes of memory
    output: str


class Failed(Exception):
    """A command failed."""


def run(command, env=None, capture=False):
    """Runs a command to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            err.seek(0)
            reason = err.read().decode(errors="replace").strip().splitlines()[-5:]
            raise Failed(f"'{' '.join(map(str, command))}' exited with {child.returncode}: {' / '.join(reason)}")
        out.seek(0)
        output = out.read().decode(errors="replace") if capture else ""
        return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def warm(path):
    """Reads a file into the page cache; of a large sparse one, only its data."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            if size > 4 * GIB:
                try:
                    position = os.lseek(file.fileno(), position, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    return
                end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
                os.lseek(file.fileno(), position, os.SEEK_SET)
            else:
                end = size
            while position < end:
                position += file.readinto(memoryview(buffer)[: min(len(buffer), end - position)])


def touch(mib=1536):
    # In a virtual machine a page that was never used, or given back to the host,
    # costs a fault there: cp takes 0.3 s or 0.9 s, by chance. A process that takes
    # memory and ends leaves free pages that the host has, for every peer alike.
    populate = f"import mmap; mmap.mmap(-1, {mib} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)  # MAP_POPULATE"
    subprocess.run([sys.executable, "-c", populate], check=True)


class Server:
    """A process that serves a mount, and the mount's end."""

    def __init__(self, command, mountpoint, log, env=None):
        self.mountpoint, self.log = mountpoint, log
        mountpoint.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        deadline = time.monotonic() + 120
        while not (os.path.ismount(mountpoint) and b"mounted" in log.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                lines = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise Failed(f"'{' '.join(map(str, command))}' did not mount: {' / '.join(lines)}")
            time.sleep(0.02)

    def stop(self):
        if os.path.ismount(self.mountpoint):
            subprocess.run(["umount", str(self.mountpoint)], capture_output=True)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            subprocess.run(["umount", "-l", str(self.mountpoint)], capture_output=True)

    def memory(self):
        """Bytes: the most ever resident, what is resident now, and that of it which is no file's."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
        return {"peak": kib["VmHWM"] << 10, "now": kib["VmRSS"] << 10, "anonymous": kib["RssAnon"] << 10}

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_share(seconds):
    """How much of all processors is used."""

    def counts():
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = counts()
    time.sleep(seconds)
    total_then, idle_then = counts()
    return 1 - (idle_then - idle) / max(1, total_then - total)


def median(values):
    return statistics.median(values) if values else None


def find(value, key):
    """The first value under a key anywhere in a JSON document."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := find(item, key)) is not None), None)
    return None


def seconds_text(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def bytes_text(count):
    return f"{count / (1 << 20):.1f} MiB"


def first_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def machine(data):
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "kernel": platform.release(),
        "file_system": first_line("findmnt", "-no", "FSTYPE", "--target", str(data)),
        "load": round(os.getloadavg()[0], 2),
    }


def find_program(name):
    """$EPOCHFS for epochfs, else the release build, else the one in PATH."""
    target = Path(os.environ.get("CARGO_TARGET_DIR") or CACHE / "target") / "release"
    named = os.environ.get("EPOCHFS") if name == "epochfs" else None
    for candidate in (named, target / name, target / "examples" / name, name):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None
