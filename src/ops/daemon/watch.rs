//! Waiting for the end of a mount, and bringing it about when a signal or a request says so.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::holders::holders;
use super::service::State;
use crate::error::{Error, Result};
use crate::fs::fuse::Unmounter;
use crate::ops::control::Unmounted;
use crate::ops::mounts;
use crate::platform::clock::Stopwatch;

/// How long a stop waits for those who have files open, before it stops without them.
const GRACE: Duration = Duration::from_secs(10);

/// How often it tries meanwhile.
const RETRY: Duration = Duration::from_millis(250);

/// How long a lazy unmount that ends the daemon at once may take.
const DETACH_WAIT: Duration = Duration::from_secs(1);

/// How long the kernel may take to hand over what it has not written back.
const FLUSH_WAIT: Duration = Duration::from_secs(60);

/// What the daemon waits for.
pub enum Event {
    /// The mount is gone, whoever ended it.
    Gone(Result<()>),
    Signal(i32),
    Umount {
        lazy: bool,
        answer: Answer,
    },
}

type Answer = Sender<Result<Unmounted>>;

/// How a mount ended.
pub enum End {
    /// Nothing of it is left.
    Gone(Result<()>),
    /// Files are still open, and were given up.
    Left,
}

/// How far a mount is from its end.
enum Phase {
    Serving,
    /// Unmounted lazily: it ends at once unless files are open.
    Detaching(Stopwatch),
    /// Unmounted lazily, and files are open.
    Detached,
    /// Told to stop.
    Stopping(Stopwatch),
}

/// A mount that is served.
pub struct Watch {
    mountpoint: String,
    /// The device of the mount's files.
    device: Option<(u32, u32)>,
    unmounter: Unmounter,
    events: Receiver<Event>,
    phase: Phase,
    /// Who asked for an unmount that is under way.
    answers: Vec<Answer>,
    /// Called when nobody can read or write any more.
    unmounted: Box<dyn Fn() + Send>,
}

impl Watch {
    pub fn new(
        mountpoint: String,
        device: Option<(u32, u32)>,
        unmounter: Unmounter,
        events: Receiver<Event>,
        unmounted: Box<dyn Fn() + Send>,
    ) -> Self {
        Self { mountpoint, device, unmounter, events, phase: Phase::Serving, answers: Vec::new(), unmounted }
    }

    /// Takes a mount away that nobody was told of.
    pub fn give_up(&self) {
        if let Err(error) = self.unmount(true) {
            tracing::warn!(%error, "the mount is left behind");
        }
        while let Ok(event) = self.events.recv_timeout(DETACH_WAIT) {
            if matches!(event, Event::Gone(_)) {
                return;
            }
        }
    }

    /// Returns when the mount is gone, or when a stop has waited long enough. `told` hears of each state.
    pub fn run(&mut self, told: &mut dyn FnMut(State)) -> End {
        loop {
            let event = match &self.phase {
                Phase::Serving | Phase::Detached => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Phase::Detaching(_) | Phase::Stopping(_) => self.events.recv_timeout(RETRY),
            };
            match (event, &self.phase) {
                (Ok(Event::Gone(result)), _) => return End::Gone(result),
                (Ok(Event::Umount { lazy, answer }), _) => self.asked(lazy, answer),
                (Ok(Event::Signal(signal)), Phase::Stopping(_)) => {
                    tracing::warn!("{} again: waiting no longer", signal_name(signal));
                    return self.leave();
                }
                (Ok(Event::Signal(signal)), _) => {
                    tracing::info!("{}: stopping", signal_name(signal));
                    told(State::Stopping);
                    self.phase = Phase::Stopping(Stopwatch::start());
                    if self.unmount(false).is_err() {
                        self.report(&format!("stopping in {} s without them", GRACE.as_secs()));
                    }
                }
                (Err(RecvTimeoutError::Timeout), Phase::Stopping(since)) => {
                    if since.elapsed() >= GRACE {
                        return self.leave();
                    }
                    // In use, as before.
                    let _ = self.unmount(false);
                }
                (Err(RecvTimeoutError::Timeout), Phase::Detaching(since)) => {
                    if since.elapsed() >= DETACH_WAIT {
                        self.phase = Phase::Detached;
                        told(State::Detached);
                        let holders = self.report("serving them until they are closed");
                        self.answer(&Ok(self.unmounted(false, holders)));
                    }
                }
                (Err(RecvTimeoutError::Timeout), _) => {}
                // Each signal and the end of the mount keep the channel open.
                (Err(RecvTimeoutError::Disconnected), _) => return End::Left,
            }
        }
    }

