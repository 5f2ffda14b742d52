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
pub use server::{Asker, Listener, Server, Service};

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
