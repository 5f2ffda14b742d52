//! A thread that lets VMs in, for a server in a process of its own making.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::time::Timespec;

use super::lobby::Lobby;
use super::server::Inner;
use crate::error::{Error, Result};

/// Listens until it is dropped.
pub struct Listening {
    bell: Arc<(OwnedFd, AtomicBool)>,
    thread: Option<JoinHandle<()>>,
}

impl Listening {
    pub(super) fn start(path: &Path, inner: Arc<Inner>) -> Result<Self> {
        let image = inner.image();
        let lobby = Lobby::open(path, image.name(), image.len(), inner.options().on_damage)?;
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Error::io("cannot make an eventfd", error.into()))?;
        let bell = Arc::new((eventfd, AtomicBool::new(false)));
        let own = bell.clone();
        let thread = std::thread::Builder::new()
            .name("uffd socket".into())
            .spawn(move || listen(lobby, &inner, &own))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { bell, thread: Some(thread) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.bell.1.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.bell.0, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(mut lobby: Lobby, inner: &Arc<Inner>, bell: &(OwnedFd, AtomicBool)) {
    let mut id = 0;
    while !bell.1.load(Ordering::SeqCst) {
        for admission in lobby.step() {
            id += 1;
            let peer = admission.peer.pid();
            if let Err(error) = Inner::serve(inner, id, admission) {
                tracing::error!("process {peer} cannot be served: {error}");
            }
        }
        let timeout = lobby.timeout().map(timespec);
        let mut sources = lobby.sources();
        sources.push(PollFd::new(&bell.0, PollFlags::IN));
        // What failed is tried again by the next step.
        let _ = rustix::event::poll(&mut sources, timeout.as_ref());
    }
}

/// A time to wait, rounded up.
pub(super) fn timespec(duration: std::time::Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: i64::from(duration.subsec_nanos().max(1_000_000)) }
}
