//! A monitor's process: started, watched beside the signals of this process, and ended.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child as Process, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use super::feed::{Feed, Moments};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::keys::{KEY_COMMAND_VARIABLE, KEY_VARIABLE};
use crate::platform::lock::lock;
use crate::platform::process::open_log;

/// The end of what a monitor said that is shown when it died.
const TAIL_LEN: usize = 2 << 10;

/// How long a monitor may take to end in order.
const END_WAIT: Duration = Duration::from_secs(10);

/// What a restore waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Signal(i32),
    /// There is news of the memory.
    Pages,
}

/// The signals of this process, and what else happens.
pub struct Watch {
    events: Receiver<Event>,
    sender: Sender<Event>,
    handle: Handle,
}

impl Watch {
    /// From now on signals end nothing by themselves.
    pub fn start() -> Result<Self> {
        let failed = |error| Error::io("cannot watch signals", error);
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGCHLD]).map_err(failed)?;
        let handle = signals.handle();
        let (sender, events) = unbounded();
        let of_thread = sender.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    // Nobody listens once the restore is over.
                    let _ = of_thread.send(Event::Signal(signal));
                }
            })
            .map_err(failed)?;
        Ok(Self { events, sender, handle })
    }

    pub fn sender(&self) -> Sender<Event> {
        self.sender.clone()
    }

    /// Fails when this process was told to end.
    pub fn check(&self) -> Result<()> {
        while let Ok(event) = self.events.try_recv() {
            check(event)?;
        }
        Ok(())
    }

    /// Waits for the next event.
    pub fn next(&self) -> Option<Event> {
        self.events.recv().ok()
    }
}

impl Watch {
    /// Tells the news of the memory until no more will come.
    pub fn follow(
        &self,
        feed: &Feed,
        everything: bool,
        news: &mut dyn FnMut(&Moments, bool) -> Result<()>,
    ) -> Result<()> {
        loop {
            let is_over = feed.is_over(everything);
            news(&feed.moments(), is_over)?;
            if is_over {
                return Ok(());
            }
            match self.next() {
                Some(event) => check(event).map_err(|error| error.hint("the machine itself goes on"))?,
                None => return Ok(()),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Whether an event tells this process to end.
pub fn is_end(event: Event) -> bool {
    matches!(event, Event::Signal(SIGINT | SIGTERM | SIGHUP))
}

fn check(event: Event) -> Result<()> {
    match event {
        Event::Signal(signal) if is_end(event) => {
            let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
            Err(Error::new(Kind::Io, format!("the restore was ended by {name}")))
        }
        _ => Ok(()),
    }
}

/// Where a monitor's output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// To this process's own; standard output is kept free for a document, or not.
    Passed { stdout_is_taken: bool },
    /// To a file, and there is no standard input: nobody will be there.
    Log(PathBuf),
}

/// How a monitor ended, as a shell would say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended(pub u8);

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
        Self(u8::try_from(code & 0xff).unwrap_or(1))
    }
}

/// The last bytes that went by, and whether that was all.
struct Copied {
    tail: Arc<Mutex<VecDeque<u8>>>,
    is_done: Receiver<()>,
}

enum Said {
    Copied(Copied),
    /// In a log, from this place on.
    Logged(File, u64),
}

/// A monitor that runs. It ends with this value, unless it is left alone.
pub struct Child {
    name: String,
    process: Process,
    said: Said,
    is_left: bool,
}

impl Child {
    pub fn start(command: &[OsString], output: &Output) -> Result<Self> {
        let (program, arguments) = command.split_first().ok_or_else(|| Error::usage("no program is named"))?;
        let name = Path::new(program).file_name().unwrap_or(program).display().to_string();
        let failed = |error: std::io::Error| {
            let is_missing = error.kind() == std::io::ErrorKind::NotFound;
            let error = Error::io(format!("cannot start {}", program.display()), error);
            if is_missing { error.hint("install it, or give its path") } else { error }
        };
        let mut started = Command::new(program);
        // It may be told what to run by anybody who has the guest; the key of the repository is none of its business.
        started.args(arguments).env_remove(KEY_VARIABLE).env_remove(KEY_COMMAND_VARIABLE);
        let mut log = None;
        match output {
            Output::Passed { stdout_is_taken } => {
                end_with_parent(&mut started);
                started.stderr(Stdio::piped());
                if *stdout_is_taken {
                    let stderr = rustix::io::dup(rustix::stdio::stderr()).map_err(|error| failed(error.into()))?;
                    started.stdout(stderr);
                }
            }
            Output::Log(path) => {
                let mut file = open_log(path)?;
                let begin = file.seek(SeekFrom::End(0)).map_err(failed)?;
                started.stdin(Stdio::null());
                started.stdout(file.try_clone().map_err(failed)?).stderr(file.try_clone().map_err(failed)?);
                // A terminal's signals are not for it.
                started.process_group(0);
                log = Some((file, begin));
            }
        }
        let mut process = started.spawn().map_err(failed)?;
        let said = match log {
            Some((file, begin)) => Said::Logged(file, begin),
            None => Said::Copied(copy_stderr(&mut process)),
        };
        Ok(Self { name, process, said, is_left: false })
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.try_wait().map_err(|error| Error::io("the monitor's process", error))
    }

