"""Hosts for the scripts beside this directory: each a mount of one repository with a state directory of its own, and with all the
processes that belong to it, which can be killed, stopped or cut off from the repository as those of a real host would be."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from benches import Failed

PF_EXITING = 4
SIGKILL_BIT = 1 << (signal.SIGKILL - 1)


def wait(what, until, seconds=30, pause=0.005):
    """Waits until something is so, and gives what it is."""
    deadline = time.monotonic() + seconds
    while not (found := until()):
        if time.monotonic() > deadline:
            raise Failed(f"{what} did not come about within {seconds} s")
        time.sleep(pause)
    return found


def words_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def may_run(pid):
    """Whether a process has a thread that may still do something. One that was killed, or stopped, and waits in the kernel for a
    daemon that is stopped never comes back from there, or not before it is let go on."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False
    found = False
    for thread in threads:
        try:
            fields = (thread / "stat").read_text().rsplit(") ", 1)[1].split()
            status = (thread / "status").read_text()
        except (OSError, IndexError):
            continue
        pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
        is_killed = any(set & SIGKILL_BIT for set in pending)
        if fields[0] in "Tt":
            return False
        found |= fields[0] not in "ZX" and not int(fields[6]) & PF_EXITING and not is_killed
    return found


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


class Host:
    """A host that is mounted with a lease. Whoever makes one ends it."""

    def __init__(self, program, work, name, lease):
        self.program, self.name, self.work, self.lease = program, name, work, lease
        self.state, self.mounted, self.weather = work / name / "state", work / name / "mount", work / name / "weather"
        self.mounted.mkdir(parents=True)
        self.weather.write_text("")
        self.environment = {**os.environ, "EPOCHFS_STORE_WEATHER": str(self.weather)}
        self.started = []
        self.mount()

    def mount(self):
        words = ["mount", self.mounted, "--background", "--lease", self.lease, "--host-name", self.name]
        self.daemon = self.json(*words)["pid"]

    def words(self, *words):
        repository = ["--repo", self.work / "repository", "--state-dir", self.state]
        return [str(word) for word in [self.program, *repository, *words]]

    def json(self, *words):
        done = subprocess.run(self.words(*words, "--json"), capture_output=True, text=True, env=self.environment)
        if done.returncode:
            named = " ".join(str(word) for word in words[:2])
            raise Failed(f"epochfs {named} on host {self.name}: {done.stderr.strip()[-1500:]} {done.stdout[-500:]}")
        return json.loads(done.stdout)

    def start(self, name, *words):
        """Starts something that goes on beside this."""
        log = open(self.work / self.name / f"{name}.log", "ab")
        output = open(self.work / self.name / f"{name}.json", "wb")
        child = subprocess.Popen(self.words(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=log, env=self.environment)
        self.started.append(child)
        return child

    def serve(self, rules):
        """Has it take over what falls silent."""
        return self.start("serve", "failover", "serve", "--auto", "--config", rules, "--json")

    def local(self):
        """Where it keeps what belongs to the repository."""
        return next(path for path in self.state.iterdir() if (path / "daemon.sock").exists() or (path / "lease").exists())

    def processes(self):
        """All processes of this host that may do something: daemon, agents, guards, wardens and machines."""
        marks = (str(self.state).encode(), str(self.mounted).encode())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                line = b"\0".join(words_of(entry.name))
                # A guard is told the machine's lease file, which is in the state directory.
                if any(mark in line for mark in marks):
                    found.append(int(entry.name))
        return found

    def guests(self):
        """The processes in which machines run: guests of `epochfs run`, and QEMUs."""
        found = []
        for pid in self.processes():
            words = words_of(pid)
            is_qemu = words and b"qemu-system" in words[0]
            if is_qemu or (b"run" in words and b"--detached" in words):
                found.append(pid)
        return found

    def kill(self):
        """Everything of it at once, as a host dies."""
        send(self.processes(), signal.SIGKILL)
        self.reap()
        wait(f"the end of host {self.name}", lambda: not any(may_run(pid) for pid in self.processes()))
        subprocess.run(["umount", "-l", str(self.mounted)], capture_output=True)

    def reap(self):
        for child in self.started:
            if child.poll() is not None:
                child.wait()

    def end_guests(self):
        deadline = time.monotonic() + 10
        while (guests := self.guests()) and time.monotonic() < deadline:
            send(guests, signal.SIGKILL)
            time.sleep(0.02)

    def end(self):
        """Ends all of it, in order where that is still possible."""
        self.weather.write_text("")
        send(self.processes(), signal.SIGCONT)
        for child in self.started:
            child.terminate()
        self.end_guests()
        for child in self.started:
            child.wait()
        subprocess.run(self.words("umount", "--lazy", self.mounted), capture_output=True)
        self.kill()


class Watcher:
    """Looks all the time on which hosts a machine runs. Two in several looks that follow each other are noticed: who looks at one
    process after the other may see an end late."""

    LOOKS = 3
    PAUSE = 0.01

    def __init__(self, hosts):
        self.hosts, self.twice, self.looks = hosts, [], 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def watch(self):
        in_a_row, since = 0, time.monotonic()
        while not self.stop.wait(self.PAUSE):
            running = self.running()
            self.looks += 1
            in_a_row = in_a_row + 1 if len(running) > 1 else 0
            if in_a_row == self.LOOKS:
                self.twice.append(f"after {time.monotonic() - since:.2f} s the machine runs on {' and '.join(sorted(running))}")

    def running(self):
        found = set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or not self.is_machine(entry):
                continue
            line = b"\0".join(words_of(entry.name))
            # A copy for practice is another machine.
            if b"/drill-" in line or not may_run(entry.name):
                continue
            found |= {host.name for host in self.hosts if str(host.mounted).encode() in line}
        return found

    @staticmethod
    def is_machine(entry):
        try:
            return (entry / "comm").read_text().startswith("qemu-system")
        except OSError:
            return False
