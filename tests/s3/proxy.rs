//! A proxy between a host and the service that fails as networks and busy services do. One request a connection.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// This status with this code, and the service never hears of it.
    Answer(&'static str, &'static str),
    /// The connection is cut before the service hears of it.
    Cut,
    /// The service does it, and the answer is lost.
    Lost,
    /// The same, and then nothing gets through any more.
    LostThenDown,
    /// Half of the answer's body arrives.
    Half,
    /// One bit of the answer's body is wrong.
    Flip,
    /// The service hears of it so late that nobody waits any more.
    Late(Duration),
}

/// Which requests a fault befalls: those of a method, or all, whose line has this text, so many times.
pub struct Rule {
    method: &'static str,
    text: String,
    times: usize,
    fault: Fault,
}

impl Rule {
    pub fn new(method: &'static str, text: &str, times: usize, fault: Fault) -> Self {
        Self { method, text: text.to_owned(), times, fault }
    }

    pub fn always(method: &'static str, fault: Fault) -> Self {
        Self::new(method, "", usize::MAX, fault)
    }
}

pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    service: String,
    rules: Mutex<Vec<Rule>>,
    ended: AtomicBool,
    /// Nothing gets through, as if the link were cut.
    is_down: AtomicBool,
    befallen: AtomicUsize,
}

impl Proxy {
    pub fn new(endpoint: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::new(State {
            service: endpoint.trim_start_matches("http://").to_owned(),
            rules: Mutex::default(),
            ended: AtomicBool::new(false),
            is_down: AtomicBool::new(false),
            befallen: AtomicUsize::new(0),
        });
        let address = listener.local_addr().unwrap();
        let accepting = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(client), state) = (client, accepting.clone()) else { continue };
                // Whoever hangs up in between is not this proxy's concern.
                std::thread::spawn(move || state.serve(client).ok());
            }
        });
        Self { address, state }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn add(&self, rule: Rule) {
        self.state.rules.lock().unwrap().push(rule);
    }

    pub fn clear(&self) {
        self.state.rules.lock().unwrap().clear();
    }

    /// Cuts the link, or mends it.
    pub fn set_down(&self, is_down: bool) {
        self.state.is_down.store(is_down, Ordering::SeqCst);
    }

    /// How many requests a fault befell.
    pub fn befallen(&self) -> usize {
        self.state.befallen.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn fault(&self, line: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| {
            rule.times > 0
                && line.contains(&rule.text)
                && (rule.method.is_empty() || line.starts_with(&format!("{} ", rule.method)))
        })?;
        rule.times -= 1;
        self.befallen.fetch_add(1, Ordering::SeqCst);
        Some(rule.fault)
    }

    fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some((head, body)) = read_request(&mut client)? else { return Ok(()) };
        if self.is_down.load(Ordering::SeqCst) {
            return client.shutdown(Shutdown::Both);
        }
        let fault = self.fault(head.lines().next().unwrap_or_default());
        match fault {
            Some(Fault::Cut) => return client.shutdown(Shutdown::Both),
            Some(Fault::Answer(status, code)) => {
                let xml =
                    format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>");
                return write!(
                    client,
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{xml}",
                    xml.len()
                );
            }
            Some(Fault::Late(wait)) => std::thread::sleep(wait),
            _ => {}
        }
        let answer = self.ask(&head, &body)?;
        let start = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
        match fault {
            Some(Fault::LostThenDown) => {
                self.is_down.store(true, Ordering::SeqCst);
                client.shutdown(Shutdown::Both)
            }
            Some(Fault::Lost) => client.shutdown(Shutdown::Both),
            Some(Fault::Half) => client.write_all(&answer[..start + (answer.len() - start) / 2]),
            Some(Fault::Flip) => {
                let mut wrong = answer;
                let at = start + (wrong.len() - start) / 2;
                if at < wrong.len() {
                    wrong[at] ^= 1;
                }
                client.write_all(&wrong)
            }
            _ => client.write_all(&answer),
        }
    }

    /// What the service answers, until it closes the connection.
    fn ask(&self, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut service = TcpStream::connect(&self.service)?;
        let (line, fields) = head.split_once("\r\n").unwrap_or((head, ""));
        let mut request = format!("{line}\r\nConnection: close\r\n{fields}").into_bytes();
        request.extend_from_slice(body);
        service.write_all(&request)?;
        let mut answer = Vec::new();
        service.read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// The head, with its empty line, and the body; nothing if the client hung up.
fn read_request(client: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 65536];
    loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(at + 4);
            let head = String::from_utf8_lossy(&bytes).into_owned();
            let len = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            let mut body = body;
            while body.len() < len.unwrap_or(0) {
                let read = client.read(&mut buffer)?;
                if read == 0 {
                    return Ok(None);
                }
                body.extend_from_slice(&buffer[..read]);
            }
            return Ok(Some((head, body)));
        }
        let read = client.read(&mut buffer)?;
        if read == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..read]);
    }
}
