//! Sockets that have a place in the file system, whatever the length of its path.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// The longest path that fits a socket's address.
const ADDRESS_LEN_MAX: usize = 107;

/// Calls `with` with a path that names the same socket and fits an address: a long one by means of its directory.
pub fn with_address<T>(path: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= ADDRESS_LEN_MAX {
        return with(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    with(&Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name))
}

pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_address(path, |path| UnixStream::connect(path))
}

/// The same, but an error where whoever listens has no room for one more connection, and would be waited for.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    with_address(path, |path| Ok(rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?))?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn paths_of_any_length_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        for below in ["short", &"long".repeat(50)] {
            let path = dir.path().join(below).join("socket");
            std::fs::create_dir(path.parent().unwrap()).unwrap();
            let _listener = with_address(&path, |path| UnixListener::bind(path)).unwrap();
            assert!(path.exists() && connect(&path).is_ok() && connect_now(&path).is_ok(), "{below}");
        }
        assert_eq!(
            connect(&dir.path().join("long".repeat(50)).join("none")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
