//! A client of the daemon.

use std::io::{BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::protocol::{CommitRequest, CommitSummary, DaemonStatus, ForecastRequest, Introduction, StoreAgainRequest};
use super::protocol::{LeaseGrant, PrefetchRequest, Request, Unmounted};
use super::protocol::{decode_answer, decode_news, read_line};
use crate::error::{Error, Kind, Result};
use crate::ha::ProtectionStatus;
use crate::platform::clock::Stopwatch;
use crate::platform::socket::connect;
use crate::restore::{Foreseen, PrefetchStatus};
use crate::vmm::Daemon;

/// How long a daemon may take to say who and how it is.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// A connection to a daemon.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon behind a socket; `None` when none runs.
    pub fn connect(socket: &Path) -> Result<Option<Self>> {
        match connect(socket) {
            Ok(stream) => Ok(Some(Self { stream: BufReader::new(stream) })),
            // A socket file without a listener is a dead daemon's.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err(Error::io(format!("cannot connect to the daemon behind {}", socket.display()), error)
                    .hint("run this as the user who mounted the repository, or as root"))
            }
            Err(error) => Err(Error::io(format!("cannot connect to the daemon behind {}", socket.display()), error)),
        }
    }

    /// Asks the daemon behind a socket; `None` when none runs, or one that ended just now.
    pub fn ask<T>(socket: &Path, question: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        let Some(mut client) = Self::connect(socket)? else { return Ok(None) };
        match question(&mut client) {
            Err(error) if error.kind() == Kind::Io && matches!(Self::connect(socket), Ok(None)) => {
                tracing::debug!(%error, "the daemon ended meanwhile");
                Ok(None)
            }
            answer => answer.map(Some),
        }
    }

    pub fn ping(&mut self) -> Result<Introduction> {
        self.call_briefly(&Request::Ping)
    }

    pub fn status(&mut self) -> Result<DaemonStatus> {
        self.call_briefly(&Request::Status)
    }

    /// Commits a machine's live, and returns when the epoch is durable. `frozen` is called before, as soon as what is written
    /// belongs to the next epoch; it says whether the machine stood still until then, where that is to be confirmed.
    pub fn commit(
        &mut self,
        mut request: CommitRequest,
        frozen: &mut dyn FnMut(Duration) -> bool,
    ) -> Result<CommitSummary> {
        let (machine, confirms) = (request.machine.clone(), request.confirms);
        request.tells_frozen = true;
        let mut heed = |news: Value| {
            let ms = news["frozen_ms"].as_f64()?;
            let did = frozen(Duration::from_secs_f64(ms.max(0.0) / 1000.0));
            confirms.then_some(Request::StoodStill { did })
        };
        self.ask_for(&Request::Commit(request), &mut heed).map_err(|error| match error.next_step() {
            None if error.kind() == Kind::Io => {
                error.hint(format!("`epochfs log {machine}` tells whether the epoch is there"))
            }
            _ => error,
        })
    }

    /// Commits a machine's newest epoch once more, with what lies in some objects stored again.
    pub fn store_again(&mut self, request: StoreAgainRequest) -> Result<CommitSummary> {
        self.call(&Request::StoreAgain(request))
    }

    /// Has what is kept of a machine given up that was removed.
    pub fn forget(&mut self, machine: &str) -> Result<bool> {
        self.call(&Request::Forget { machine: machine.to_owned() })
    }

    /// Says how a machine's protection is.
    pub fn tell_protection(&mut self, status: &ProtectionStatus) -> Result<()> {
        self.call_briefly::<Value>(&Request::Protection(Box::new(status.clone()))).map(|_| ())
    }

    /// Under what a machine that this host owns may run; the daemon makes sure that it owns it.
    pub fn lease(&mut self, machine: &str) -> Result<LeaseGrant> {
        self.call(&Request::Lease { machine: machine.to_owned() })
    }

    /// Has a machine taken over in which this term is in force.
    pub fn take_over(&mut self, machine: &str, term: u64) -> Result<LeaseGrant> {
        self.call(&Request::TakeOver { machine: machine.to_owned(), term })
    }

    /// Says whether machines of hosts that failed are started here, and how much of which is at hand.
    pub fn tell_accepting(&mut self, is_accepting: bool, warm: Vec<(String, u64)>) -> Result<()> {
        self.call_briefly::<Value>(&Request::Accepting { is_accepting, warm }).map(|_| ())
    }

    pub fn umount(&mut self, lazy: bool) -> Result<Unmounted> {
        self.call(&Request::Umount { lazy })
    }

    /// Asks what is answered at once, unless the daemon hangs.
    fn call_briefly<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let failed = |error| Error::io("the control socket", error);
        self.stream.get_ref().set_read_timeout(Some(ANSWER_WAIT_MAX)).map_err(failed)?;
        let since = Stopwatch::start();
        let answer = self.call(request);
        self.stream.get_ref().set_read_timeout(None).map_err(failed)?;
        if answer.is_err() && since.elapsed() >= ANSWER_WAIT_MAX {
            return Err(self.silent());
        }
        answer
    }

    fn silent(&self) -> Error {
        let process = match rustix::net::sockopt::socket_peercred(self.stream.get_ref()) {
            Ok(peer) => format!("process {}", peer.pid.as_raw_nonzero()),
            Err(_) => "its process".to_owned(),
        };
        Error::new(Kind::Io, format!("the daemon, {process}, does not answer within {} s", ANSWER_WAIT_MAX.as_secs()))
            .hint("look into its log; if it hangs, end it with kill -9 and mount again: what was synced is kept")
    }

    /// Asks and waits for the answer, however long it takes.
    fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        self.ask_for(request, &mut |_| None)
    }

    /// The same; news before the answer goes to `heed`, which may have something to say to it.
    fn ask_for<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        heed: &mut dyn FnMut(Value) -> Option<Request>,
    ) -> Result<T> {
        self.say(request)?;
        while let Some(line) = read_line(&mut self.stream)? {
            match decode_news(&line)? {
                Some(news) => heed(news).map_or(Ok(()), |reply| self.say(&reply))?,
                None => return decode_answer(&line),
            }
        }
        Err(Error::new(Kind::Io, "the daemon ended before it answered"))
    }

    fn say(&mut self, request: &Request) -> Result<()> {
        match self.stream.get_mut().write_all(&request.encode()?) {
            // It may have said why before it closed the connection.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            said => said.map_err(|error| Error::io("the daemon went away", error)),
        }
    }
}

impl Daemon for Client {
    fn prefetch(&mut self, machine: &str, epoch: u64, stream: &str, everything: bool) -> Result<PrefetchStatus> {
        let (machine, stream) = (machine.to_owned(), stream.to_owned());
        self.call(&Request::Prefetch(PrefetchRequest { machine, epoch, stream, everything }))
    }

    fn forecast(&mut self, machine: &str, epoch: u64, stream: &str) -> Result<Foreseen> {
        let (machine, stream) = (machine.to_owned(), stream.to_owned());
        self.call(&Request::Forecast(ForecastRequest { machine, epoch, stream }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_hangs_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = super::super::socket_path(dir.path());
        // Takes connections and says nothing.
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Client::ask(&path, Client::status).unwrap_err();
        assert!(error.to_string().contains(&format!("process {}, does not answer", std::process::id())), "{error}");
        assert!(error.next_step().unwrap().contains("kill -9"));
    }
}
