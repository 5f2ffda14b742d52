//! A process in which a machine runs under its host's lease. Two end it when that is over: the process itself, and another
//! one, which does so although the first hangs or is stopped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::epoch::Ownership;
use crate::error::{Error, Result};
use crate::platform::clock::{BootClock, Clock};
use crate::platform::lease::{LeaseClaim, lease_of_host, watch_claim};
use crate::platform::running::Running;
use crate::vmm::agent::{Guard, Guarded, GuardedLease};

/// How long an agent may keep a machine stopped; one of this process never says that it does.
const STOPPED_MAX: Duration = Duration::from_secs(60);

/// For as long as the machine runs.
pub struct Leased {
    _guard: Guard,
    /// Told by this process, too: a guard may be killed.
    _running: Running,
    is_over: Arc<AtomicBool>,
}

impl Leased {
    /// From here on this process is ended when the lease of the host, which keeps its state in a directory, is over. Nothing
    /// where the host has no leases.
    pub fn begin(directory: &Path, ownership: &Ownership) -> Result<Option<Self>> {
        let Some(lease) = lease_of_host(directory, &BootClock)? else { return Ok(None) };
        let claim = LeaseClaim::new(directory, lease.lease, ownership.since);
        let program = std::env::current_exe().map_err(|error| Error::io("cannot find this program", error))?;
        let guarded = GuardedLease {
            claim: claim.clone(),
            machine: ownership.machine.to_string(),
            process: None,
            live: None,
            is_mapped: false,
        };
        let guard = Guard::start(&program, &Guarded::Parent, STOPPED_MAX, Some(&guarded))?;
        let running = Running::hold(directory, &ownership.machine)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let of_thread = is_over.clone();
        std::thread::Builder::new()
            .name("lease-watch".into())
            .spawn(move || {
                let clock: Arc<dyn Clock> = Arc::new(BootClock);
                let watched = watch_claim(claim, &clock, &|| of_thread.load(Ordering::Relaxed), &|| {
                    // No destructor of a guest that must not run is worth waiting for.
                    let _ = kill_process(getpid(), Signal::KILL);
                });
                if let Err(error) = watched {
                    tracing::error!("this process does not watch its host's lease; its guard does: {error}");
                }
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Some(Self { _guard: guard, _running: running, is_over }))
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}
