//! What the kernel tells of processes, how threads give way to others, and the files that processes write their logs to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A process as `/proc` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessSeen {
    pub parent: i32,
    /// It has ended, and nobody has asked how.
    pub has_ended: bool,
    /// When it began, as the kernel counts: its number may be another's by now, with another beginning.
    pub began: String,
}

impl ProcessSeen {
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?))
    }

    fn parse(text: &str) -> Self {
        // The name in it may have spaces and parentheses.
        let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default();
        Self {
            parent: field(1).parse().unwrap_or_default(),
            // Its first thread may have ended, and others not.
            has_ended: matches!(field(0), "Z" | "X") && field(17).parse().unwrap_or(0) <= 1,
            began: field(19).to_owned(),
        }
    }
}

/// A process by its number and when it began: numbers are used again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedProcess {
    pub pid: i32,
    pub began: String,
}

impl NamedProcess {
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, began: ProcessSeen::of(pid)?.began })
    }

    /// Whether it is there still, and not another with its number.
    pub fn runs(&self) -> bool {
        ProcessSeen::of(self.pid).is_ok_and(|seen| seen.began == self.began && !seen.has_ended)
    }
}

/// How far those that give way stand back: another thread that is busy gets three times as much of a processor. Much further, and
/// on a host whose processors are never idle they would not come to an end, while they hold what they read.
const NICENESS: i32 = 5;

/// Lets others go first where they want the same processor as this thread and those that it will start. There is no way back.
pub fn give_way() {
    // One that may not be made less important is as important as others.
    let _ = rustix::process::setpriority_process(None, NICENESS);
}

/// Opens a log to write behind what is in it. It is for its owner's eyes alone.
pub fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io(format!("cannot open the log {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_that_gives_way_and_those_it_starts_do() {
        let of_this_thread = || rustix::process::getpriority_process(None).unwrap();
        let before = of_this_thread();
        let (own, started) = std::thread::spawn(move || {
            give_way();
            (of_this_thread(), std::thread::spawn(of_this_thread).join().unwrap())
        })
        .join()
        .unwrap();
        assert_eq!((own, started), (before.max(NICENESS), before.max(NICENESS)));
        assert_eq!(of_this_thread(), before);
    }

    #[test]
    fn names_with_parentheses_are_no_fields() {
        let text = "7 (a) Z (b) c) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2";
        let seen = ProcessSeen::parse(text);
        assert_eq!(seen, ProcessSeen { parent: 3, has_ended: false, began: "987654".to_owned() });
        assert!(ProcessSeen::parse("7 (a) Z 3").has_ended);
        let of_threads = |threads| text.replacen(" S ", " Z ", 1).replacen("20 0 1 0", &format!("20 0 {threads} 0"), 1);
        assert!(ProcessSeen::parse(&of_threads(1)).has_ended && !ProcessSeen::parse(&of_threads(2)).has_ended);
        let own = ProcessSeen::of(std::process::id().cast_signed()).unwrap();
        assert!(own.parent > 0 && !own.has_ended && own.began.parse::<u64>().is_ok());
        let named = NamedProcess::of(std::process::id().cast_signed()).unwrap();
        assert!(named.runs() && !NamedProcess { began: "1".into(), ..named }.runs());
    }
}
