//! This host as an owner of machines: who it is, and taking machines over.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::Owner;

use super::FileSystem;
use crate::epoch::Ownership;
use crate::error::{Error, Result};
use crate::platform::files::{Files, RealFiles};
use crate::platform::random;

/// What people call this host, where that is not the system's name.
const NAME: &str = "host-name";

/// This host, as the owner of machines of the repository for which it keeps this directory.
pub fn this_host(directory: &Path) -> Result<Owner> {
    host(&RealFiles, directory)
}

pub(super) fn host(files: &dyn Files, directory: &Path) -> Result<Owner> {
    Ok(Owner { host: host_id(files, directory)?, name: host_name(directory), lease_ms: 0 })
}

/// What this host is called.
pub fn host_name(directory: &Path) -> String {
    std::fs::read_to_string(directory.join(NAME)).map_or_else(|_| system_name(), |name| cleaned(&name))
}

/// Has this host called by a name from now on, instead of by the system's.
pub fn name_host(directory: &Path, name: &str) -> Result<()> {
    let path = directory.join(NAME);
    std::fs::write(&path, cleaned(name)).map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
}

/// This host's id, made the first time it is asked for.
fn host_id(files: &dyn Files, state: &Path) -> Result<[u8; 16]> {
    let path = state.join("host-id");
    let failed = |error| Error::io(format!("cannot read or make this host's id {}", path.display()), error);
    let read = || -> std::io::Result<Option<[u8; 16]>> {
        let mut id = [0; 16];
        let count = files.open(&path)?.read_at(0, &mut id)?;
        Ok((count == id.len()).then_some(id))
    };
    match read() {
        Ok(Some(id)) => return Ok(id),
        // A crash may have left an empty one.
        Ok(None) => files.remove_file(&path).map_err(failed)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let id = random::id16();
    std::fs::create_dir_all(state).map_err(failed)?;
    let make = || {
        let file = files.create_new(&path, false)?;
        file.write_at(0, &id)?;
        file.sync()?;
        files.sync_dir(state)
    };
    make().map_err(failed)?;
    Ok(id)
}

fn system_name() -> String {
    cleaned(&rustix::system::uname().nodename().to_string_lossy())
}

fn cleaned(name: &str) -> String {
    name.chars().filter(|letter| !letter.is_control()).take(100).collect()
}

impl FileSystem {
    /// Takes a machine over in which this term is in force: its live is its newest epoch then, and what was kept here of
    /// earlier terms is given up.
    pub fn take_over(&self, machine: &str, term: u64) -> Result<Ownership> {
        let machine: Arc<str> = machine.into();
        if self.settings.read_only {
            return Err(Error::usage("the repository is mounted read-only here").hint("mount it to write to it"));
        }
        let kept = self.lives().remove(&machine);
        kept.map_or(Ok(()), |live| live.forget())?;
        self.live(&machine).map_err(Error::from)?.take_over(term)
    }

    /// This host's ownership of a machine, in a term that began at `since` or later by its clock.
    pub fn owned_since(&self, machine: &str, since: Duration) -> Result<Ownership> {
        let machine: Arc<str> = machine.into();
        self.store.repository().require(&machine)?;
        self.live(&machine).map_err(Error::from)?.owned_since(since)
    }

    /// The machines that this host owns and may write to.
    pub fn owned_machines(&self) -> Vec<Arc<str>> {
        self.all_lives().iter().filter(|live| live.is_owned()).map(|live| live.machine().clone()).collect()
    }
}
