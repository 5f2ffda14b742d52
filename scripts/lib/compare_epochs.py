#!/usr/bin/env python3
"""Compares the memory images of successive epochs, page by page.

Usage: compare_epochs.py DIR PARAMETERS

Writes DIR/epoch-N/dirty (a line 'OFFSET LENGTH' in bytes for each run of pages
that differs from epoch N-1) and DIR/manifest.json. PARAMETERS is kept in the
manifest as it is, to tell later whether DIR holds what is asked for.
"""

import hashlib
import json
import mmap
import os
import sys

PAGE = 4096
CHUNK = 1 << 20  # compared whole before its pages are looked at


def open_image(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def count_pages(image, all_seen):
    """Counts zero pages and distinct non-zero ones; adds these to all_seen."""
    seen, zeros = set(), 0
    zero_page, zero_chunk = bytes(PAGE), bytes(CHUNK)
    for start in range(0, len(image), CHUNK):
        chunk = image[start : start + CHUNK]
        if chunk == zero_chunk:
            zeros += CHUNK // PAGE
            continue
        for offset in range(0, len(chunk), PAGE):
            page = chunk[offset : offset + PAGE]
            if page == zero_page:
                zeros += 1
            else:
                seen.add(hashlib.blake2b(page, digest_size=16).digest())
    all_seen |= seen
    return zeros, len(seen)


def changed_runs(before, after):
    """Yields [start, end) of each run of pages that differ."""
    run = None
    for start in range(0, len(after), CHUNK):
        old, new = before[start : start + CHUNK], after[start : start + CHUNK]
        same = old == new
        for offset in range(0, len(new), CHUNK if same else PAGE):
            if same or old[offset : offset + PAGE] == new[offset : offset + PAGE]:
                if run is not None:
                    yield run, start + offset
                run = None
            elif run is None:
                run = start + offset
    if run is not None:
        yield run, len(after)


def main():
    if len(sys.argv) != 3:
        print(__doc__.strip())
        sys.exit(2)
    directory, parameters = sys.argv[1:]
    epochs, all_seen, before = [], set(), None
    while os.path.exists(path := f"{directory}/epoch-{len(epochs) + 1}/memory"):
        image = open_image(path)
        zeros, unique = count_pages(image, all_seen)
        epoch = {"pages": len(image) // PAGE, "zero": zeros, "unique_nonzero": unique}
        if before is not None:
            runs = list(changed_runs(before, image))
            with open(f"{directory}/epoch-{len(epochs) + 1}/dirty", "w") as file:
                file.writelines(f"{start} {end - start}\n" for start, end in runs)
            epoch["changed"] = sum(end - start for start, end in runs) // PAGE
            epoch["changed_runs"] = len(runs)
        epochs.append(epoch)
        before = image
    manifest = {"parameters": parameters, "page_size": PAGE, "unique_nonzero_of_all": len(all_seen), "epochs": epochs}
    with open(f"{directory}/manifest.json.new", "w") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")
    os.rename(f"{directory}/manifest.json.new", f"{directory}/manifest.json")
    for number, epoch in enumerate(epochs, 1):
        print(f"epoch {number}:", ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in epoch.items()))


if __name__ == "__main__":
    main()
