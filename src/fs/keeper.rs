//! Tells journals, from time to time, what changed: so that a crash loses little that nobody synced, and the spool can
//! use its slots again.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::FileSystem;
use crate::error::{Error, Result};
use crate::platform::lock::lock;

const INTERVAL: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Call {
    #[default]
    Nothing,
    Soon,
    AtOnce,
    Stop,
}

#[derive(Default)]
pub struct Keeper {
    call: Mutex<Call>,
    called: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    fn lock(&self) -> MutexGuard<'_, Call> {
        lock(&self.call)
    }

    /// Something changed: it is to be told within the interval, or at once.
    pub fn wake(&self, at_once: bool) {
        let mut call = self.lock();
        *call = match (*call, at_once) {
            (Call::Stop, _) => Call::Stop,
            (_, true) | (Call::AtOnce, _) => Call::AtOnce,
            _ => Call::Soon,
        };
        self.called.notify_all();
    }

    pub fn start(self: &Arc<Self>, file_system: &Arc<FileSystem>) -> Result<()> {
        let (keeper, file_system) = (self.clone(), Arc::downgrade(file_system));
        let thread = std::thread::Builder::new()
            .name("keeper".into())
            .spawn(move || keeper.run(&file_system))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        *lock(&self.thread) = Some(thread);
        Ok(())
    }

    pub fn stop(&self) {
        *self.lock() = Call::Stop;
        self.called.notify_all();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// Waits for a call, and a while longer for others. Returns whether to go on.
    fn wait(&self) -> bool {
        let mut call = self.lock();
        while *call == Call::Nothing {
            call = self.called.wait(call).unwrap_or_else(PoisonError::into_inner);
        }
        if *call == Call::Soon {
            let until_urgent = |call: &mut Call| *call == Call::Soon;
            call =
                self.called.wait_timeout_while(call, INTERVAL, until_urgent).unwrap_or_else(PoisonError::into_inner).0;
        }
        if *call == Call::Stop {
            return false;
        }
        *call = Call::Nothing;
        true
    }

    fn run(&self, file_system: &Weak<FileSystem>) {
        while self.wait() {
            let Some(file_system) = file_system.upgrade() else { return };
            let mut failed = false;
            for live in file_system.all_lives() {
                if live.wants_sync()
                    && let Err(error) = live.sync()
                {
                    tracing::warn!(machine = %live.machine(), "changes are not durable yet: {error}");
                    failed = true;
                }
            }
            if failed {
                // Perhaps there is room again by then.
                self.wake(false);
            }
        }
    }
}