    /// Fails when it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => Err(self.died(status)),
        }
    }

    fn died(&mut self, status: ExitStatus) -> Error {
        let tail = self.tail();
        let tail = tail.trim();
        let said = if tail.is_empty() { "it said nothing".to_owned() } else { tail.to_owned() };
        Error::new(Kind::Io, format!("{} ended before the machine ran ({status}): {said}", self.name))
            .hint("run the command that --print shows by hand to see more")
    }

    /// The end of what it said on standard error.
    pub fn tail(&mut self) -> String {
        let bytes = match &mut self.said {
            Said::Copied(copied) => {
                // What it said last may still be on its way.
                let _ = copied.is_done.recv_timeout(Duration::from_millis(500));
                let tail = lock(&copied.tail);
                tail.iter().copied().collect()
            }
            Said::Logged(file, begin) => {
                let len = file.metadata().map_or(0, |metadata| metadata.len());
                let mut bytes = Vec::new();
                let from = (*begin).max(len.saturating_sub(TAIL_LEN as u64));
                // A log that cannot be read says nothing.
                let _ = file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut bytes));
                bytes
            }
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn signal(&self, signal: Signal) {
        // One that has ended is as good as one that is told to.
        let _ = kill_process(Pid::from_child(&self.process), signal);
    }

    /// Asks it to end.
    pub fn ask_to_end(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it, in order if it does so in time.
    pub fn end(&mut self) {
        if !matches!(self.ended(), Ok(None)) {
            return;
        }
        self.ask_to_end();
        let since = Stopwatch::start();
        while since.elapsed() < END_WAIT {
            if !matches!(self.ended(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        tracing::warn!("{} does not end, and is killed", self.name);
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Leaves it running.
    pub fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.is_left {
            self.end();
        }
    }
}

/// A monitor in the foreground ends with whoever started it, also if that is killed. It is started by the main thread,
/// whose end is the process's.
fn end_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let ask = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        // It may be dead already.
        match rustix::process::getppid() == Some(parent) {
            true => Ok(()),
            false => Err(rustix::io::Errno::SRCH.into()),
        }
    };
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(ask) };
}

/// Passes standard error on, and keeps its end.
fn copy_stderr(process: &mut Process) -> Copied {
    let tail: Arc<Mutex<VecDeque<u8>>> = Arc::default();
    let (done, is_done) = bounded(1);
    let Some(mut pipe) = process.stderr.take() else { return Copied { tail, is_done } };
    let kept = tail.clone();
    let copying = std::thread::Builder::new().name("stderr".into()).spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = pipe.read(&mut buffer) {
            // Whoever does not read it still gets the end, with an error.
            let _ = std::io::stderr().lock().write_all(&buffer[..len]);
            let mut kept = lock(&kept);
            kept.extend(&buffer[..len]);
            let surplus = kept.len().saturating_sub(TAIL_LEN);
            kept.drain(..surplus);
        }
        let _ = done.send(());
    });
    if let Err(error) = copying {
        tracing::warn!(%error, "what the monitor says is not passed on");
    }
    Copied { tail, is_done }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, output: &Output) -> Child {
        Child::start(&["sh".into(), "-c".into(), script.into()], output).unwrap()
    }

    fn wait(child: &mut Child) -> ExitStatus {
        loop {
            if let Some(status) = child.ended().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_it_said_last_is_shown_when_it_died() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        for output in [Output::Passed { stdout_is_taken: true }, Output::Log(log.clone())] {
            let mut child = shell("seq 5000 >&2; echo the reason >&2; exit 7", &output);
            assert_eq!(Ended::from(wait(&mut child)), Ended(7));
            let text = child.check().unwrap_err().to_string();
            assert!(text.contains("sh ended") && text.ends_with("the reason") && text.len() < 3000, "{text}");
        }
        // Not what others said before.
        let mut child = shell("exit 1", &Output::Log(log));
        wait(&mut child);
        assert!(child.check().unwrap_err().to_string().contains("it said nothing"));
    }

    #[test]
    fn it_ends_with_its_value_unless_it_is_left() {
        let is_there = |pid: u32| Path::new(&format!("/proc/{pid}/cwd")).read_link().is_ok();
        let output = Output::Passed { stdout_is_taken: false };
        let child = shell("exec sleep 600", &output);
        let pid = child.id();
        assert!(is_there(pid));
        drop(child);
        assert!(!is_there(pid));
        let child = shell("exec sleep 600", &output);
        let pid = child.id();
        child.leave();
        assert!(is_there(pid));
        kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn a_program_that_is_missing_and_a_signal_are_named() {
        let command = ["/nonexistent/qemu".into()];
        let error = Child::start(&command, &Output::Passed { stdout_is_taken: false }).err().unwrap();
        assert!(error.kind() == Kind::NotFound && error.to_string().contains("/nonexistent/qemu"), "{error}");
        assert!(check(Event::Signal(SIGTERM)).unwrap_err().to_string().contains("SIGTERM"));
        assert!(check(Event::Signal(SIGCHLD)).is_ok() && check(Event::Pages).is_ok());
        assert_eq!(Ended::from(ExitStatus::from_raw(9)), Ended(137));
    }
}
