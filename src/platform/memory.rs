//! The allocator, as a daemon that lives long wants it: what a commit needs for a moment lies between what is kept, so that freed
//! memory would stay with the process, and the more so the more threads there are.

use std::sync::Mutex;
use std::time::Duration;

use super::clock::Stopwatch;
use super::lock::lock;

/// Freed memory is not given back more often: it holds up who allocates meanwhile.
const GIVE_BACK_INTERVAL: Duration = Duration::from_secs(1);

/// Has threads share their heaps, of which the C library would make eight for each processor. Comes before there are threads.
pub fn share_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let heaps = i32::try_from(processors.clamp(2, 8)).unwrap_or(2);
        // SAFETY: it sets a number in the allocator, which takes its own lock for that.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, heaps) };
    }
}

/// Something that took much memory is over: what is free goes back to the system, from time to time.
pub fn give_back() {
    static LAST: Mutex<Option<Stopwatch>> = Mutex::new(None);
    let mut last = lock(&LAST);
    if last.as_ref().is_some_and(|last| last.elapsed() < GIVE_BACK_INTERVAL) {
        return;
    }
    *last = Some(Stopwatch::start());
    drop(last);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let since = Stopwatch::start();
        // SAFETY: it gives back pages that hold nothing allocated, under the allocator's own locks.
        unsafe { libc::malloc_trim(0) };
        tracing::debug!(elapsed = ?since.elapsed(), "free memory is given back");
    }
}
