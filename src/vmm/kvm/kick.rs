//! Getting a processor out of the guest, wherever its thread is.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use signal_hook::consts::SIGUSR1;
use vmm_sys_util::signal::Killable;

use crate::error::{Error, Result};

/// The byte by which KVM is told to leave the guest at once, or not to enter it.
#[derive(Clone, Copy)]
pub struct ImmediateExit(*mut u8);

// SAFETY: the byte is only used atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Of a processor that lives longer than this: it is dropped by the one who holds both.
    pub fn of(processor: &mut VcpuFd) -> Self {
        Self(&raw mut processor.get_kvm_run().immediate_exit)
    }

    pub fn set(&self, is_wanted: bool) {
        // SAFETY: the byte lies in memory that the kernel shares as long as the processor lives, and KVM reads it once each
        // time it enters the guest.
        unsafe { AtomicU8::from_ptr(self.0) }.store(u8::from(is_wanted), Ordering::SeqCst);
    }
}

/// Lets the signal that gets threads out of KVM do nothing else.
pub fn prepare() -> Result<()> {
    static PREPARED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let prepared = PREPARED.get_or_init(|| {
        let flag = signal_hook::flag::register(SIGUSR1, Arc::new(AtomicBool::new(false)));
        flag.map(drop).map_err(|error| error.to_string())
    });
    prepared.clone().map_err(|error| Error::usage(format!("SIGUSR1 cannot be handled: {error}")))
}

/// Interrupts what a thread waits for. It is told by its immediate exit first: then it makes no difference whether the
/// signal comes before it enters the guest, or after.
pub fn kick<T>(thread: &JoinHandle<T>) -> Result<()> {
    thread.kill(SIGUSR1).map_err(super::kvm_error("cannot signal a processor"))
}
