//! The daemon's side of the control socket: a thread that accepts, and one for each connection.

use std::io::{BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use super::protocol::{Request, encode_answer, encode_news, read_line};
use crate::error::{Error, Result};
use crate::platform::lock::lock;
use crate::platform::socket::with_address;

/// What answers requests, from several threads at once.
pub trait Service: Send + Sync {
    fn answer(&self, request: Request, asker: &mut dyn Asker) -> Result<Value>;
}

/// Who asks, while the answer is made.
pub trait Asker {
    /// Has it hear news before the answer.
    fn tell(&mut self, news: Value) -> Result<()>;

    /// What it says next; nothing where it is gone.
    fn hear(&mut self) -> Result<Option<Request>>;
}

/// So many connections are served at once. A waiting commit occupies one.
const CONNECTIONS_MAX: usize = 64;

/// A client that says nothing for so long is sent away.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A client that does not take its answer for so long is left alone.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

/// A socket that clients can connect to already, but where nobody answers yet.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket. Whoever calls this holds the daemon's lock, so that a file that is there is a dead daemon's.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot make the control socket {}", path.display()), error);
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) => tracing::info!(socket = %path.display(), "removed the socket of a daemon that died"),
            Err(_) => {}
        }
        let socket = with_address(path, |address| UnixListener::bind(address)).map_err(failed)?;
        // Whoever connects before this is still asked who it is.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Begins to answer.
    pub fn serve(self, service: Arc<dyn Service>) -> Result<Server> {
        let failed = |error| Error::io(format!("the control socket {}", self.path.display()), error);
        let socket = Arc::new(self.socket);
        let shared = Arc::new(Shared::default());
        let (listener, connections) = (socket.clone(), shared.clone());
        let accepting = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &service, &connections))
            .map_err(failed)?;
        Ok(Server { socket, path: self.path, shared, accepting: Some(accepting) })
    }
}

#[derive(Default)]
struct Shared {
    counts: Mutex<Counts>,
    fewer: Condvar,
}

#[derive(Default)]
struct Counts {
    connections: usize,
    /// Requests that were read and not answered yet.
    requests: usize,
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut lock(&self.counts));
        self.fewer.notify_all();
    }
}

/// Answers until it is stopped or dropped.
pub struct Server {
    socket: Arc<UnixListener>,
    path: PathBuf,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Removes the socket: from now on a client finds no daemon. Requests that were read are still answered.
    pub fn close(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "cannot remove the control socket");
        }
        // Wakes the thread that accepts; there is nothing to do about a failure.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        let _ = accepting.join();
    }

    /// Waits until every request is answered, but not for ever.
    pub fn wait(&self, longest: Duration) {
        let counts = lock(&self.shared.counts);
        // Whether it was in time makes no difference: the process is about to end.
        let _ = self.shared.fewer.wait_timeout_while(counts, longest, |counts| counts.requests > 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

fn accept(listener: &UnixListener, service: &Arc<dyn Service>, shared: &Arc<Shared>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => serve(stream, service, shared),
            // What shutting the socket down comes to.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => return,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve(stream: UnixStream, service: &Arc<dyn Service>, shared: &Arc<Shared>) {
    if let Err(error) = check_peer(&stream) {
        return refuse(stream, error);
    }
    let mut is_full = false;
    shared.change(|counts| {
        is_full = counts.connections >= CONNECTIONS_MAX;
        counts.connections += usize::from(!is_full);
    });
    if is_full {
        return refuse(
            stream,
            Error::conflict(format!("the daemon serves {CONNECTIONS_MAX} requests already")).hint("repeat in a moment"),
        );
    }
    let (service, of_thread) = (service.clone(), shared.clone());
    let spawned = std::thread::Builder::new().name("control-request".into()).spawn(move || {
        let _counted = Counted(&of_thread);
        if let Err(error) = converse(&stream, &*service, &of_thread) {
            tracing::debug!(%error, "a control connection ended");
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a control connection");
        shared.change(|counts| counts.connections -= 1);
    }
}

/// One connection's share of the count, given back however its thread ends.
struct Counted<'a>(&'a Shared);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.change(|counts| counts.connections -= 1);
    }
}

/// One request's share, likewise.
struct Answering<'a>(&'a Shared);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.change(|counts| counts.requests -= 1);
    }
}

