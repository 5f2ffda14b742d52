//! The process behind a socket, held so that a signal never reaches another one that got its number.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::time::Timespec;

use crate::error::{Error, Result};

/// The process of a VM.
pub struct Peer {
    pid: i32,
    process: OwnedFd,
}

impl Peer {
    /// The process that connected this socket, or listens at its other end.
    pub fn of(socket: impl AsFd) -> Result<Self> {
        let failed = |error: io::Error| Error::io("cannot tell which process is at the other end", error);
        let pid = rustix::net::sockopt::socket_peercred(&socket).map_err(|error| failed(error.into()))?.pid;
        let process = match peer_process(socket.as_fd()) {
            // Linux before 6.5: its number leads to it as long as it has not closed the socket.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOPROTOOPT) => {
                let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
                if ready(socket.as_fd(), PollFlags::RDHUP) {
                    return Err(Error::usage("the process at the other end is gone"));
                }
                process
            }
            other => other.map_err(failed)?,
        };
        Ok(Self { pid: pid.as_raw_nonzero().get(), process })
    }

    /// One that another process found.
    pub fn found(pid: i32, process: OwnedFd) -> Self {
        Self { pid, process }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn is_this_process(&self) -> bool {
        Pid::from_raw(self.pid) == Some(rustix::process::getpid())
    }

    pub fn has_ended(&self) -> bool {
        ready(self.process.as_fd(), PollFlags::IN)
    }

    /// Ends it, whatever it does.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub fn try_clone(&self) -> Result<Self> {
        let process = self.process.try_clone().map_err(|error| Error::io("cannot duplicate a descriptor", error))?;
        Ok(Self { pid: self.pid, process })
    }
}

/// Can be polled: readable once the process has ended.
impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

fn ready(descriptor: BorrowedFd<'_>, events: PollFlags) -> bool {
    let mut polled = [PollFd::new(&descriptor, events)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&now)).is_ok() && !polled[0].revents().is_empty()
}

/// As Linux numbers it on all processors that run VMs.
const SO_PEERPIDFD: libc::c_int = 77;

/// A descriptor of the very process that the kernel noted when the socket was connected.
fn peer_process(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut process: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is a number, for which there is room, and the length says so.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut process).cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if process < 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    // SAFETY: the kernel just made this descriptor for this process, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(process) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_process_at_the_other_end_is_found() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert!(peer.is_this_process() && !peer.has_ended());
        assert_eq!(peer.pid(), std::process::id() as i32);
    }

    #[test]
    fn one_that_has_ended_is_not_killed_by_its_number() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Pid::from_raw(child.id() as i32).unwrap();
        let peer = Peer::found(child.id() as i32, rustix::process::pidfd_open(process, PidfdFlags::empty()).unwrap());
        child.wait().unwrap();
        assert!(peer.has_ended());
        // Even if the number were this process's by now.
        let peer = Peer { pid: std::process::id() as i32, ..peer };
        peer.kill().unwrap();
    }
}
