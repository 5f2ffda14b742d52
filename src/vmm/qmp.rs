//! QEMU's monitor protocol: a JSON document a line.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::place::text;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::socket;
use crate::uffd::Peer;

/// The longest line that is read.
const LINE_LEN_MAX: usize = 1 << 20;

/// How often it is looked whether it makes sense to go on waiting.
const SLICE: Duration = Duration::from_millis(20);

/// How often it is tried to connect, and what is waited for is asked about.
const NAP: Duration = Duration::from_millis(1);

/// The same, while a machine stands still.
const STATE_NAP: Duration = Duration::from_micros(200);

/// How long an answer may take. Commands that take longer only begin their work, and are asked about.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(60);

/// How long a QEMU that closed its monitor may take to end.
const END_WAIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// What `migrate` and `migrate-incoming` are given to use a file. As a URI, a name with `,offset=` in it would be another.
pub fn file_channel(path: &Path) -> Result<Value> {
    let name = text(path)?;
    Ok(json!({"channels": [{"channel-type": "main", "addr": {"transport": "file", "filename": name, "offset": 0}}]}))
}

/// A connection to QEMU. While it waits it calls `check`, whose error ends the wait.
pub struct Monitor<'a> {
    socket: UnixStream,
    received: Vec<u8>,
    /// How often the machine was let go on, by whomever, since this was connected.
    resumed: u64,
    /// Whether it was told to save something since the last capture began.
    has_begun_to_save: bool,
    /// The event by which the machine told that it stopped by itself, since the last capture began.
    stopped_by: Option<String>,
    /// What it was told and has not answered. A late answer would be taken for that of what it is told next.
    unanswered: u32,
    check: Box<dyn FnMut() -> Result<()> + Send + 'a>,
    answer_wait_max: Duration,
    end_wait: Duration,
}

impl<'a> Monitor<'a> {
    /// The process at the other end.
    pub fn peer(&self) -> Result<Peer> {
        Peer::of(&self.socket)
    }