/// Only the daemon's own user and root may ask it anything.
fn check_peer(stream: &UnixStream) -> Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)
        .map_err(|error| Error::io("cannot tell who is at the control socket", error.into()))?;
    if may_ask(peer.uid.as_raw(), rustix::process::geteuid().as_raw()) {
        return Ok(());
    }
    tracing::warn!(uid = peer.uid.as_raw(), pid = peer.pid.as_raw_nonzero().get(), "refused a control connection");
    Err(Error::new(crate::error::Kind::Io, "the daemon answers its own user and root only")
        .hint("run this as the user who mounted the repository, or as root"))
}

fn may_ask(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

fn refuse(mut stream: UnixStream, error: Error) {
    let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
    // Who does not listen is refused all the same.
    let _ = stream.write_all(&encode_answer(Err(error)));
    let _ = stream.shutdown(Shutdown::Both);
}

/// A client, at the other end of a connection.
struct Conversation<'a> {
    stream: &'a UnixStream,
    reader: BufReader<&'a UnixStream>,
}

impl Conversation<'_> {
    fn say(&mut self, line: &[u8]) -> Result<()> {
        self.stream.write_all(line).map_err(|error| Error::io("the control socket", error))
    }
}

impl Asker for Conversation<'_> {
    fn tell(&mut self, news: Value) -> Result<()> {
        self.say(&encode_news(news))
    }

    fn hear(&mut self) -> Result<Option<Request>> {
        read_line(&mut self.reader)?.map(|line| Request::decode(&line)).transpose()
    }
}

