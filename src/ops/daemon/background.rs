//! A daemon in the background: this program once more, detached from the terminal. Its standard output is a pipe to
//! whoever started it, for the one document that says that it is ready, or why not. Its log goes to a file.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::ops::control::decode_error;
use crate::platform::process::open_log;

/// A log that has become so long is put aside when the next daemon starts.
const LOG_LEN_MAX: u64 = 16 << 20;

/// The end of the log that is shown when a daemon died without a word.
const LOG_SHOWN: u64 = 2 << 10;

/// Starts this program with these arguments, and returns the document in which it says that it is ready.
pub fn start(arguments: &[OsString], log: &Path) -> Result<Value> {
    let failed = |error| Error::io("cannot start the daemon", error);
    put_long_log_aside(log);
    let mut file = open_log(log)?;
    let begin = file.seek(SeekFrom::End(0)).map_err(failed)?;
    // The link leads to the program that is running even if its file was replaced.
    let mut child = Command::new("/proc/self/exe")
        .arg0("epochfs")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let mut text = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_end(&mut text).map_err(failed)?;
    }
    if let Ok(document) = serde_json::from_slice::<Value>(&text) {
        return match decode_error(&document) {
            None => Ok(document),
            Some(error) => {
                // It is about to end, and should be gone when its error is told.
                let _ = child.wait();
                Err(error)
            }
        };
    }
    let status = child.wait().map_err(failed)?;
    let mut said = String::new();
    // Only what this daemon wrote.
    let from = begin.max(file.metadata().map_or(0, |metadata| metadata.len()).saturating_sub(LOG_SHOWN));
    let read = file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_string(&mut said));
    let last = match (read, said.trim().lines().last()) {
        (Ok(_), Some(last)) => format!(": {last}"),
        _ => String::new(),
    };
    Err(Error::new(Kind::Io, format!("the daemon ended before it was ready ({status}){last}"))
        .hint(format!("its log is {}", log.display())))
}

/// Keeps one older log.
fn put_long_log_aside(log: &Path) {
    if !std::fs::metadata(log).is_ok_and(|metadata| metadata.len() > LOG_LEN_MAX) {
        return;
    }
    let older = log.with_extension("log.1");
    // A log that stays too long is better than none.
    let _ = std::fs::remove_file(&older);
    let _ = std::fs::hard_link(log, &older).and_then(|()| std::fs::remove_file(log));
}

/// In the daemon: leaves the terminal and the directory that it was started from.
pub fn detach() -> Result<()> {
    // Fails for the leader of a process group, which whoever was started by another program is not.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "the daemon stays in its session");
    }
    std::env::set_current_dir("/").map_err(|error| Error::io("cannot go to /", error))
}

/// In the daemon: lets whoever started it go on.
pub fn let_go() -> Result<()> {
    let failed = |error| Error::io("cannot let go of standard output", error);
    let nowhere = OpenOptions::new().write(true).open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdout(&nowhere).map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_log_is_put_aside_and_a_short_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("daemon.log");
        open_log(&log).unwrap();
        put_long_log_aside(&log);
        assert!(log.exists());
        for _ in 0..2 {
            open_log(&log).unwrap().set_len(LOG_LEN_MAX + 1).unwrap();
            put_long_log_aside(&log);
            assert!(!log.exists());
            assert_eq!(std::fs::metadata(dir.path().join("daemon.log.1")).unwrap().len(), LOG_LEN_MAX + 1);
        }
    }
}
