//! Which process a machine's files on the mount were last complete for. A monitor that writes only what changed may do so if,
//! and only if, what it did not write is there already: it wrote that itself, or was started from it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::platform::process::NamedProcess;
use crate::platform::socket;

/// A note of it, in a file; or of another thing that is so for one process.
#[derive(Clone, Debug)]
pub struct Base {
    file: PathBuf,
}

impl Base {
    /// The note of a machine, in the directory where this host keeps such notes.
    pub fn of(directory: &Path, machine: &str) -> Self {
        Self { file: directory.join(format!("complete-for-{}", epochfs_format::encode_component(machine))) }
    }

    /// A note of the machine whose process an agent stopped, or set up to be captured, and has not yet let go on.
    pub fn of_stopped(directory: &Path, machine: &str) -> Self {
        Self::at(directory.join(format!("stopped-{}", epochfs_format::encode_component(machine))))
    }

    /// The note in this file.
    pub fn at(file: PathBuf) -> Self {
        Self { file }
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether it was noted of this process.
    pub fn is_of_process(&self, process: &NamedProcess) -> bool {
        let noted = std::fs::read_to_string(&self.file).ok();
        noted.is_some_and(|noted| text_of(process).is_ok_and(|text| noted.starts_with(&text)))
    }

    /// Notes a process; and what the migration is known by that saved its state, once it has.
    pub fn note_process(&self, process: &NamedProcess, saved: Option<&str>) -> Result<()> {
        let text = text_of(process)? + saved.unwrap_or_default();
        std::fs::write(&self.file, text)
            .map_err(|error| Error::io(format!("cannot write {}", self.file.display()), error))
    }

    pub fn saved(&self) -> Option<String> {
        let noted = std::fs::read_to_string(&self.file).ok()?;
        noted.split_once('\n').filter(|(_, saved)| !saved.is_empty()).map(|(_, saved)| saved.to_owned())
    }

    /// Another note has another one: nothing where there is none.
    pub fn stamp(&self) -> Option<(u64, std::time::SystemTime)> {
        let metadata = std::fs::metadata(&self.file).ok()?;
        Some((std::os::unix::fs::MetadataExt::ino(&metadata), metadata.modified().ok()?))
    }

    /// Whether the files are complete for the process behind this socket.
    pub fn is_of(&self, socket: &Path) -> bool {
        let noted = std::fs::read_to_string(&self.file).ok();
        noted.is_some() && noted == process_behind(socket).ok()
    }

    /// From now on they are.
    pub fn note(&self, socket: &Path) -> Result<()> {
        std::fs::write(&self.file, process_behind(socket)?)
            .map_err(|error| Error::io(format!("cannot write {}", self.file.display()), error))
    }

    /// From now on they are complete for nobody.
    pub fn forget(&self) -> Result<()> {
        match std::fs::remove_file(&self.file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", self.file.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// The process that listens at a socket, and when it began: numbers are used again, also after the host was started anew.
fn process_behind(socket: &Path) -> Result<String> {
    let failed = |error| Error::io(format!("cannot tell which process is behind {}", socket.display()), error);
    let stream = socket::connect(socket).map_err(failed)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| failed(error.into()))?;
    text_of(&super::guard::name_of(peer.pid.as_raw_nonzero().get())?)
}

fn text_of(process: &NamedProcess) -> Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| Error::io("cannot tell since when this host runs", error))?;
    Ok(format!("{} {} {}\n", process.pid, process.began, boot.trim()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn it_is_of_the_process_that_was_noted_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let _listener = UnixListener::bind(&socket).unwrap();
        let base = Base::of(dir.path(), "web/1");
        assert!(!base.is_of(&socket));
        base.note(&socket).unwrap();
        assert!(base.is_of(&socket));
        std::fs::write(&base.file, process_behind(&socket).unwrap().replace(' ', " 1")).unwrap();
        assert!(!base.is_of(&socket), "another process with that number");
        base.note(&socket).unwrap();
        base.forget().unwrap();
        base.forget().unwrap();
        assert!(!base.is_of(&socket) && !base.is_of(&dir.path().join("nobody")));
    }
}
