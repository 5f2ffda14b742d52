//! The host itself: kernel, processor, memory, limits, clock.

use super::Check;
use crate::ops::machine::{memory_field, processors, vector_unit};
use crate::platform::{clock, kernel};

pub(super) fn check() -> Vec<Check> {
    vec![kernel_found(), processor(), memory(), huge_pages(), open_files(), wall_clock()]
}

/// The first kernel with everything that is used where it is there.
const KERNEL_WANTED: (u32, u32) = (5, 19);

fn kernel_found() -> Check {
    const NAME: &str = "kernel";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let found = format!("Linux {release} on {}", uname.machine().to_string_lossy());
    match kernel::version() {
        Some(version) if version >= KERNEL_WANTED => Check::ok(NAME, found),
        Some(_) => Check::warn(
            NAME,
            format!("{found}: too old to track writes to shared memory by userfaultfd"),
            format!("use Linux {}.{} or newer", KERNEL_WANTED.0, KERNEL_WANTED.1),
        ),
        None => Check::warn(NAME, format!("{found}: its version cannot be told"), "make sure that it is 5.19 or newer"),
    }
}

fn processor() -> Check {
    const NAME: &str = "processor";
    let count = processors();
    let found = |what: &str| format!("{count} processors, hashing with {what}");
    match vector_unit() {
        (what, true) => Check::ok(NAME, found(what)),
        (what, false) => Check::warn(
            NAME,
            format!("{}: a commit spends longer on hashing", found(what)),
            "pass the host's processor features to this VM, if it is one",
        ),
    }
}

const MEMORY_WANTED: u64 = 1 << 30;

fn memory() -> Check {
    const NAME: &str = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let fields = memory_field(&text, "MemTotal").zip(memory_field(&text, "MemAvailable"));
    let Some((total, available)) = fields else {
        return Check::skipped(NAME, "/proc/meminfo does not tell");
    };
    let found = format!("{} MiB of {} MiB are available", available >> 20, total >> 20);
    if available >= MEMORY_WANTED {
        Check::ok(NAME, found)
    } else {
        Check::warn(NAME, found, "free some memory: a VM that is restored here needs all of its own")
    }
}

fn huge_pages() -> Check {
    const NAME: &str = "huge-pages";
    let Ok(text) = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Check::skipped(NAME, "this kernel has no transparent huge pages");
    };
    match text.split(['[', ']']).nth(1) {
        Some("always") => Check::warn(
            NAME,
            "transparent huge pages are always used: each page that a restored VM touches first may take 2 MiB",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(mode) => Check::ok(NAME, format!("transparent huge pages: {mode}")),
        None => Check::skipped(NAME, "the setting cannot be read"),
    }
}

const OPEN_FILES_NEEDED: u64 = 256;
const OPEN_FILES_WANTED: u64 = 1024;

fn open_files() -> Check {
    const NAME: &str = "open-files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let show = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    let found = format!("at most {}, can be raised to {}", show(limit.current), show(limit.maximum));
    let advice = "raise it: `ulimit -n 4096`, or LimitNOFILE= in the service's unit";
    match limit.current {
        Some(current) if current < OPEN_FILES_NEEDED => Check::fail(NAME, found, advice),
        Some(current) if current < OPEN_FILES_WANTED => Check::warn(NAME, found, advice),
        _ => Check::ok(NAME, found),
    }
}

/// 2024 and 2100, in nanoseconds since 1970.
const CLOCK_PLAUSIBLE: std::ops::Range<u64> = 1_704_067_200_000_000_000..4_102_444_800_000_000_000;

fn wall_clock() -> Check {
    const NAME: &str = "clock";
    let now = clock::now_ns();
    let found = format!("{} seconds since 1970", now / 1_000_000_000);
    if CLOCK_PLAUSIBLE.contains(&now) {
        Check::ok(NAME, found)
    } else {
        Check::warn(
            NAME,
            format!("{found}, which cannot be now: epochs get wrong times (their order does not depend on them)"),
            "set the clock, and keep it right with NTP",
        )
    }
}
