//! Making a mount: the kernel's end of it is a descriptor of /dev/fuse.
//!
//! Not left to `fuser`, which unmounts whatever is at the mountpoint when a session ends, even if the session's own mount
//! is long gone and the mountpoint is somebody else's.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::MountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::fuse::MountOptions;

const SUBTYPE: &str = "epochfs";

/// Mounts at a directory, and returns the descriptor over which the kernel asks.
pub fn connect(at: &Path, source: &str, options: &MountOptions) -> io::Result<OwnedFd> {
    match directly(at, source, options) {
        // Only root may. Users have a program that does it for them.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => by_helper(at, source, options),
        connected => connected,
    }
}

fn directly(at: &Path, source: &str, options: &MountOptions) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut data =
        format!("fd={},rootmode=40000,user_id={user},group_id={group},default_permissions", device.as_raw_fd());
    if options.allow_other {
        data += ",allow_other";
    }
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = CString::new(data)?;
    rustix::mount::mount(source, at, format!("fuse.{SUBTYPE}"), flags, data.as_c_str())?;
    Ok(device.into())
}

/// fusermount3 sends the descriptor over a socket, whose number it is told.
fn by_helper(at: &Path, source: &str, options: &MountOptions) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    // A comma would end the option.
    let mut list = format!("fsname={},subtype={SUBTYPE}", source.replace([',', '\\'], "_"));
    list += ",default_permissions,nodev,nosuid,noatime";
    for (name, is_set) in [(",allow_other", options.allow_other), (",ro", options.read_only)] {
        list += if is_set { name } else { "" };
    }
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(list)
        .arg("--")
        .arg(at)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("only root mounts without fusermount3: {error}")))?;
    let received = receive(&ours);
    drop(ours);
    let output = child.wait_with_output()?;
    match received {
        Ok(Some(device)) if output.status.success() => Ok(device),
        Err(error) => Err(error),
        Ok(_) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(io::Error::other(if said.is_empty() { format!("fusermount3: {}", output.status) } else { said }))
        }
    }
}

/// The descriptor that comes over a socket; none if it is closed without one.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor.filter(|_| received.bytes > 0))
}

#[cfg(test)]
mod tests {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_descriptor_is_received_and_its_absence_too() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&theirs, &[IoSlice::new(b"\0")], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(receive(&ours).unwrap().is_some());
        drop(theirs);
        assert!(receive(&ours).unwrap().is_none());
    }
}
