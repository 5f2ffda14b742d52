//! Whether a guest is alive, not only its monitor: a file that it has changed, or an agent in it that answers.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::socket::connect_now;

/// How long an agent in the guest may take to answer.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// What is asked: any agent that answers a line with a line will do, QEMU's guest agent among them.
const QUESTION: &[u8] = b"{\"execute\":\"guest-ping\"}\n";

/// The signs of life of one guest.
pub struct Heartbeat {
    path: PathBuf,
    limit: Duration,
    /// The length and the time of the file's last change, as they were seen.
    seen: Option<(u64, i64, i64)>,
    /// When a sign was seen last, and how old it was then.
    since: Stopwatch,
    was: Duration,
}

impl Heartbeat {
    /// A file, such as the log of the guest's serial port, that is changed at least as often as `limit` says; or the socket of an
    /// agent in the guest that answers `guest-ping`.
    pub fn new(path: &Path, limit: Duration) -> Self {
        Self { path: path.to_owned(), limit, seen: None, since: Stopwatch::start(), was: Duration::ZERO }
    }

    /// Looks now; how long ago the last sign was seen, and what is wrong if that is too long.
    pub fn look(&mut self) -> (Duration, Option<String>) {
        let looked = self.has_beaten();
        if let Ok(Some(was)) = looked {
            // It came since the last look, whatever its time says.
            self.was = was.min(self.since.elapsed());
            self.since = Stopwatch::start();
        }
        let age = self.was + self.since.elapsed();
        let why = (age > self.limit).then(|| match looked {
            Err(error) => format!("the guest gives no sign of life: {error}"),
            Ok(_) => {
                format!("the guest gives no sign of life at {} for {:.1} s", self.path.display(), age.as_secs_f64())
            }
        });
        (age, why)
    }

    /// How old a new sign is.
    fn has_beaten(&mut self) -> Result<Option<Duration>> {
        let failed = |error| Error::io(format!("cannot look at {}", self.path.display()), error);
        let file = std::fs::metadata(&self.path).map_err(failed)?;
        if file.file_type().is_socket() {
            return answers(&self.path).map(|answers| answers.then_some(Duration::ZERO)).map_err(failed);
        }
        let now = Some((file.len(), file.mtime(), file.mtime_nsec()));
        Ok(match std::mem::replace(&mut self.seen, now) {
            // What it was before this looked first says nothing: the sign may come yet.
            None => Some(Duration::ZERO),
            Some(before) if Some(before) == now => None,
            Some(_) => Some(file.modified().ok().and_then(|at| at.elapsed().ok()).unwrap_or_default()),
        })
    }
}

fn answers(path: &Path) -> std::io::Result<bool> {
    let mut socket = connect_now(path)?;
    socket.set_read_timeout(Some(ANSWER_WAIT))?;
    socket.set_write_timeout(Some(ANSWER_WAIT))?;
    socket.write_all(QUESTION)?;
    let mut answer = [0; 256];
    Ok(socket.read(&mut answer)? > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    fn is_missed(heartbeat: &mut Heartbeat) -> bool {
        std::thread::sleep(LIMIT * 2);
        heartbeat.look().1.is_some()
    }

    #[test]
    fn a_file_beats_while_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut heartbeat = Heartbeat::new(&path, LIMIT);
        assert_eq!(heartbeat.look().1, None, "it may come yet");
        assert!(is_missed(&mut heartbeat));
        for text in ["1", "22"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(heartbeat.look().1, None);
            assert!(is_missed(&mut heartbeat));
        }
    }

    #[test]
    fn a_sign_that_came_long_before_it_was_looked_for_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        std::fs::write(&path, "1").unwrap();
        let mut heartbeat = Heartbeat::new(&path, LIMIT);
        assert_eq!(heartbeat.look().1, None);
        std::fs::write(&path, "22").unwrap();
        assert!(is_missed(&mut heartbeat), "it was there, and has stood still for longer than it may");
    }

    #[test]
    fn an_agent_that_has_no_room_for_another_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listening = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listening, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listening, 0).unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let since = Stopwatch::start();
        assert!(is_missed(&mut Heartbeat::new(&path, LIMIT)) && since.elapsed() < Duration::from_secs(5));
        drop(waiting);
    }

    #[test]
    fn an_agent_beats_while_it_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&socket).read_line(&mut line).unwrap();
            socket.write_all(b"{\"return\": {}}\n").unwrap();
            // From here on it takes connections and says nothing.
            (line, listener)
        });
        let mut heartbeat = Heartbeat::new(&path, LIMIT);
        assert_eq!(heartbeat.look().1, None);
        let (line, _listener) = thread.join().unwrap();
        assert!(line.contains("guest-ping"));
        assert!(is_missed(&mut heartbeat));
    }
}
