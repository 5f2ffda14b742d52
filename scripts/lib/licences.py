#!/usr/bin/env python3
"""Fails if a dependency's licence is not one of those that Apache-2.0 software may be linked with."""

import json
import re
import subprocess
import sys

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    # A list of certificate authorities, which only other systems than Linux take from a crate.
    "CDLA-Permissive-2.0",
    "ISC", "MIT", "MIT-0", "Unicode-3.0", "Unlicense", "Zlib",
}


def allowed(expression):
    """Whether an SPDX expression can be met: one side of each OR, both sides of each AND."""
    expression = expression.replace("/", " OR ").replace("(", " ( ").replace(")", " ) ")
    expression = re.sub(r"\(([^()]*)\)", lambda inner: "MIT" if allowed(inner.group(1)) else "NONE", expression)
    sides = [side.strip() for side in expression.split(" OR ")]
    return any(all(part.strip() in ALLOWED for part in side.split(" AND ")) for side in sides)


def main():
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    refused = [p for p in packages if not allowed(p.get("license") or "none given")]
    for package in refused:
        print(f"{package['name']} {package['version']}: {package.get('license')}", file=sys.stderr)
    print(f"{len(packages)} packages, {len(refused)} with a licence that is not allowed")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
