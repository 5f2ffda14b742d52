//! The socket that VMs come to, and what they have to show before they are served.
//!
//! Nothing that arrives here is believed: whoever may connect may send anything.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

use super::descriptor::Userfaultfd;
use super::layout::Layout;
use super::ledger::Ledger;
use super::peer::Peer;
use super::server::OnDamage;
use super::vm::{Admission, kill};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::socket::{connect, with_address};

/// Who has not shown everything after so long is sent away.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a VM may send at most.
const MESSAGE_LEN_MAX: usize = 256 << 10;

/// So many may be about to introduce themselves; others wait in the socket's queue.
const GREETINGS_MAX: usize = 64;

const BACKLOG: i32 = 128;

/// A socket, and who stands before it.
pub struct Lobby {
    socket: Socket,
    /// What is served, in words, and how long it is.
    image: String,
    stream_len: u64,
    on_damage: OnDamage,
    greetings: Vec<Greeting>,
}

/// Somebody who is about to introduce themselves.
struct Greeting {
    connection: OwnedFd,
    peer: Peer,
    text: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    is_cut: bool,
    since: Stopwatch,
}

impl Lobby {
    pub fn open(path: &Path, image: String, stream_len: u64, on_damage: OnDamage) -> Result<Self> {
        Ok(Self { socket: Socket::bind(path)?, image, stream_len, on_damage, greetings: Vec::new() })
    }

    pub fn path(&self) -> &Path {
        &self.socket.path
    }

    /// Lets nobody come any more. Whoever came before is heard: they have handed their memory over, and look at nothing that
    /// would tell them that nobody is there.
    pub fn close(&mut self) {
        self.socket.remove();
    }

    /// Whether nobody stands here any more, as far as the last step saw.
    pub fn is_empty(&self) -> bool {
        self.greetings.is_empty()
    }

    /// What to wait for before the next step.
    pub fn sources(&self) -> Vec<PollFd<'_>> {
        let mut sources = Vec::new();
        if self.greetings.len() < GREETINGS_MAX {
            sources.push(PollFd::from_borrowed_fd(self.socket.listener.as_fd(), PollFlags::IN));
        }
        // Who has said everything, but sent no descriptor, would only be heard to hang up.
        let talking = self.greetings.iter().filter(|greeting| !greeting.is_mute());
        sources.extend(talking.map(|greeting| PollFd::from_borrowed_fd(greeting.connection.as_fd(), PollFlags::IN)));
        sources
    }

    /// How long to wait at most.
    pub fn timeout(&self) -> Option<Duration> {
        self.greetings.iter().map(|greeting| PATIENCE.saturating_sub(greeting.since.elapsed())).min()
    }

    /// Accepts who comes, and returns who has shown everything.
    pub fn step(&mut self) -> Vec<Admission> {
        while self.greetings.len() < GREETINGS_MAX {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.socket.listener, flags) {
                Ok(connection) => match Peer::of(&connection) {
                    Ok(peer) => self.greetings.push(Greeting::new(connection, peer)),
                    Err(error) => tracing::warn!("refused a connection to {}: {error}", self.path().display()),
                },
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    // Too many open files, most likely: it is tried again, and others go on being served.
                    tracing::error!("cannot accept at {}: {error}", self.path().display());
                    std::thread::sleep(Duration::from_millis(50));
                    break;
                }
            }
        }
        let mut arrivals = Vec::new();
        let mut at = 0;
        while at < self.greetings.len() {
            match self.greetings[at].listen(self.stream_len) {
                None => at += 1,
                Some(layout) => {
                    let greeting = self.greetings.swap_remove(at);
                    arrivals.extend(self.admit(greeting, layout));
                }
            }
        }
        arrivals
    }

    fn admit(&self, mut greeting: Greeting, layout: Result<Layout>) -> Option<Admission> {
        // Whoever hands over a userfaultfd has memory that waits.
        let has_uffd = greeting.descriptors.iter().any(is_userfaultfd);
        let uffd = match (greeting.descriptors.pop(), greeting.descriptors.is_empty() && !greeting.is_cut) {
            (None, _) => Err(Error::usage("it sent no descriptor")),
            (Some(_), false) => Err(Error::usage("it sent more than one descriptor")),
            (Some(descriptor), true) => Userfaultfd::adopt(descriptor),
        };
        let Greeting { peer, connection, .. } = greeting;
        let (refused, is_stuck) = match (uffd, layout) {
            (Err(error), _) => (error, has_uffd),
            (Ok(_), Err(error)) => (error, true),
            (Ok(uffd), Ok(layout)) => match Ledger::new(self.stream_len) {
                Ok(ledger) => {
                    return Some(Admission { layout, uffd, peer, ledger, connection: Some(connection) });
                }
                Err(error) => (error, true),
            },
        };
        tracing::warn!("refused {peer} at {}: {refused}", self.path().display());
        // Its memory waits for somebody who will never come.
        if is_stuck && self.on_damage == OnDamage::Kill {
            kill(&peer, &self.image, &format!("its memory cannot be served: {refused}"));
        }
        None
    }
}