    fn asked(&mut self, lazy: bool, answer: Answer) {
        if matches!(self.phase, Phase::Detached) {
            // Who asked may have gone.
            let _ = answer.send(Ok(self.unmounted(false, self.holders())));
            return;
        }
        match self.unmount(lazy) {
            Ok(()) => {
                self.answers.push(answer);
                if lazy && matches!(self.phase, Phase::Serving) {
                    self.phase = Phase::Detaching(Stopwatch::start());
                }
            }
            Err(error) => {
                let holders = self.holders();
                let error = match holders.is_empty() {
                    true => error,
                    false => Error::conflict(format!("{} is in use: {}", self.mountpoint, holders.join("; ")))
                        .hint(format!("end these, or: epochfs umount --lazy {}", self.mountpoint)),
                };
                let _ = answer.send(Err(error));
            }
        }
    }

    /// Unmounts, unless that was done already: what is mounted there now may be somebody else's.
    fn unmount(&self, lazily: bool) -> Result<()> {
        if self.device.is_some() && mounts::device_at(Path::new(&self.mountpoint)) != self.device {
            // Still served: open files keep it.
            return match lazily {
                true => Ok(()),
                false => Err(Error::conflict(format!("{} is unmounted, but files are open", self.mountpoint))),
            };
        }
        self.unmounter.unmount(lazily)?;
        if !lazily {
            (self.unmounted)();
        }
        Ok(())
    }

    /// Stops although files are open: what the kernel still has is handed over, then the mount goes.
    fn leave(&self) -> End {
        if let Some(device) = self.device {
            flush(PathBuf::from(&self.mountpoint), device);
        }
        self.report("stopping all the same: what they read and write from now on fails");
        if let Err(error) = self.unmount(true) {
            tracing::warn!(%error, "the mount is left behind");
        }
        // Where they went after all, everything is in order.
        while let Ok(event) = self.events.recv_timeout(DETACH_WAIT) {
            if let Event::Gone(result) = event {
                return End::Gone(result);
            }
        }
        End::Left
    }

    fn holders(&self) -> Vec<String> {
        let found = self.device.map(holders).unwrap_or_default();
        found.iter().map(ToString::to_string).collect()
    }

    /// Says in the log who holds files open.
    fn report(&self, what_follows: &str) -> Vec<String> {
        let holders = self.holders();
        for holder in &holders {
            tracing::warn!("{holder}");
        }
        if !holders.is_empty() {
            tracing::warn!("{} is in use: {what_follows}", self.mountpoint);
        }
        holders
    }

    fn unmounted(&self, ended: bool, holders: Vec<String>) -> Unmounted {
        Unmounted { mountpoint: self.mountpoint.clone(), ended, holders, uncommitted: Vec::new() }
    }

    fn answer(&mut self, result: &Result<Unmounted>) {
        for answer in self.answers.drain(..) {
            // Who asked may have gone.
            let _ = answer.send(match result {
                Ok(unmounted) => Ok(unmounted.clone()),
                Err(error) => {
                    let copy = Error::new(error.kind(), error.to_string());
                    Err(match error.next_step() {
                        Some(next) => copy.hint(next),
                        None => copy,
                    })
                }
            });
        }
    }

    /// Answers everybody who asked for an unmount, those too who did so at the last moment.
    pub fn answer_all(&mut self, outcome: &Result<()>, uncommitted: Vec<String>) {
        while let Ok(event) = self.events.try_recv() {
            if let Event::Umount { answer, .. } = event {
                self.answers.push(answer);
            }
        }
        let result = match outcome {
            Ok(()) => Ok(Unmounted { uncommitted, ..self.unmounted(true, Vec::new()) }),
            Err(error) => Err(Error::new(error.kind(), error.to_string())),
        };
        self.answer(&result);
    }
}

/// Has the kernel hand over what it has not written back. In a thread of its own: nothing may hold a stop up for ever.
fn flush(mountpoint: PathBuf, device: (u32, u32)) {
    let (sender, done) = bounded(1);
    let spawned = std::thread::Builder::new().name("flush".into()).spawn(move || {
        let _ = sender.send(sync(&mountpoint, device));
    });
    if spawned.is_err() {
        return;
    }
    match done.recv_timeout(FLUSH_WAIT) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "stores to mapped files may not have arrived"),
        Err(_) => tracing::warn!("stores to mapped files did not arrive within {} s", FLUSH_WAIT.as_secs()),
    }
}

fn sync(mountpoint: &Path, device: (u32, u32)) -> Result<()> {
    use rustix::fs::{Mode, OFlags};
    if mounts::device_at(mountpoint) != Some(device) {
        return Ok(());
    }
    let failed = |error: rustix::io::Errno| Error::io(format!("cannot sync {}", mountpoint.display()), error.into());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(mountpoint, flags, Mode::empty()).map_err(failed)?;
    rustix::fs::syncfs(&root).map_err(failed)
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "SIGTERM",
        SIGINT => "SIGINT",
        _ => "SIGHUP",
    }
}
