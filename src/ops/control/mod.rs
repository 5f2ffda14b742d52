//! How other processes of this host talk to the daemon that has a repository mounted: a unix socket for its owner and
//! root, one JSON document a line in each direction.
//!
//! A lock beside the socket, held as long as the daemon lives, says whether there is one: a socket file alone may be a
//! dead daemon's.

mod client;
mod lock;
mod protocol;
mod seen;
mod server;

use std::path::{Path, PathBuf};

pub use client::Client;
pub use lock::{DaemonLock, Holder};
pub use protocol::{
    CommitRequest, CommitSummary, DaemonStatus, ForecastRequest, Introduction, LeaseGrant, ObjectName, PrefetchRequest,
    Protected, Request, StoreAgainRequest, Unmounted, decode_error,
};
pub use server::{Listener, Server, Service};

/// The socket's name in a repository's state directory.
const SOCKET: &str = "daemon.sock";

/// The socket of the daemon that keeps its state in this directory.
pub fn socket_path(directory: &Path) -> PathBuf {
    directory.join(SOCKET)
}

/// The sockets of all daemons under a state directory; those of dead ones too.
pub fn sockets(state_directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(state_directory) else { return Vec::new() };
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|entry| socket_path(&entry.path())).filter(|path| path.exists()).collect();
    found.sort();
    found
}

/// The longest path that fits a socket's address.
const ADDRESS_LEN_MAX: usize = 107;

/// Calls `with` with a path that names the same socket and fits an address.
fn with_address<T>(path: &Path, with: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsRawFd;
    if path.as_os_str().len() <= ADDRESS_LEN_MAX {
        return with(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    with(&PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))
}
