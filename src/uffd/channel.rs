//! What a supervisor and its worker say to each other: JSON with descriptors, a message at a time.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::vm::End;
use crate::error::{Error, Kind, Result};

/// To a worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    /// With the userfaultfd, the process and the ledger.
    Serve { id: u64, pid: i32, layout: Layout },
    /// Fill all memory of all VMs, and let them go.
    Finish,
}

/// From a worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    Ready(Ready),
    /// It is not stopped.
    Alive,
    Failed {
        kind: String,
        message: String,
        next_step: Option<String>,
    },
    /// With the process of a VM that this worker serves, and no other could.
    Watch {
        pid: i32,
    },
    Ended {
        id: u64,
        end: End,
    },
}

/// What a worker serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
    pub len: u64,
}

/// Longer than any message.
const MESSAGE_LEN_MAX: usize = 160 << 10;

/// Whoever does not read for so long is not alive.
const SEND_WAIT_MAX: Duration = Duration::from_secs(10);

/// One end of the connection.
pub struct Channel(OwnedFd);

impl Channel {
    pub fn pair() -> Result<(Self, Self)> {
        let failed = |error: Errno| Error::io("cannot connect to a worker", error.into());
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        for end in [&one, &other] {
            let timeout = rustix::net::sockopt::Timeout::Send;
            rustix::net::sockopt::set_socket_timeout(end, timeout, Some(SEND_WAIT_MAX)).map_err(failed)?;
        }
        Ok((Self(one), Self(other)))
    }

    /// The end that this process was started with.
    pub fn of(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    pub fn into_inner(self) -> OwnedFd {
        self.0
    }

    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let failed = |error: Errno| Error::io("the other process cannot be told", error.into());
        let text = serde_json::to_vec(message).map_err(|error| Error::usage(error.to_string()))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(failed(Errno::TOOBIG));
        }
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                result => return result.map(drop).map_err(failed),
            }
        }
    }

    /// Waits for a message; nothing once the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MESSAGE_LEN_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                // It died before it had read everything.
                Err(Errno::CONNRESET) => return Ok(None),
                result => {
                    break result.map_err(|error| Error::io("the other process cannot be heard", error.into()))?;
                }
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                descriptors.extend(some);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes]).map_err(|error| {
            Error::new(Kind::Io, format!("the other process says what nobody understands: {error}"))
        })?;
        Ok(Some((message, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl FromWorker {
    pub fn failed(error: &Error) -> Self {
        Self::Failed {
            kind: error.kind().name().to_owned(),
            message: error.to_string(),
            next_step: error.next_step().map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (one, other) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        one.send(&FromWorker::Watch { pid: 7 }, &[file.as_fd(), file.as_fd()]).unwrap();
        one.send(&FromWorker::Ended { id: 3, end: End::Released }, &[]).unwrap();
        drop(one);
        let (message, descriptors) = other.receive::<FromWorker>().unwrap().unwrap();
        assert!(matches!(message, FromWorker::Watch { pid: 7 }) && descriptors.len() == 2);
        let (message, descriptors) = other.receive::<FromWorker>().unwrap().unwrap();
        assert!(matches!(message, FromWorker::Ended { id: 3, end: End::Released }) && descriptors.is_empty());
        assert!(other.receive::<FromWorker>().unwrap().is_none());
    }
}
