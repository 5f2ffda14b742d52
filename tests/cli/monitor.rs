//! A monitor that has nothing else to do than to answer as Firecracker's does: a process of its own, for whoever protects a
//! machine looks at the files that its process has open, and other tests have theirs.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;

use crate::support::wait_until;

/// Ends with this value.
pub struct Monitor(Child);

impl Monitor {
    pub fn start(socket: &Path) -> Self {
        let child = crate::process::command("monitor", &[socket.to_str().unwrap()]).spawn().unwrap();
        let this = Self(child);
        wait_until("the monitor answers", || UnixStream::connect(socket).is_ok());
        this
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine that runs, and agrees to everything.
pub fn run(arguments: &[String]) {
    let listener = UnixListener::bind(&arguments[0]).unwrap();
    let mut state = "Running";
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut request = vec![0; 4096];
        // Whoever only looks which process this is says nothing.
        let Ok(len @ 1..) = stream.read(&mut request) else { continue };
        let request = String::from_utf8_lossy(&request[..len]).into_owned();
        for (told, becomes) in [("Paused", "Paused"), ("Resumed", "Running")] {
            if request.starts_with("PATCH /vm") && request.contains(told) {
                state = becomes;
            }
        }
        let body = format!("{{\"state\": \"{state}\"}}");
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let _ = stream.write_all(answer.as_bytes());
    }
}