    /// Connects, as soon as QEMU listens.
    pub fn connect(path: &Path, wait: Duration, mut check: impl FnMut() -> Result<()> + Send + 'a) -> Result<Self> {
        let failed = |error| Error::io(format!("the monitor {}", path.display()), error);
        let since = Stopwatch::start();
        let socket = loop {
            check()?;
            match socket::connect(path) {
                Ok(socket) => break socket,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    if since.elapsed() > wait {
                        return Err(unopened(path, wait));
                    }
                }
                Err(error) => return Err(failed(error)),
            }
            std::thread::sleep(NAP);
        };
        socket.set_read_timeout(Some(SLICE)).map_err(failed)?;
        socket.set_write_timeout(Some(ANSWER_WAIT_MAX)).map_err(failed)?;
        let mut monitor = Self {
            socket,
            received: Vec::new(),
            resumed: 0,
            has_begun_to_save: false,
            stopped_by: None,
            unanswered: 0,
            check: Box::new(check),
            answer_wait_max: wait.min(ANSWER_WAIT_MAX),
            end_wait: END_WAIT,
        };
        let greeting = monitor.receive("its greeting", wait).map_err(|error| match error.next_step() {
            None => error.hint(format!("QEMU serves one client at a time: nobody else may use {}", path.display())),
            Some(_) => error,
        })?;
        if greeting.get("QMP").is_none() {
            return Err(Error::new(Kind::Io, format!("{} is no monitor of QEMU", path.display())));
        }
        monitor.run("qmp_capabilities", Value::Null)?;
        Ok(monitor)
    }

    /// How often the machine went on, as far as was heard with the answers until now.
    pub fn resumed(&self) -> u64 {
        self.resumed
    }

    /// Nobody tells how QEMU ended: a connection that is closed is not worth a wait.
    pub fn does_not_wait_for_the_end(mut self) -> Self {
        self.end_wait = Duration::ZERO;
        self
    }

    /// Runs a command to its answer.
    pub fn run(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({"execute": name});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.is_in_step(name)?;
        self.say(name, &request)?;
        let answer = self.answer(name);
        // What it did not answer it may do all the same.
        self.has_begun_to_save |= name == "migrate" && (answer.is_ok() || self.unanswered > 0);
        answer
    }

    /// From here on it is told whether this has it save anything.
    pub fn begin_capture(&mut self) {
        self.has_begun_to_save = false;
        self.stopped_by = None;
    }

    /// Whether the machine told since then that it stopped by itself, and by which event.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stopped_by.as_deref()
    }

    pub fn has_begun_to_save(&self) -> bool {
        self.has_begun_to_save
    }

    /// Nothing more is said on a connection on which an answer is missing: on another one it is known what is answered.
    fn is_in_step(&self, name: &str) -> Result<()> {
        match self.unanswered {
            0 => Ok(()),
            _ => Err(Error::new(Kind::Io, format!("QEMU has not answered what it was told before {name}"))),
        }
    }

    fn say(&mut self, name: &str, request: &Value) -> Result<()> {
        self.unanswered += 1;
        match self.socket.write_all(format!("{request}\n").as_bytes()) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.closed(name)),
        }
    }

    /// Runs a command, and hands what the machine's status was just before it, and how often it had gone on, to `see`.
    fn run_with_status(&mut self, name: &str, see: impl FnOnce(&str, u64)) -> Result<()> {
        const STATUS: &str = "query-status";
        self.is_in_step(name)?;
        // Both at once: nothing comes between them.
        [STATUS, name].iter().try_for_each(|name| self.say(name, &json!({"execute": name})))?;
        let status = self.answer(STATUS)?;
        see(status["status"].as_str().unwrap_or("unknown"), self.resumed);
        self.answer(name).map(|_| ())
    }

    /// Stops the machine, and says what it was before: one that did not run was stopped by somebody else.
    pub fn stop(&mut self) -> Result<String> {
        let mut before = String::new();
        self.run_with_status("stop", |status, _| status.clone_into(&mut before))?;
        Ok(before)
    }

    /// Lets a machine go on that is stopped. Says first whether nobody else had, since it had gone on so often.
    pub fn go_on_from(&mut self, resumed: u64, stood_still: &mut bool) -> Result<()> {
        self.run_with_status("cont", |status, now| *stood_still = status != "running" && now <= resumed)
    }

    /// Gives QEMU an open file, as a file set of that number.
    pub fn give(&mut self, file: &File) -> Result<u64> {
        let (name, request) = ("add-fd", b"{\"execute\": \"add-fd\"}\n");
        self.is_in_step(name)?;
        self.unanswered += 1;
        let descriptors = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let has_room = control.push(SendAncillaryMessage::ScmRights(&descriptors));
        debug_assert!(has_room, "there is room for one descriptor");
        // So short a request goes out whole.
        let sent = sendmsg(&self.socket, &[IoSlice::new(request)], &mut control, SendFlags::NOSIGNAL);
        if sent != Ok(request.len()) {
            return Err(self.closed(name));
        }
        let answer = self.answer(name)?;
        answer["fdset-id"].as_u64().ok_or_else(|| Error::new(Kind::Io, format!("QEMU answered {name} with {answer}")))
    }

    /// The answer to what was just asked.
    fn answer(&mut self, name: &str) -> Result<Value> {
        loop {
            let mut answer = self.receive(name, self.answer_wait_max)?;
            if answer.get("return").or(answer.get("error")).is_none() {
                self.hear(&answer);
                continue;
            }
            self.unanswered = self.unanswered.saturating_sub(1);
            let Some(error) = answer.get("error") else { return Ok(answer["return"].take()) };
            let text = |field: &str| error[field].as_str().unwrap_or("?").to_owned();
            return Err(Error::new(Kind::Io, format!("QEMU refused {name}: {}: {}", text("class"), text("desc"))));
        }
    }

    /// Anything that is no answer is an event.
    fn hear(&mut self, event: &Value) {
        self.resumed += u64::from(event["event"] == "RESUME");
        let stops = match event["event"].as_str() {
            Some("SHUTDOWN" | "GUEST_PANICKED" | "SUSPEND" | "SUSPEND_DISK") => true,
            Some("BLOCK_IO_ERROR") => event["data"]["action"] == "stop",
            Some("WATCHDOG") => event["data"]["action"] == "pause",
            _ => false,
        };
        if stops {
            self.stopped_by = event["event"].as_str().map(str::to_owned);
        }
    }

    /// Waits until another guest's state is loaded.
    pub fn wait_incoming(&mut self, wait: Duration) -> Result<()> {
        let since = Stopwatch::start();
        while self.run("query-status", Value::Null)?["status"] == "inmigrate" {
            // However quickly it answers.
            (self.check)()?;
            let migration = self.run("query-migrate", Value::Null)?;
            if let Some(status @ ("failed" | "cancelled")) = migration["status"].as_str() {
                let why = migration["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                return Err(Error::new(Kind::Io, format!("the state could not be loaded: migration {status}: {why}")));
            }
            if since.elapsed() > wait {
                return Err(Error::new(Kind::Io, format!("QEMU did not load the state within {} s", wait.as_secs())));
            }
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    /// Saves the state of a machine that is stopped, without memory that others see, too. Says what this migration is known by.
    pub fn save_state(&mut self, path: &Path, wait: Duration) -> Result<String> {
        let since = Stopwatch::start();
        self.run("migrate", file_channel(path)?)?;
        loop {
            let migration = self.run("query-migrate", Value::Null)?;
            let failed = |status: &str| {
                let why = migration["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                Error::new(Kind::Io, format!("the state could not be saved: migration {status}: {why}"))
            };
            match migration["status"].as_str() {
                Some("completed") => return Ok(migration.to_string()),
                Some(status @ ("failed" | "cancelled")) => return Err(failed(status)),
                _ if since.elapsed() > wait => {
                    // Whoever lets the machine go on sees to its end.
                    let _ = self.run("migrate_cancel", Value::Null);
                    return Err(Error::new(
                        Kind::Io,
                        format!("QEMU did not save the state within {} s", wait.as_secs()),
                    ));
                }
                _ => std::thread::sleep(STATE_NAP),
            }
        }
    }

    /// Whether a state is being saved.
    pub fn is_saving(&mut self) -> Result<bool> {
        let migration = self.run("query-migrate", Value::Null)?;
        Ok(!matches!(migration["status"].as_str(), None | Some("none" | "completed" | "failed" | "cancelled")))
    }

    /// Lets a machine go on that was stopped to save its state, whatever is left of that. One that were let go on while the state is
    /// still being saved would be stopped again when it is. If it was `saved` to its end, by a migration that is known by this, and
    /// is not as that has left it, it went on since, and whatever it does is somebody else's wish.
    pub fn go_on(&mut self, wait: Duration, saved: Option<&str>) -> Result<()> {
        let since = Stopwatch::start();
        if let Some(saved) = saved {
            let migration = self.run("query-migrate", Value::Null)?.to_string();
            let answer = self.run("query-status", Value::Null)?;
            let status = answer["status"].as_str().unwrap_or("unknown");
            // One that was reset meanwhile has the status of one that never ran.
            let is_left = matches!(status, "postmigrate" | "prelaunch") && migration == saved;
            if status != "running" && !is_left {
                tracing::warn!("the machine is {status:?} by now, and not as its capture left it: it is left alone");
                return Ok(());
            }
        }
        let (mut is_cancelled, mut status) = (false, String::new());
        while since.elapsed() < wait * 2 {
            if self.is_saving()? {
                // Memory that is saved while it runs is nothing to wait for.
                let is_running = self.run("query-status", Value::Null)?["status"] == "running";
                if (is_running || since.elapsed() > wait) && !is_cancelled {
                    self.run("migrate_cancel", Value::Null)?;
                    is_cancelled = true;
                }
                std::thread::sleep(STATE_NAP);
                continue;
            }
            let answer = self.run("query-status", Value::Null)?;
            answer["status"].as_str().unwrap_or("unknown").clone_into(&mut status);
            if status == "running" {
                return Ok(());
            }
            self.run("cont", Value::Null)?;
        }
        Err(Error::new(Kind::Io, format!("the machine does not go on: QEMU says that it is {status:?}")))
    }

    /// Why there is no connection any more: that QEMU ended, and how, says more than that it was closed. It may take it a
    /// moment.
    fn closed(&mut self, what: &str) -> Error {
        let since = Stopwatch::start();
        while since.elapsed() < self.end_wait {
            if let Err(error) = (self.check)() {
                return error;
            }
            std::thread::sleep(NAP);
        }
        Error::new(Kind::Io, format!("QEMU closed its monitor before it answered {what}"))
    }

    /// The next document.
    fn receive(&mut self, what: &str, wait: Duration) -> Result<Value> {
        let since = Stopwatch::start();
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| {
                    Error::new(Kind::Io, format!("QEMU's answer to {what} is no document: {error}"))
                        .hint("a monitor for people does not serve: give the path of -qmp unix:PATH,server,nowait")
                });
            }
            if self.received.len() > LINE_LEN_MAX {
                return Err(Error::new(Kind::Io, format!("QEMU's answer to {what} is too long")));
            }
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(self.closed(what)),
                Ok(len) => self.received.extend_from_slice(&buffer[..len]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    (self.check)()?;
                    if since.elapsed() > wait {
                        return Err(Error::new(
                            Kind::Io,
                            format!("QEMU did not answer {what} within {} s", wait.as_secs()),
                        ));
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // It had something left to read.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(self.closed(what)),
                Err(error) => return Err(Error::io(format!("QEMU's monitor, for {what}"), error)),
            }
        }
    }
}

/// Why a monitor could not be connected to, after it was tried for so long.
fn unopened(path: &Path, wait: Duration) -> Error {
    let shown = path.display();
    match std::fs::metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            Error::usage(format!("{shown} is no socket")).hint("give the path of QEMU's -qmp unix:PATH,server,nowait")
        }
        _ => Error::new(Kind::Io, format!("QEMU did not open its monitor {shown} within {} s", wait.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread::JoinHandle;

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    const DONE: &str = "{\"return\": {}}\r\n";

    /// Greets, and answers each request with the next text; then closes the connection, or waits for its end.
    fn peer(answers: &'static [&'static str], stays: bool) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(socket.try_clone().unwrap()).lines();
            let mut requests = Vec::new();
            let mut answers = answers.iter();
            if let Some(greeting) = answers.next() {
                socket.write_all(greeting.as_bytes()).unwrap();
            }
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { return requests };
                requests.push(serde_json::from_str(&line).unwrap());
                socket.write_all(answer.as_bytes()).unwrap();
            }
            if stays {
                requests.extend(lines.map_while(|line| serde_json::from_str(&line.ok()?).ok()));
            }
            requests
        });
        (dir, path, thread)
    }

    fn talk(
        answers: &'static [&'static str],
        stays: bool,
        with: impl FnOnce(&mut Monitor<'_>) -> Result<()>,
    ) -> (Result<()>, Vec<Value>) {
        let (_dir, path, thread) = peer(answers, stays);
        let result =
            Monitor::connect(&path, Duration::from_millis(300), || Ok(())).and_then(|mut monitor| with(&mut monitor));
        (result, thread.join().unwrap())
    }

    #[test]
    fn commands_are_answered_between_events() {
        let answers = [
            GREETING,
            DONE,
            "{\"event\": \"RESUME\", \"timestamp\": {}}\r\n\r\n{\"return\": {\"status\": \"running\"}}\r\n",
        ];
        let (result, requests) = talk(Box::leak(Box::new(answers)), false, |monitor| {
            assert_eq!(monitor.run("query-status", json!({"a": 1}))?["status"], "running");
            Ok(())
        });
        result.unwrap();
        assert_eq!(requests[0], json!({"execute": "qmp_capabilities"}));
        assert_eq!(requests[1], json!({"execute": "query-status", "arguments": {"a": 1}}));
    }

    #[test]
    fn what_goes_wrong_is_named() {
        let run = |monitor: &mut Monitor<'_>| monitor.run("cont", Value::Null).map(|_| ());
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no way\"}}\r\n";
        type Case = (&'static [&'static str], bool, &'static str);
        let cases: [Case; 7] = [
            (Box::leak(Box::new([GREETING, DONE, refusal])), false, "QEMU refused cont: GenericError: no way"),
            (Box::leak(Box::new([GREETING, refusal])), false, "refused qmp_capabilities"),
            (Box::leak(Box::new([GREETING, DONE])), true, "did not answer cont within 0 s"),
            (Box::leak(Box::new([GREETING, DONE])), false, "closed its monitor before it answered cont"),
            (Box::leak(Box::new([GREETING, DONE, "nonsense\n"])), false, "answer to cont is no document"),
            (Box::leak(Box::new(["{}\n"])), false, "is no monitor of QEMU"),
            (&[], true, "did not answer its greeting"),
        ];
        for (answers, stays, text) in cases {
            let (result, _) = talk(answers, stays, run);
            let error = result.unwrap_err();
            assert!(error.to_string().contains(text), "{error}, not {text}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"").unwrap();
        for (name, text) in [("none", "did not open its monitor"), ("file", "is no socket")] {
            let error = Monitor::connect(&dir.path().join(name), Duration::ZERO, || Ok(())).err().unwrap();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn an_answer_without_end_is_not_kept() {
        let long: &'static str = Box::leak("x".repeat(LINE_LEN_MAX + (64 << 10)).into_boxed_str());
        let answers: &'static [&'static str] = Box::leak(Box::new([GREETING, DONE, long]));
        let (_dir, path, _thread) = peer(answers, true);
        let mut monitor = Monitor::connect(&path, Duration::from_secs(10), || Ok(())).unwrap();
        assert!(monitor.run("stop", Value::Null).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn the_state_is_waited_for_and_its_failure_told() {
        let incoming = "{\"return\": {\"status\": \"inmigrate\"}}\n";
        let active = "{\"return\": {\"status\": \"active\"}}\n";
        let failed = "{\"return\": {\"status\": \"failed\", \"error-desc\": \"a device is missing\"}}\n";
        let paused = "{\"return\": {\"status\": \"paused\"}}\n";
        let wait = |monitor: &mut Monitor<'_>| monitor.wait_incoming(Duration::from_secs(10));
        let good = [GREETING, DONE, incoming, active, incoming, active, paused];
        talk(Box::leak(Box::new(good)), false, wait).0.unwrap();
        let bad = [GREETING, DONE, incoming, failed];
        let error = talk(Box::leak(Box::new(bad)), false, wait).0.unwrap_err();
        assert!(error.to_string().contains("migration failed: a device is missing"), "{error}");
        let slow = [GREETING, DONE, incoming, active];
        let error =
            talk(Box::leak(Box::new(slow)), true, |monitor| monitor.wait_incoming(Duration::ZERO)).0.unwrap_err();
        assert!(error.to_string().contains("did not load the state"), "{error}");
    }

    #[test]
    fn a_wait_ends_when_it_makes_no_sense_any_more() {
        let (_dir, path, _thread) = peer(Box::leak(Box::new([GREETING, DONE])), true);
        let mut count = 0;
        let mut check = || {
            count += 1;
            if count < 5 { Ok(()) } else { Err(Error::new(Kind::Io, "it died")) }
        };
        let mut monitor = Monitor::connect(&path, Duration::from_secs(60), &mut check).unwrap();
        assert_eq!(monitor.run("cont", Value::Null).unwrap_err().to_string(), "it died");
    }
}
