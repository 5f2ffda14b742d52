#!/usr/bin/env python3
"""A small QMP client: runs commands on a QEMU monitor socket, in order.

Usage: qmp.py SOCKET COMMAND...

A command is a name, optionally followed by its arguments as JSON. 'wait-migrated'
waits for a migration to end and fails when it failed.

Example: qmp.py vm.sock stop 'migrate {"uri": "file:vmstate"}' wait-migrated cont
"""

import json
import socket
import sys
import time


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.lines = self.socket.makefile()
        self.lines.readline()  # the greeting
        self.run("qmp_capabilities")

    def run(self, name, arguments=None):
        request = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        self.socket.sendall(json.dumps(request).encode())
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                sys.exit(f"qmp: {name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            # Anything else is an event.
        sys.exit(f"qmp: {name}: QEMU closed the connection")

    def wait_migrated(self):
        while (answer := self.run("query-migrate")).get("status") != "completed":
            if answer.get("status") in ("failed", "cancelled"):
                sys.exit(f"qmp: migration {answer['status']}: {answer.get('error-desc', 'no reason given')}")
            time.sleep(0.002)


def main():
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if "-h" in sys.argv or "--help" in sys.argv else 2)
    monitor = Monitor(sys.argv[1])
    for command in sys.argv[2:]:
        name, _, arguments = command.partition(" ")
        if name == "wait-migrated":
            monitor.wait_migrated()
        else:
            monitor.run(name, json.loads(arguments) if arguments else None)


if __name__ == "__main__":
    main()
