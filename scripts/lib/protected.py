"""A QEMU guest that is protected on one host and may be started on others, for the scripts beside this directory."""

import json
import re
import time
from pathlib import Path

from guest import DISK_MIB, MIB, Failed, Guest, qemu, ticks
from hosts import may_run, words_of

MACHINE = "web1"


class Restored:
    """A guest that a failover started; what of it is known without its process."""

    def __init__(self, console):
        self.path = console
        # The epoch that it was started from is in the console's name.
        self.epoch = int(console.name.rsplit("-", 1)[1])

    def console(self):
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def ticks(self):
        return ticks(self.console())

    def wait_ticks(self, more, seconds=120):
        last = (self.ticks() or [0])[-1] if self.ticks() else None
        deadline = time.monotonic() + seconds
        while True:
            told = self.ticks()
            if told and len([tick for tick in told if last is None or tick > last]) >= more:
                return
            if "guest: failed" in (text := self.console()):
                raise Failed(f"the guest found wrong bytes: {text[-500:]}")
            if time.monotonic() > deadline:
                raise Failed(f"the guest did not go on for {seconds} s: {text[-300:]!r}\n{self.logs()}")
            time.sleep(0.005)

    def logs(self):
        """The ends of what its host's processes told."""
        paths = [*self.path.parent.glob("*/*.log")]
        return "".join(f"{path.name}:\n{path.read_text(errors='replace')[-600:]}\n" for path in paths)

    def kill(self):
        """It ends with its host."""


class Protected:
    def __init__(self, hosts, initramfs, memory, append, interval):
        self.initramfs, self.memory, self.append, self.interval = initramfs, memory, append, interval
        self.count = 0

    def rules(self, work, more=""):
        """The operator's file: how it is started on a host that takes it over, and protected there."""
        console = "{state_dir}/console-{machine}-{epoch}"
        words = qemu(console, self.initramfs, self.memory, self.append, "file={live}/disk0,cache=none")
        start = ["{program}", "restore", "{machine}", "--live", "--detach", "--json", "--qmp", "{state_dir}/{machine}.qmp", "--",
                 *words, "-machine", "q35", "-qmp", "unix:{state_dir}/{machine}.agent,server,nowait"]  # fmt: skip
        protect = ["--qmp", "{state_dir}/{machine}.agent", "--interval", self.interval]
        path = Path(work) / "failover.toml"
        path.write_text(f"{more}[defaults]\nlive = true\nstart = {json.dumps(start)}\nprotect = {json.dumps(protect)}\n")
        return path

    def boot(self, host):
        """The first start of the guest, with its memory and disk in its live."""
        (host.mounted / MACHINE).mkdir()
        live = host.mounted / MACHINE / "live"
        with open(live / "disk0", "xb") as disk:
            disk.truncate(DISK_MIB * MIB)
        ram = f"memory-backend-file,mem-path={live / 'memory'},share=on"
        return Guest(host.state, self.initramfs, self.memory, ram, self.append, disk=f"file={live / 'disk0'},cache=none", agent=self.agent(host))

    def agent(self, host):
        return host.state / f"{MACHINE}.agent"

    def protect(self, host):
        return host.start("protect", "protect", MACHINE, "--qmp", self.agent(host), "--interval", self.interval, "--json")

    @staticmethod
    def agents(host):
        """The agents, but not their guards."""
        words = {pid: words_of(pid) for pid in host.processes()}
        return [pid for pid, said in words.items() if b"protect" in said and b"--guard" not in said and may_run(pid)]

    @staticmethod
    def consoles(host, machine):
        name = re.compile(rf"console-{re.escape(machine)}-\d+")
        return sorted((path for path in host.state.iterdir() if name.fullmatch(path.name)), key=lambda path: path.stat().st_mtime)

    def newest_console(self, host, machine, since=frozenset()):
        found = [path for path in self.consoles(host, machine) if str(path) not in since]
        return found[-1] if found else None

    def restored(self, host, since):
        console = self.newest_console(host, MACHINE, since)
        if not console:
            raise Failed(f"QEMU did not open its console on host {host.name}")
        return Restored(console)