/// Answers the requests of one connection until the client has no more.
fn converse(stream: &UnixStream, service: &dyn Service, shared: &Shared) -> Result<()> {
    let failed = |error| Error::io("the control socket", error);
    stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    stream.set_write_timeout(Some(ANSWER_WAIT_MAX)).map_err(failed)?;
    let mut client = Conversation { stream, reader: BufReader::new(stream) };
    loop {
        let line = match read_line(&mut client.reader) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => {
                // Where the request ends cannot be told, so this is the last answer.
                let _ = client.say(&encode_answer(Err(error)));
                return Ok(());
            }
        };
        shared.change(|counts| counts.requests += 1);
        let _answering = Answering(shared);
        let answer = Request::decode(&line).and_then(|request| service.answer(request, &mut client));
        client.say(&encode_answer(answer))?;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use serde_json::json;

    use super::super::{Client, socket_path};
    use super::*;
    use crate::error::Kind;

    /// Answers pings at once, and umounts when it is told.
    struct Scripted {
        release: Mutex<mpsc::Receiver<()>>,
    }

    impl Service for Scripted {
        fn answer(&self, request: Request, _: &mut dyn Asker) -> Result<Value> {
            match request {
                Request::Ping => Ok(
                    json!({"repository": "r", "id": "i", "mountpoint": "/m", "pid": 1, "epochfs": "0", "state": "mounted", "later": true}),
                ),
                Request::Status => Err(Error::new(Kind::Fenced, "fenced").hint("stop")),
                Request::Commit(commit) => Err(Error::not_found(commit.machine)),
                Request::StoreAgain(again) => Err(Error::not_found(again.machine)),
                Request::Forget { machine } => Err(Error::not_found(machine)),
                Request::Protection(status) => Err(Error::not_found(status.machine)),
                Request::Lease { machine } | Request::TakeOver { machine, .. } => Err(Error::not_found(machine)),
                Request::Accepting { .. } | Request::StoodStill { .. } => Ok(Value::Null),
                Request::Prefetch(request) => Err(Error::not_found(request.machine)),
                Request::Forecast(request) => Err(Error::not_found(request.machine)),
                Request::Umount { .. } => {
                    self.release.lock().unwrap().recv().unwrap();
                    Ok(json!({"mountpoint": "/m", "ended": true, "holders": []}))
                }
            }
        }
    }

    fn start(path: &Path) -> (Server, mpsc::Sender<()>) {
        let (sender, release) = mpsc::channel();
        let service = Scripted { release: Mutex::new(release) };
        (Listener::bind(path).unwrap().serve(Arc::new(service)).unwrap(), sender)
    }

    #[test]
    fn a_client_is_answered_and_errors_keep_their_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        assert!(Client::connect(&path).unwrap().is_none());
        let (server, _) = start(&path);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = Client::connect(&path).unwrap().unwrap();
        assert_eq!(client.ping().unwrap().mountpoint, "/m");
        let error = client.status().unwrap_err();
        assert_eq!((error.kind(), error.next_step()), (Kind::Fenced, Some("stop")));
        let error = client
            .commit(super::super::CommitRequest { machine: "web1".into(), ..Default::default() }, &mut |_| true)
            .unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (Kind::NotFound, 5));
        drop(server);
        assert!(!path.exists());
        assert!(Client::connect(&path).unwrap().is_none());
    }

    #[test]
    fn the_socket_of_a_dead_daemon_is_none_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(Client::connect(&path).unwrap().is_none());
        let (_server, _) = start(&path);
        assert_eq!(Client::connect(&path).unwrap().unwrap().ping().unwrap().pid, 1);
        assert_eq!(
            super::super::sockets(dir.path().parent().unwrap()).iter().filter(|found| **found == path).count(),
            1
        );
    }

    #[test]
    fn a_path_too_long_for_an_address_works_too() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = socket_path(&deep);
        assert!(Client::connect(&path).unwrap().is_none());
        let (_server, _) = start(&path);
        assert_eq!(Client::connect(&path).unwrap().unwrap().ping().unwrap().pid, 1);
    }

    #[test]
    fn a_slow_request_holds_up_nobody_and_is_answered_after_the_close() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        let (mut server, release) = start(&path);
        let mut slow = Client::connect(&path).unwrap().unwrap();
        let waiting = std::thread::spawn(move || slow.umount(false));
        let mut quick = Client::connect(&path).unwrap().unwrap();
        quick.ping().unwrap();
        while server.shared.counts.lock().unwrap().requests == 0 {
            std::thread::yield_now();
        }
        server.close();
        assert!(Client::connect(&path).unwrap().is_none());
        release.send(()).unwrap();
        server.wait(Duration::from_secs(60));
        assert!(waiting.join().unwrap().unwrap().ended);
    }

    #[test]
    fn nonsense_is_answered_and_ends_the_conversation_only_where_it_must() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_path(dir.path());
        let (_server, _) = start(&path);
        let stream = UnixStream::connect(&path).unwrap();
        let mut reader = BufReader::new(&stream);
        (&stream).write_all(b"nonsense\n{\"version\":1,\"request\":\"ping\"}\nbroken off").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        while let Some(line) = read_line(&mut reader).unwrap() {
            answers.push(serde_json::from_slice::<Value>(&line).unwrap());
        }
        assert_eq!(answers.len(), 3, "{answers:?}");
        assert_eq!(answers[0]["error"]["kind"], "usage");
        assert_eq!(answers[1]["answer"]["pid"], 1);
        assert_eq!(answers[2]["error"]["kind"], "io");
    }

    #[test]
    fn only_its_own_user_and_root_may_ask() {
        assert!(may_ask(0, 0) && may_ask(0, 1000) && may_ask(1000, 1000));
        assert!(!may_ask(1000, 0) && !may_ask(1001, 1000));
    }
}
