//! Written-back pages that found the disk full: they wait for room, since nobody would be told of their loss.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::FileSystem;
use crate::epoch::live::{Answer, Refusal};
use crate::error::{Error, Result};
use crate::platform::lock::lock;

/// How long to wait before trying again.
const PAUSE: Duration = Duration::from_millis(200);

/// A write that waits. The kernel bounds how many there are.
pub struct Parked {
    pub handle: u64,
    pub offset: u64,
    pub data: Vec<u8>,
    /// Tells the kernel what became of it.
    pub answer: Box<dyn FnOnce(Answer<()>) + Send>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Vec<Parked>>,
    arrived: Condvar,
    closed: AtomicBool,
}

pub struct ParkingLot {
    shared: Arc<Shared>,
    file_system: Arc<FileSystem>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Parked>> {
        lock(&self.waiting)
    }

    fn run(&self, file_system: &FileSystem) {
        loop {
            let mut waiting = self.lock();
            while waiting.is_empty() && !self.closed.load(Ordering::Acquire) {
                waiting = self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let tried = std::mem::take(&mut *waiting);
            drop(waiting);
            let closed = self.closed.load(Ordering::Acquire);
            if closed && tried.is_empty() {
                return;
            }
            let mut full = false;
            for parked in tried {
                match file_system.write_back(parked.handle, parked.offset, &parked.data) {
                    Err(Refusal::NoSpace) if !closed => {
                        self.lock().push(parked);
                        full = true;
                    }
                    answer => {
                        file_system.count_parked(-(parked.data.len() as i64));
                        (parked.answer)(answer);
                    }
                }
            }
            if full {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

impl ParkingLot {
    pub fn start(file_system: Arc<FileSystem>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (lot, served) = (shared.clone(), file_system.clone());
        std::thread::Builder::new()
            .name("parked writes".into())
            .spawn(move || lot.run(&served))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { shared, file_system })
    }

    pub fn park(&self, parked: Parked) {
        tracing::warn!(offset = parked.offset, "written-back pages wait for room on the disk of the spool");
        self.file_system.count_parked(parked.data.len() as i64);
        self.shared.lock().push(parked);
        self.shared.arrived.notify_all();
    }

    /// Nothing waits any longer.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.arrived.notify_all();
    }
}

impl Drop for ParkingLot {
    fn drop(&mut self) {
        self.close();
    }
}
