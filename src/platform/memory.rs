//! The allocator, as a daemon that lives long wants it: what a commit needs for a moment lies between what is kept, so that freed
//! memory would stay with the process, and the more so the more threads there are. And buffers that are used again.

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

/// Buffers that are used again: fresh memory costs a fault a page.
pub struct SpareBuffers {
    buffers: Mutex<Vec<Vec<u8>>>,
    count_max: usize,
    len_max: usize,
}

impl SpareBuffers {
    /// Keeps so many at most, and none that is longer.
    pub const fn new(count_max: usize, len_max: usize) -> Self {
        Self { buffers: Mutex::new(Vec::new()), count_max, len_max }
    }

    /// An empty one.
    pub fn take(&self) -> Vec<u8> {
        lock(&self.buffers).pop().unwrap_or_default()
    }

    pub fn put_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut buffers = lock(&self.buffers);
        if buffers.len() < self.count_max && buffer.capacity() <= self.len_max {
            buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_what_is_kept_is_bounded() {
        let spare = SpareBuffers::new(1, 100);
        let mut buffer = spare.take();
        buffer.extend_from_slice(&[7; 60]);
        let (at, capacity) = (buffer.as_ptr(), buffer.capacity());
        spare.put_back(buffer);
        spare.put_back(Vec::with_capacity(50));
        let buffer = spare.take();
        assert_eq!((buffer.as_ptr(), buffer.capacity(), buffer.len()), (at, capacity, 0));
        assert_eq!(spare.take().capacity(), 0, "one is kept, the other was not");
        spare.put_back(Vec::with_capacity(101));
        assert_eq!(spare.take().capacity(), 0, "it is too long to be kept");
    }
}
