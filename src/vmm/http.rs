//! As much of HTTP/1.1 over a unix socket as the APIs of monitors need: one request with a JSON body, one answer.

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::socket;

/// The longest answer that is read, headers and all.
const ANSWER_LEN_MAX: usize = 64 << 10;

/// How long one read or write may take before it is looked at the clock.
const SLICE: Duration = Duration::from_millis(200);

/// Sends a PUT, and returns when it was answered with success.
pub fn put(socket: &Path, path: &str, body: Option<&Value>, wait: Duration) -> Result<()> {
    send("PUT", socket, path, body, wait).map(|_| ())
}

/// Sends a request, and returns the body of the answer if that is success.
pub fn send(method: &str, socket: &Path, path: &str, body: Option<&Value>, wait: Duration) -> Result<Vec<u8>> {
    let what = || format!("{method} {path} at {}", socket.display());
    let failed = |error: std::io::Error| {
        let is_missing = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
        let error = Error::io(what(), error);
        if is_missing { error.hint("start the monitor with this API socket first") } else { error }
    };
    let mut stream = socket::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(SLICE)).map_err(failed)?;
    stream.set_write_timeout(Some(wait)).map_err(failed)?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let since = Stopwatch::start();
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match parse(&received).map_err(|text| Error::new(Kind::Io, format!("{}: {text}", what())))? {
            Some((status, answer)) if (200..300).contains(&status) => return Ok(answer.to_vec()),
            Some((status, answer)) => {
                return Err(Error::new(Kind::Io, format!("{} was refused ({status}): {}", what(), reason(answer))));
            }
            None if received.len() > ANSWER_LEN_MAX => {
                return Err(Error::new(Kind::Io, format!("{}: the answer is too long", what())));
            }
            None => {}
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Error::new(Kind::Io, format!("{}: the connection ended without an answer", what()))),
            Ok(len) => received.extend_from_slice(&buffer[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if since.elapsed() >= wait {
                    let text = format!("{}: no answer within {} s", what(), wait.as_secs());
                    return Err(Error::new(Kind::Io, text));
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// The status and the body of an answer; none while some of it is missing.
fn parse(received: &[u8]) -> std::result::Result<Option<(u16, &[u8])>, String> {
    let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&received[..end]).map_err(|_| "the answer is no HTTP")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    let code = status
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|code| code.parse::<u16>().ok())
        .ok_or_else(|| format!("the answer is no HTTP: {status:?}"))?;
    let mut len = 0;
    for line in lines {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            len = value.trim().parse::<usize>().map_err(|_| "the length of the answer is no number")?;
        }
    }
    // One that continues is followed by another.
    if (100..200).contains(&code) {
        return parse(&received[end + 4..]);
    }
    if len > ANSWER_LEN_MAX {
        return Err("the answer is too long".to_owned());
    }
    Ok(received[end + 4..].get(..len).map(|body| (code, body)))
}

/// Why a monitor refused: Firecracker says it in a field, Cloud Hypervisor in a list or in plain text.
fn reason(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Array(causes)) => {
            causes.iter().map(|cause| cause.as_str().unwrap_or("?")).collect::<Vec<_>>().join(": ")
        }
        Ok(document) => document["fault_message"].as_str().map_or(text.trim().to_owned(), str::to_owned),
        Err(_) if text.trim().is_empty() => "it gives no reason".to_owned(),
        Err(_) => text.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    /// What comes of a request that is answered so, and the request.
    fn ask(answer: &'static [u8], stays: bool) -> (Result<()>, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"}") {
                let len = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..len]);
            }
            for piece in answer.chunks(7) {
                if stream.write_all(piece).is_err() {
                    break;
                }
            }
            if stays {
                let _ = stream.read(&mut buffer);
            }
            String::from_utf8(request).unwrap()
        });
        let result = put(&path, "/snapshot/load", Some(&json!({"a": 1})), Duration::from_millis(300));
        (result, thread.join().unwrap())
    }

    #[test]
    fn success_is_told_from_refusal() {
        let (result, request) = ask(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n", true);
        result.unwrap();
        assert!(request.starts_with("PUT /snapshot/load HTTP/1.1\r\nHost: localhost\r\n"), "{request}");
        assert!(request.contains("Content-Length: 7\r\n") && request.ends_with("\r\n\r\n{\"a\":1}"), "{request}");
        ask(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true).0.unwrap();
        for (answer, text) in [
            (
                &b"HTTP/1.1 400 Bad Request\r\nContent-Length: 29\r\n\r\n{\"fault_message\":\"no such CPU\"}"[..],
                "(400): ",
            ),
            (b"HTTP/1.1 400 \r\nContent-Length: 31\r\n\r\n{\"fault_message\":\"no such CPU\"}", "(400): no such CPU"),
            (b"HTTP/1.1 500 \r\nContent-Length: 20\r\n\r\n[\"failed\",\"because\"]", "(500): failed: because"),
            (b"HTTP/1.1 404 \r\n\r\n", "(404): it gives no reason"),
            (b"HTTP/1.1 500 \r\nContent-Length: 4\r\n\r\ntext", "(500): text"),
        ] {
            let error = ask(answer, true).0.unwrap_err().to_string();
            assert!(error.contains(text), "{error}, not {text}");
        }
    }

    #[test]
    fn what_is_no_answer_is_bounded() {
        let endless: &'static [u8] = Box::leak(vec![b'x'; ANSWER_LEN_MAX * 2].into_boxed_slice());
        for (answer, stays, text) in [
            (&b""[..], true, "no answer within"),
            (b"", false, "ended without an answer"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nxx", false, "ended without an answer"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", true, "too long"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", true, "no number"),
            (b"SSH-2.0-x\r\n\r\n", true, "no HTTP"),
            (b"\xff\xff\r\n\r\n", true, "no HTTP"),
            (endless, true, "too long"),
        ] {
            let error = ask(answer, stays).0.unwrap_err().to_string();
            assert!(error.contains(text), "{error}, not {text}");
        }
        let error = put(Path::new("/nonexistent/api"), "/x", None, Duration::ZERO).unwrap_err();
        assert!(error.next_step().unwrap().contains("API socket"));
    }
}