impl Greeting {
    fn new(connection: OwnedFd, peer: Peer) -> Self {
        Self { connection, peer, text: Vec::new(), descriptors: Vec::new(), is_cut: false, since: Stopwatch::start() }
    }

    fn is_mute(&self) -> bool {
        !self.text.is_empty() && self.descriptors.is_empty()
    }

    /// Takes in what is there. Nothing as long as something may be missing, then the layout, or what is wrong with it.
    fn listen(&mut self, stream_len: u64) -> Option<Result<Layout>> {
        let has_hung_up = match self.receive() {
            Ok(has_hung_up) => has_hung_up,
            Err(error) => return Some(Err(Error::io("it cannot be heard", error.into()))),
        };
        let is_late = has_hung_up || self.since.elapsed() >= PATIENCE;
        if self.text.len() > MESSAGE_LEN_MAX {
            return Some(Err(Error::usage("it describes its memory at too great a length")));
        }
        match Layout::parse(&self.text, stream_len) {
            // The descriptor comes with the text; who sent none may still do so.
            Some(Ok(_)) if self.descriptors.is_empty() && !is_late => None,
            None if !is_late => None,
            None if self.text.is_empty() => Some(Err(Error::usage("it said nothing"))),
            None => Some(Err(Error::usage("it did not say all"))),
            result => result,
        }
    }

    /// Reads until nothing is left; whether the other end is closed.
    fn receive(&mut self) -> std::result::Result<bool, Errno> {
        loop {
            let mut bytes = [0; 16 << 10];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.connection,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            );
            let received = match received {
                Ok(received) => received,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Ok(true),
                Err(error) => return Err(error),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    self.descriptors.extend(descriptors);
                }
            }
            self.is_cut |= received.flags.contains(ReturnFlags::CTRUNC);
            self.text.extend_from_slice(&bytes[..received.bytes]);
            if self.text.len() > MESSAGE_LEN_MAX || self.descriptors.len() > 1 {
                return Ok(true);
            }
            if received.bytes == 0 {
                // An empty message, or the end.
                return Ok(self.is_hung_up());
            }
        }
    }

    fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.connection, PollFlags::RDHUP)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled_well = rustix::event::poll(&mut polled, Some(&now)).is_ok();
        polled_well && polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }
}

/// A socket of this process, whose file goes with it.
struct Socket {
    listener: OwnedFd,
    path: PathBuf,
    /// Its file, as the file system numbers it.
    file: (u64, u64),
}

impl Socket {
    /// Takes the place of a socket that nobody listens at.
    fn bind(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(format!("cannot make the socket {}", path.display()), error);
        let parent = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => return Err(Error::usage(format!("{} is no name for a socket", path.display()))),
        };
        // Who looks whether a socket is in use and removes it must not be joined by another one who does.
        let directory = File::open(parent).map_err(failed)?;
        rustix::fs::flock(&directory, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        clear(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let bound = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(io::Error::from)
            .and_then(|listener| {
                with_address(path, |path| Ok(rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?))?;
                // Nobody can connect before somebody listens.
                rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
                rustix::net::listen(&listener, BACKLOG)?;
                Ok(listener)
            });
        let listener = bound.map_err(failed)?;
        let file = std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino())).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), file })
    }
}

fn is_userfaultfd(descriptor: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Socket {
    /// Removes its file, unless another one has taken its place.
    fn remove(&self) {
        let is_ours = std::fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if is_ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

/// Removes a socket that nobody listens at.
fn clear(path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("cannot look at {}", path.display()), error);
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(file) if file.file_type().is_socket() => {}
        Ok(_) => {
            return Err(Error::conflict(format!("{} is there, and is no socket", path.display()))
                .hint("name another path, or remove it"));
        }
    }
    match connect(path) {
        Ok(_) => Err(Error::new(Kind::Conflict, format!("somebody listens at {} already", path.display()))
            .hint("end that server, or name another path")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(socket = %path.display(), "removed the socket of a server that died");
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

impl AsFd for Lobby {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.listener.as_fd()
    }
}
