#!/usr/bin/env python3
"""A small QMP client: runs commands on a QEMU monitor socket, in order.

Usage: qmp.py SOCKET COMMAND...

A command is a name, optionally followed by its arguments as JSON. 'wait-migrated'
waits for a migration to end, 'wait-incoming' for the state of another guest to be
loaded; both fail when that failed.

Example: qmp.py vm.sock stop 'migrate {"uri": "file:vmstate"}' wait-migrated cont
"""

import json
import socket
import sys
import time


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Monitor:
    def __init__(self, path):
        self.socket = self.connect(str(path))
        self.socket.settimeout(60)
        self.lines = self.socket.makefile()
        self.lines.readline()  # the greeting
        self.run("qmp_capabilities")

    @staticmethod
    def connect(path):
        deadline = time.monotonic() + 10
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
                return connection
            except ConnectionRefusedError:
                # The socket is there a moment before QEMU listens on it.
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def run(self, name, **arguments):
        request = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            self.socket.sendall(json.dumps(request).encode())
            for line in self.lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise QmpError(f"{name}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
                # Anything else is an event.
        except OSError as error:
            raise QmpError(f"{name}: {error}") from error
        raise QmpError(f"{name}: QEMU closed the connection")

    def wait_migrated(self):
        while (answer := self.run("query-migrate")).get("status") != "completed":
            if answer.get("status") in ("failed", "cancelled"):
                raise QmpError(f"migration {answer['status']}: {answer.get('error-desc', 'no reason given')}")
            time.sleep(0.001)

    def wait_incoming(self):
        while self.run("query-status")["status"] == "inmigrate":
            if self.run("query-migrate").get("status") == "failed":
                raise QmpError("the state could not be loaded")
            time.sleep(0.001)


def main():
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if "-h" in sys.argv or "--help" in sys.argv else 2)
    monitor = Monitor(sys.argv[1])
    for command in sys.argv[2:]:
        name, _, arguments = command.partition(" ")
        if name == "wait-migrated":
            monitor.wait_migrated()
        elif name == "wait-incoming":
            monitor.wait_incoming()
        else:
            monitor.run(name, **(json.loads(arguments) if arguments else {}))


if __name__ == "__main__":
    try:
        main()
    except (QmpError, OSError) as error:
        sys.exit(f"qmp: {error}")
