//! Which pages of a file processes of this host have in their page tables: those that they touched, and the cached
//! neighbours that the kernel maps with them.
//!
//! Reading a process's page tables may wait for a page of its that is being read: never do it where requests are answered.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use epochfs_format::PAGE_SIZE;

/// So many processes are looked at; the machines restored from one epoch are alike.
const PROCESSES_MAX: usize = 4;

/// Entries that are read at a time.
const ENTRIES: usize = 16 << 10;

/// Present, or swapped out.
const IN_USE: u8 = 0xc0;

/// A part of a file that is mapped: its pages, and the number of the first one in the process's memory.
struct Mapping {
    pages: Range<u64>,
    at: u64,
}

/// Calls `each` with runs of pages that are in use, by any process that may be looked at. Returns whether there was one.
pub fn used_pages(inode: u64, each: &mut dyn FnMut(Range<u64>)) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    let mut found = 0;
    for entry in processes.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else { continue };
        // A process may end, or belong to somebody else.
        let mappings = mappings(pid, inode).unwrap_or_default();
        if mappings.is_empty() {
            continue;
        }
        let Ok(tables) = File::open(format!("/proc/{pid}/pagemap")) else { continue };
        if mappings.iter().all(|mapping| look(&tables, mapping, each).is_ok()) {
            found += 1;
            if found >= PROCESSES_MAX {
                break;
            }
        }
    }
    found > 0
}

fn mappings(pid: &str, inode: u64) -> std::io::Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let size = PAGE_SIZE as u64;
    let parse = |line: &str| {
        // 7f0000000000-7f0040000000 rw-p 00000000 00:2d 4711    /mnt/epochs/web1/epochs/3/memory
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        if words.nth(1)?.parse() != Ok(inode) {
            return None;
        }
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (number(start)? / size, number(end)? / size, number(offset)? / size);
        Some(Mapping { pages: offset..offset + end.checked_sub(start)?, at: start })
    };
    Ok(text.lines().filter_map(parse).collect())
}

fn look(tables: &File, mapping: &Mapping, each: &mut dyn FnMut(Range<u64>)) -> std::io::Result<()> {
    let mut entries = vec![0; ENTRIES * 8];
    let mut run: Option<Range<u64>> = None;
    let mut page = mapping.pages.start;
    while page < mapping.pages.end {
        let count = (mapping.pages.end - page).min(ENTRIES as u64) as usize;
        let at = mapping.at + (page - mapping.pages.start);
        tables.read_exact_at(&mut entries[..count * 8], at * 8)?;
        for (number, entry) in (page..).zip(entries[..count * 8].chunks_exact(8)) {
            if entry[7] & IN_USE == 0 {
                continue;
            }
            match &mut run {
                Some(run) if run.end == number => run.end += 1,
                _ => {
                    if let Some(run) = run.replace(number..number + 1) {
                        each(run);
                    }
                }
            }
        }
        page += count as u64;
    }
    if let Some(run) = run {
        each(run);
    }
    Ok(())
}
