//! Whether the mount of a daemon is the one that is seen here.

use std::path::Path;

use super::Introduction;
use crate::error::{Error, Result};
use crate::ops::mounts::mount_at;

impl Introduction {
    /// Fails unless the files at the mountpoint are those that the daemon serves.
    pub fn check_seen(&self) -> Result<()> {
        let Self { repository, mountpoint, pid, state, .. } = self;
        if state != "mounted" {
            return Err(Error::conflict(format!(
                "{repository} is {state} at {mountpoint}: process {pid} only waits for its end"
            ))
            .hint("`epochfs status` tells when it has ended; mount the repository again then"));
        }
        match mount_at(Path::new(mountpoint))? {
            Some(mount) if mount.is_ours() => Ok(()),
            _ => Err(Error::not_found(format!(
                "process {pid} has {repository} mounted at {mountpoint}, which is not seen here"
            ))
            .hint("run this in the mount namespace of the daemon, for example outside of the container")),
        }
    }
}
