//! Starting QEMU from an epoch: the process, its monitor, and the wait for its end.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::child::{Child, Ended, Event, Output, Watch, is_end};
use super::feed::{Feed, Moments};
use super::qemu_command::{CommandLine, Memory};
use super::qemu_state::{LOOKED_AT, RamBlock, ram_block};
use super::qmp::Monitor;
use crate::error::{Error, Result};
use crate::platform::random::id16;
use crate::platform::socket;

/// How long QEMU may take to open its monitor.
const MONITOR_WAIT: Duration = Duration::from_secs(60);

/// How long it may take to load the state.
const STATE_WAIT: Duration = Duration::from_secs(120);

/// What the backend is called where the state does not say.
const BACKEND: &str = "ram";

/// The RAM of a machine whose state lies in a file, if that is told there.
pub fn saved_ram(state: &Path) -> Result<Option<RamBlock>> {
    let failed = |error| Error::io(format!("cannot read the state {}", state.display()), error);
    let source = File::open(state).map_err(failed)?;
    let mut head = vec![0; LOOKED_AT];
    let mut filled = 0;
    while filled < head.len() {
        match source.read_at(&mut head[filled..], filled as u64).map_err(failed)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(ram_block(&head[..filled]))
}

impl Memory {
    /// The memory of a machine that had this RAM.
    pub fn of_state(file: PathBuf, len: u64, state: &Path, ram: Option<RamBlock>, is_shared: bool) -> Result<Self> {
        let name = match ram {
            Some(RamBlock { len: other, .. }) if other != len => {
                return Err(Error::usage(format!(
                    "the state {} is of a machine with {other} bytes of memory, and {} has {len}",
                    state.display(),
                    file.display()
                ))
                .hint("name the streams that belong together, with --memory and --state"));
            }
            Some(ram) => ram.name,
            None => BACKEND.to_owned(),
        };
        Ok(Self { file, len, name, is_shared })
    }
}

/// Where QEMU's monitor listens.
pub struct MonitorPlace {
    path: PathBuf,
    /// Made for this restore, and removed with this value.
    directory: Option<PathBuf>,
}

impl MonitorPlace {
    /// A place that the user chose. It stays when the restore is done.
    pub fn chosen(path: &Path) -> Self {
        Self { path: path.to_owned(), directory: None }
    }

    /// One that nobody else knows. It is made when it is needed.
    pub fn own() -> Self {
        let id: String = id16()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        let directory = std::env::temp_dir().join(format!("epochfs-restore.{id}"));
        Self { path: directory.join("qmp"), directory: Some(directory) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn make(&self) -> Result<()> {
        if let Some(directory) = &self.directory {
            return std::fs::DirBuilder::new()
                .mode(0o700)
                .create(directory)
                .map_err(|error| Error::io(format!("cannot make {}", directory.display()), error));
        }
        // QEMU removes whatever has the name of its monitor.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|file| !file.file_type().is_socket()) {
            return Err(Error::conflict(format!("{} is there, and is no socket", self.path.display()))
                .hint("give --qmp another path, or remove it"));
        }
        // Another QEMU there would be told to load the state.
        match socket::connect(&self.path) {
            Ok(_) => Err(Error::conflict(format!("somebody listens at {} already", self.path.display()))
                .hint("give --qmp another path")),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(&self.path)
                .map_err(|error| Error::io(format!("cannot replace {}", self.path.display()), error)),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for MonitorPlace {
    fn drop(&mut self) {
        if let Some(directory) = &self.directory {
            // One that was never made is as good as removed.
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// A restore that is about to begin.
pub struct Qemu<'a> {
    pub command: &'a CommandLine,
    pub monitor: &'a MonitorPlace,
    pub output: Output,
}

impl Qemu<'_> {
    /// Starts QEMU, loads the state, and lets the machine go on if that is wanted. After an error nothing runs.
    pub fn start(self, watch: &Watch, feed: &Feed) -> Result<Running> {
        self.monitor.make()?;
        watch.check()?;
        let mut child = Child::start(&self.command.words, &self.output)?;
        let mut check = || {
            child.check()?;
            watch.check()
        };
        let mut monitor = Monitor::connect(self.monitor.path(), MONITOR_WAIT, &mut check)?;
        for (name, arguments) in &self.command.commands {
            if *name == "cont" {
                monitor.wait_incoming(STATE_WAIT)?;
                feed.note(|moments, now| moments.loaded = Some(now));
            }
            monitor.run(name, arguments.clone())?;
        }
        if self.command.commands.iter().any(|(name, _)| *name == "cont") {
            feed.note(|moments, now| moments.first_instruction = Some(now));
        } else {
            monitor.wait_incoming(STATE_WAIT)?;
            feed.note(|moments, now| moments.loaded = Some(now));
        }
        drop(monitor);
        // Its last answer may have been on its way when it ended.
        child.check()?;
        Ok(Running { child })
    }
}

/// A QEMU whose machine goes on.
pub struct Running {
    child: Child,
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until QEMU ends, or with `leaves` until no news of the memory will come. Signals that tell this process to
    /// end are QEMU's.
    pub fn wait(
        mut self,
        watch: &Watch,
        feed: &Feed,
        everything: bool,
        leaves: bool,
        news: &mut dyn FnMut(&Moments, bool) -> Result<()>,
    ) -> Result<Option<Ended>> {
        let mut is_told = false;
        loop {
            let is_over = feed.is_over(everything);
            if !is_told {
                news(&feed.moments(), is_over)?;
                is_told = is_over;
            }
            if let Some(status) = self.child.ended()? {
                if !is_told {
                    news(&feed.moments(), true)?;
                }
                return Ok(Some(status.into()));
            }
            if leaves && is_over {
                self.child.leave();
                return Ok(None);
            }
            match watch.next() {
                Some(event) if is_end(event) => self.child.ask_to_end(),
                Some(Event::Signal(_) | Event::Pages) => {}
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_that_somebody_listens_at_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        MonitorPlace::chosen(&path).make().unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(MonitorPlace::chosen(&path).make().unwrap_err().exit_code(), 4);
        drop(listener);
        MonitorPlace::chosen(&path).make().unwrap();
        assert!(!path.exists());
        let own = MonitorPlace::own();
        own.make().unwrap();
        let directory = own.path().parent().unwrap().to_owned();
        assert!(directory.is_dir());
        drop(own);
        assert!(!directory.exists());
    }

    #[test]
    fn a_state_of_another_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("vmstate");
        std::fs::write(&state, b"no state of QEMU").unwrap();
        let memory = |len| Memory::of_state("/memory".into(), len, &state, saved_ram(&state).unwrap(), false);
        assert_eq!(memory(4096).unwrap().name, BACKEND);
        let mut bytes = b"QEVM\0\0\0\x03\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        bytes.extend(8196_u64.to_be_bytes());
        bytes.extend(b"\x02m0");
        bytes.extend(8192_u64.to_be_bytes());
        std::fs::write(&state, bytes).unwrap();
        assert_eq!(memory(8192).unwrap().name, "m0");
        assert!(memory(4096).unwrap_err().to_string().contains("8192 bytes of memory"));
    }
}
